"""Token ids to the text of a `Completion`, the same for every backend."""

from typing import TYPE_CHECKING

from rpsa.chat import read_thought
from rpsa.thought import NO_THOUGHT, ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ResponseDecoder:
    """Decodes responses: special tokens are left out, the words of the model's thought format are kept.

    `thought`: None is the chat template's, and that of no thoughts where there is no template.
    `thought_is_special`: the tokenizer counts some of these words as special tokens, so that an engine which leaves
    special tokens out of its text loses the end of the thought.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", thought: ThoughtFormat | None = None) -> None:
        self.tokenizer = tokenizer
        if thought is None:
            thought = read_thought(tokenizer) if tokenizer.chat_template else NO_THOUGHT
        self.thought = thought
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        words = dict(zip(special, tokenizer.convert_ids_to_tokens(list(special)), strict=True))
        kept = {i for i, word in words.items() if any(word in mark for mark in thought.marks)}
        kept -= {tokenizer.eos_token_id}
        self.thought_is_special = bool(kept)
        self._hidden_ids = special - kept

    def text(self, token_ids: list[int]) -> str:
        visible = [i for i in token_ids if i not in self._hidden_ids]
        return self.verbatim(visible)

    def verbatim(self, token_ids: list[int]) -> str:
        """Every token, special ones too."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def token_ids(self, text: str) -> list[int]:
        """What the tokenizer makes of a response's text, nothing added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def without_hidden(self, text: str) -> str:
        """Text from an engine that spells special tokens out, as `text` would have it."""
        for token in self.tokenizer.convert_ids_to_tokens(sorted(self._hidden_ids)):
            text = text.replace(token, "")
        return text
