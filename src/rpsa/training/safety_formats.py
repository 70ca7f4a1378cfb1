"""The formats in which safety data is published, and one row of each as an example with a thought.

DirectRefusal (a refusal, to which one constant thought is put), SafeChain and STAR-1 (chains of thought with safe
answers), and plain prompt/response or chat records.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from rpsa.chat import format_of_response, split_response
from rpsa.errors import RPSAError
from rpsa.rows import Row, text_field
from rpsa.thought import THINK, ThoughtFormat

REFUSING_THOUGHT = "I should not answer this question!"

SafetyFormat = Literal["auto", "direct_refusal", "safechain", "star1", "prompt_response", "messages"]


@dataclass(frozen=True)
class SafetyExample:
    """`prompt` is the full user message; `response` is `<think>thought</think>answer`, or what else
    `rpsa.chat.split_response` reads; `rpsa.chat.render_example` writes it in the model's own format."""

    prompt: str
    response: str


_PROMPT_FIELDS: dict[str, tuple[str, ...]] = {
    "direct_refusal": ("instruction", "prompt", "question"),
    "safechain": ("instruction",),
    "star1": ("question",),
    "prompt_response": ("prompt", "instruction", "question"),
}
_RESPONSE_FIELDS: dict[str, tuple[str, ...]] = {
    "direct_refusal": ("output", "refusal", "response"),
    "safechain": ("response",),
    "star1": ("response",),
    "prompt_response": ("response", "output"),
}
# What makes `auto` choose a format: the first whose fields (one of each group) a row has.
_SIGNATURES: list[tuple[SafetyFormat, tuple[tuple[str, ...], ...]]] = [
    ("messages", (("messages",),)),
    ("star1", (("question",), ("response",))),
    ("safechain", (("instruction",), ("response",))),
    ("prompt_response", (("prompt",), ("response",))),
    ("direct_refusal", (("instruction", "prompt"), ("output", "refusal"))),
]


def known_format(format: str) -> str:
    """Raises RPSAError unless `format` is one of `SafetyFormat`."""
    if format not in get_args(SafetyFormat):
        raise RPSAError(
            f"unknown safety data format {format!r}: give one of {', '.join(get_args(SafetyFormat))}"
        )
    return format


def format_of(row: Row) -> SafetyFormat:
    """The format that a row's fields are those of. Raises RPSAError if there is none."""
    for name, groups in _SIGNATURES:
        if all(any(field in row.fields for field in group) for group in groups):
            return name
    expected = "; ".join(
        f"{name}: " + " + ".join("/".join(group) for group in groups) for name, groups in _SIGNATURES
    )
    raise RPSAError(f"{row.where} has the fields {', '.join(map(str, row.fields))}: expected {expected}")


def as_example(row: Row, format: str, thought: ThoughtFormat = THINK) -> SafetyExample:
    """Raises RPSAError, naming the row, if it lacks a field, or a thought that the model of this format needs."""
    if format == "messages":
        prompt, response = _first_exchange(row)
    else:
        prompt = text_field(row, _PROMPT_FIELDS[format])
        response = text_field(row, _RESPONSE_FIELDS[format])
        if row.fields.get("input"):
            prompt += f"\n{row.fields['input']}"
    has_thought = format_of_response(response, thought) is not None
    if format == "direct_refusal" and not has_thought:
        response = f"<think>{REFUSING_THOUGHT}</think>{_without_question(response)}"
    if not prompt.strip():
        raise RPSAError(f"{row.where} has an empty prompt")
    try:
        split_response(response, thought)
    except RPSAError as error:
        hint = "" if has_thought else " (or format: direct_refusal, which adds a refusing one)"
        raise RPSAError(f"{row.where}: {error}{hint}") from None
    return SafetyExample(prompt, response)


def _without_question(refusal: str) -> str:
    """TianshengHuang/DirectRefusal writes the refusal as `Question: <prompt>\\nAnswer: <refusal>`."""
    question, answer, rest = refusal.partition("\nAnswer:")
    return rest.lstrip() if answer and question.startswith("Question:") else refusal


def _first_exchange(row: Row) -> tuple[str, str]:
    """The user's and the assistant's text of a chat of exactly these two turns."""
    messages: Any = row.fields.get("messages")
    try:
        roles = [message["role"] for message in messages]
        contents = [str(message["content"]) for message in messages]
    except (TypeError, KeyError):
        raise RPSAError(f"{row.where}: messages must be a list of objects with role and content") from None
    if roles != ["user", "assistant"]:
        raise RPSAError(
            f"{row.where} has turns {', '.join(map(str, roles))}: one user, one assistant turn expected"
        )
    return contents[0], contents[1]
