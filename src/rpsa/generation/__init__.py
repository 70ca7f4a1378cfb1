"""Generators: one interface to whatever generates text, prompts as token ids in, token ids and text out.

What every backend shares: how to draw (`Sampling`), the seed of a sample, and token ids as text (`ResponseDecoder`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import quote

from rpsa.chat import read_thought
from rpsa.errors import RPSAError
from rpsa.thought import NO_THOUGHT, ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Completion", "Generator", "ResponseDecoder", "Sampling", "sample_id", "sample_seed"]


@dataclass(frozen=True)
class Sampling:
    """How to draw a response; the defaults are the paper's (section 4.2.1). `temperature` 0 is greedy."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32768
    seed: int = 42

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise RPSAError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise RPSAError(f"top_p is {self.top_p}: give more than 0 and at most 1")
        if self.max_new_tokens < 1:
            raise RPSAError(f"max_new_tokens is {self.max_new_tokens}: give at least 1")


@dataclass(frozen=True)
class Completion:
    """One response without its prompt and without padding.

    `token_ids` are exactly what the model emitted, EOS included; `text` leaves out special tokens other than those
    of the model's thought format. `finish_reason` is "stop" if and only if EOS was emitted. Where `exact` is False,
    a server gave text alone: `token_ids` are what the tokenizer makes of it, which may be split otherwise.
    """

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    exact: bool = True


class Generator(Protocol):
    """A backend."""

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index into `prompts`, completion) as they finish, in any order.

        A response depends on its prompt, `sampling` and its sample id, never on what else is in the batch.
        """
        ...


def sample_id(task: str, document: str | int, index: int) -> str:
    """The id of response number `index` to one document of a task; different triples have different ids."""
    return f"{task}/{quote(str(document), safe='')}/{index}"


def sample_seed(seed: int, sample_id: str) -> int:
    """The seed of one response for an engine with its own random numbers: 31 bits, which every engine takes."""
    digest = hashlib.blake2b(f"{seed}\0{sample_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


def check_lengths(prompts: Sequence[list[int]], sample_ids: Sequence[str]) -> None:
    """Raise RPSAError unless there is one sample id for each prompt."""
    if len(prompts) != len(sample_ids):
        raise RPSAError(f"{len(prompts)} prompts with {len(sample_ids)} sample ids: give one for each")


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
