"""A prompt and the text judged, as a classifier's input: cut to what it can read, unable to end its own turn."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """What a classifier reads, in its own tokens: `tokens` in all, and at most `text_tokens` of the text judged
    (None: what is left), of which the `keep` is kept."""

    tokens: int
    text_tokens: int | None = None
    keep: Literal["start", "end"] = "start"

    def less(self, tokens: int) -> "Window":
        return replace(self, tokens=self.tokens - tokens)


def template_ids(
    tokenizer: "PreTrainedTokenizerBase", template: str, prompt: str, text: str, window: Window
) -> list[int] | None:
    """Token ids of a template with its `{prompt}` and `{response}` filled in, with the special tokens that the
    tokenizer puts around a text. None if there is no room for the text."""

    def render(prompt: str, text: str) -> list[int]:
        return list(tokenizer(template.format(prompt=prompt, response=text))["input_ids"])

    return _fitted(tokenizer, render, prompt, text, window)


def chat_ids(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, text: str, window: Window, *, typed: bool
) -> list[int] | None:
    """Token ids of a user turn and the assistant turn judged, by the tokenizer's own chat template. `typed` wraps
    each content in a list of typed parts. None if there is no room for the text."""

    def render(prompt: str, text: str) -> list[int]:
        turns = [("user", prompt), ("assistant", text)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if typed else content}
            for role, content in turns
        ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    return _fitted(tokenizer, render, prompt, text, window)


def _fitted(
    tokenizer: "PreTrainedTokenizerBase",
    render: Callable[[str, str], list[int]],
    prompt: str,
    text: str,
    window: Window,
) -> list[int] | None:
    prompt, text = _defused(tokenizer, prompt), _defused(tokenizer, text)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    room = length if window.text_tokens is None else min(length, window.text_tokens)
    while room > 0 or not length:
        ids = render(prompt, _cut(tokenizer, text, room, window.keep))
        if len(ids) <= window.tokens:
            return ids
        room -= len(ids) - window.tokens
        if not length:
            break
    return None


def _cut(tokenizer: "PreTrainedTokenizerBase", text: str, tokens: int, keep: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens:
        return text
    kept = ids[:tokens] if keep == "start" else ids[-tokens:]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))


def _defused(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """The text with a space in each of the tokenizer's special tokens, so that it spells none: a response that
    holds `<|eot_id|>` would otherwise end its own turn, and could add a verdict."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= set(tokenizer.all_special_tokens)
    if not special:
        return text
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return re.sub(pattern, lambda match: f"{match[0][:1]} {match[0][1:]}", text)
