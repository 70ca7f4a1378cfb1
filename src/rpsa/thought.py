"""Thought formats: how a model's thought is told from its answer, a property of the model.

`rpsa.chat.read_thought` reads it from a chat template; here is what it is, and what follows from it for a text.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ThoughtFormat:
    """How a model writes a thought and its answer: `open` thought `close` answer.

    Attributes:
        open: what begins a thought, with the whitespace after it. Empty: the model has no thoughts.
        close: what stands between a thought and its answer.
        answer: the part of `close` that begins an answer by itself, where more may stand between; empty: all of it.
        ends: what ends an answer, where more may follow it.
        system: the system prompt that switches thoughts on, or off for a model without them; empty: none is needed.
    """

    open: str = ""
    close: str = ""
    answer: str = ""
    ends: tuple[str, ...] = ()
    system: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ends": list(self.ends)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ThoughtFormat":
        """The format that `to_json` made, as `results.json` and a D_ref's manifest hold it."""
        return cls(**{**fields, "ends": tuple(fields["ends"])})

    @property
    def has_thoughts(self) -> bool:
        return bool(self.open)

    @property
    def marks(self) -> tuple[str, ...]:
        """Every word of the format, without whitespace around it."""
        words = (self.open, self.close, self.answer, *self.ends)
        return tuple(word.strip() for word in words if word.strip())

    def is_like(self, other: "ThoughtFormat") -> bool:
        """Whether both have the same words, whatever the whitespace."""
        return (self.open.strip(), self.close.strip()) == (other.open.strip(), other.close.strip())

    def __str__(self) -> str:
        return f"{self.open.strip()} … {self.close.strip()}" if self.has_thoughts else "none"

    def answer_of(self, response: str) -> str | None:
        """What follows the thought, stripped; None if the thought has no end. Without thoughts: all of it."""
        if not self.has_thoughts:
            return response.strip()
        _, mark, answer = response.rpartition((self.answer or self.close).strip())
        if not mark:
            return None
        for end in self.ends:
            answer = answer.partition(end)[0]
        return answer.strip()

    def thought_of(self, response: str) -> str | None:
        """What stands before the answer, stripped and without the marks; None for a model without thoughts.

        A thought that was never closed is all that there is. What was written before `open` is a part of it: nothing
        that a model wrote is neither thought nor answer.
        """
        if not self.has_thoughts:
            return None
        mark = (self.answer or self.close).strip()
        before, found, _ = response.rpartition(mark)
        if not found:
            return self.trace_of(response)
        return self.trace_of(before.removesuffix(self.close.strip().removesuffix(mark)))

    def trace_of(self, response: str) -> str:
        """The whole response, thought and answer, without the marks."""
        if not self.has_thoughts:
            return response.strip()
        text = response.replace(self.close.strip(), "\n").replace(self.open.strip(), "")
        for mark in filter(None, (self.answer, *self.ends)):
            text = text.replace(mark, "\n")
        return text.strip()

    def pieces(self, thought: str, answer: str) -> tuple[str, str, str]:
        """What this model writes after `open`: the thought, its end, the answer. Without thoughts: the answer alone."""
        if not self.has_thoughts:
            return "", "", answer.strip()
        on_lines = self.open.endswith("\n")
        return thought.strip() + "\n" * on_lines, self.close, "\n\n" * on_lines + answer.strip()

    def split(self, response: str) -> tuple[str, str] | None:
        """Thought and answer of a response with exactly one thought, whose `open` may be missing; else None."""
        if not self.has_thoughts:
            return None
        opening, closing = self.open.strip(), self.close.strip()
        body = response.lstrip()
        body = body.removeprefix(opening) if body.startswith(opening) else response
        thought, mark, answer = body.partition(closing)
        if not mark or opening in body or closing in answer:
            return None
        return thought, answer


NO_THOUGHT = ThoughtFormat()
THINK = ThoughtFormat("<think>\n", "</think>")
"""DeepSeek-R1 and its distills, QwQ, Qwen3, Nemotron, GLM and others; safety data is published in it."""

HARMONY = ThoughtFormat(
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    answer="<|channel|>final<|message|>",
    ends=("<|end|>", "<|return|>"),
)
KNOWN: tuple[ThoughtFormat, ...] = (
    THINK,
    ThoughtFormat("[THINK]", "[/THINK]"),  # Magistral
    HARMONY,  # gpt-oss
    ThoughtFormat("<thought>\n", "</thought>"),  # EXAONE Deep
    ThoughtFormat("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThoughtFormat("Here is my thought process:\n", "Here is my response:"),  # Granite 3.2
    ThoughtFormat("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ThoughtFormat("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ThoughtFormat("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    ThoughtFormat("◁think▷", "◁/think▷"),  # Kimi-VL
    ThoughtFormat("<reasoning>\n", "</reasoning>"),
)
"""Formats that are recognised by their words. The first is the one that safety data is written in."""

# A tag that says what it holds, of a family that is not in `KNOWN`.
_TAG = re.compile(
    r"(?P<left><\|?|\[)(?P<name>[\w:.-]*(?:think|thought|reason)[\w:.-]*)(?P<right>\|?>|\])", re.I
)


def format_of_tag(tag: str) -> ThoughtFormat | None:
    """The format of `<name>` and `</name>` (or `[name]`, `<|name|>`) if the name speaks of thoughts."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    return ThoughtFormat(tag, f"{match['left']}/{match['name']}{match['right']}")


def said_in(text: str) -> ThoughtFormat | None:
    """The format whose words a chat template or a prompt uses; None if there is none."""
    for known in KNOWN:
        if (known.answer or known.close) in text or (known.answer and known.open in text):
            return known
    for match in _TAG.finditer(text):
        found = format_of_tag(match[0])
        if found and found.close in text:
            return found
    return None


def opened_by(prompt: str) -> ThoughtFormat | None:
    """The format of the thought that a prompt's end opens, with the whitespace there; None if it opens none."""
    text = prompt.rstrip()
    space = prompt[len(text) :]
    for known in KNOWN:
        if text.endswith(known.open.strip()):
            return ThoughtFormat(known.open.strip() + space, known.close, known.answer, known.ends)
    last = list(_TAG.finditer(text))[-1:]
    found = format_of_tag(last[0][0]) if last and last[0].end() == len(text) else None
    return found and ThoughtFormat(found.open + space, found.close)


def after_any_thought(text: str) -> str:
    """The text after the last closing mark of any known format: for models of which nothing else is known."""
    ends = [
        place + len(mark)
        for known in KNOWN
        for mark in [known.answer or known.close]
        if (place := text.rfind(mark)) >= 0
    ]
    return text[max(ends, default=0) :]
