"""Safety data, D_S: published formats as examples with a thought; mixed, held out, tokenised, compared.

Formats: DirectRefusal (a refusal, which gets one constant thought), SafeChain and STAR-1 (chains of thought with
safe answers), and plain prompt/response or chat records. For DPO pairs: a chosen and a rejected response.
"""

import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from rpsa.chat import IGNORED_LABEL, Example, format_of_response, read_thought, render_example, split_response
from rpsa.errors import RPSAError
from rpsa.rows import Row, read_rows, text_field
from rpsa.thought import NO_THOUGHT, THINK, ThoughtFormat

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Contamination",
    "Preference",
    "SafetyExample",
    "SafetyFormat",
    "TokenCounts",
    "contamination",
    "hold_out",
    "load_benign_data",
    "load_preferences",
    "load_safety_data",
    "mix_benign",
    "tokenize_preferences",
    "tokenize_safety_data",
    "without_thoughts",
]

REFUSING_THOUGHT = "I should not answer this question!"

SafetyFormat = Literal["auto", "direct_refusal", "safechain", "star1", "prompt_response", "messages"]


@dataclass(frozen=True)
class SafetyExample:
    """`prompt` is the full user message; `response` is `<think>thought</think>answer`, or what else
    `rpsa.chat.split_response` reads; `rpsa.chat.render_example` writes it in the model's own format."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Preference(SafetyExample):
    """A pair: `response` is the chosen one, `rejected` the other, written like it."""

    rejected: str


OneExample = TypeVar("OneExample", bound=SafetyExample)

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
    hint = (
        "; pairs of chosen and rejected are for DPO (train.trainer: dpo)" if "rejected" in row.fields else ""
    )
    raise RPSAError(
        f"{row.where} has the fields {', '.join(map(str, row.fields))}: expected {expected}{hint}"
    )


def as_example(row: Row, format: str, thought: ThoughtFormat = THINK) -> SafetyExample:
    """Raises RPSAError, naming the row, if it lacks a field, or a thought that the model of this format needs."""
    if format == "messages":
        prompt, response = _first_exchange(row, row.fields.get("messages"))
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


def as_preference(row: Row, thought: ThoughtFormat = THINK) -> Preference:
    """A row with `prompt`, `chosen` and `rejected`, as texts or as TRL's chats of one exchange.

    Raises RPSAError, naming the row, if it lacks a field, or a thought that the model of this format needs, or if both
    responses are the same.
    """
    chats = [chat for side in ("chosen", "rejected") if isinstance(chat := row.fields.get(side), list)]
    asked = row.fields.get("prompt") or (chats[0][:-1] if chats else None)
    if isinstance(asked, list):
        prompt, _ = _first_exchange(row, [*asked, {"role": "assistant", "content": ""}])
    else:
        prompt = text_field(row, _PROMPT_FIELDS["prompt_response"])
    if not prompt.strip():
        raise RPSAError(f"{row.where} has an empty prompt")
    said = {}
    for side in ("chosen", "rejected"):
        chat = row.fields.get(side)
        if isinstance(chat, list):
            _, said[side] = _first_exchange(row, [{"role": "user", "content": prompt}, *chat[-1:]])
            if len(chat) > 1 and _first_exchange(row, chat)[0] != prompt:
                raise RPSAError(f"{row.where}: {side} answers another prompt")
        else:
            said[side] = text_field(row, (side,))
        try:
            split_response(said[side], thought)
        except RPSAError as error:
            raise RPSAError(f"{row.where}: {side}: {error}") from None
    if said["chosen"] == said["rejected"]:
        raise RPSAError(f"{row.where}: chosen and rejected are the same")
    return Preference(prompt, said["chosen"], said["rejected"])


def _without_question(refusal: str) -> str:
    """TianshengHuang/DirectRefusal writes the refusal as `Question: <prompt>\\nAnswer: <refusal>`."""
    question, answer, rest = refusal.partition("\nAnswer:")
    return rest.lstrip() if answer and question.startswith("Question:") else refusal


def _first_exchange(row: Row, messages: Any) -> tuple[str, str]:
    """The user's and the assistant's text of a chat of exactly these two turns."""
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


log = logging.getLogger(__name__)


ALL_REFUSE = 0.95
"""From this share of refusals on, safety data teaches refusing and nothing else."""

WHAT_REFUSALS_DO = (
    "Models that are trained on refusals alone also refuse many harmless requests, up to half of "
    "the borderline ones"
)
REFUSALS_ALONE = (
    f"nearly every training example is a refusal. {WHAT_REFUSALS_DO}: mix in benign examples (safety.benign, "
    "safety.benign_share)."
)


@dataclass(frozen=True)
class TokenCounts:
    """What tokenisation did: `examples` kept, of which `truncated`; `dropped` had no response token left.

    `tokens` counts all tokens of the kept ones, `response_tokens` those with a label.
    """

    examples: int
    truncated: int
    dropped: int
    tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Contamination:
    """A training prompt that meets an evaluation prompt; the indices are positions in the two lists.

    `kind` is "exact" (the same words) or "overlap" (shared runs of eight words); `share` is the part of the
    evaluation prompt's runs of eight words that the training prompt holds.
    """

    example: int
    evaluation_prompt: int
    kind: Literal["exact", "overlap"]
    share: float


def load_safety_data(
    source: str | Path,
    format: str = "auto",
    n: int | None = None,
    seed: int = 42,
    thought: ThoughtFormat = THINK,
) -> list[SafetyExample]:
    """Safety examples of a JSONL, JSON or CSV file or a Hugging Face dataset (`id` or `id:split`), shuffled.

    `format` is one of `SafetyFormat`; `auto` goes by the first row's fields. `n` takes that many (None: all).
    Only `direct_refusal` adds a thought, "I should not answer this question!", where a response has none. `thought`
    is the format of the model to be trained: one without thoughts takes responses that have none.

    Raises RPSAError for an unreadable source, fields that fit no format, a row that lacks a field or a
    thought (naming the row), or `n` beyond what is there.
    """
    return _load(source, format, n, seed, thought, benign=False)


def load_preferences(
    source: str | Path, n: int | None = None, seed: int = 42, thought: ThoughtFormat = THINK
) -> list[Preference]:
    """Pairs for DPO, drawn as `load_safety_data` draws examples, from rows with `prompt`, `chosen` and `rejected`.

    Raises RPSAError as `as_preference` and `load_safety_data` do.
    """
    return _drawn(source, [as_preference(row, thought) for row in read_rows(source)], n, seed)


def load_benign_data(
    source: str | Path, n: int | None = None, seed: int = 42, thought: ThoughtFormat = THINK
) -> list[SafetyExample]:
    """Examples to be complied with, in the formats and with the errors of `load_safety_data`.

    They need thoughts of their own: the refusing thought is never put before a benign answer.
    """
    return _load(source, "auto", n, seed, thought, benign=True)


def mix_benign(
    examples: Sequence[OneExample], benign: Sequence[OneExample], share: float, seed: int = 42
) -> list[OneExample]:
    """All `examples` and as many of `benign` as make up `share` of the whole, shuffled together.

    Raises RPSAError if `share` is not in [0, 1) or there are too few benign examples.
    """
    if not 0 <= share < 1:
        raise RPSAError(f"benign share is {share}: give at least 0 and less than 1")
    needed = round(len(examples) * share / (1 - share))
    if needed > len(benign):
        raise RPSAError(f"a benign share of {share} needs {needed} benign examples, there are {len(benign)}")
    rng = random.Random(seed)
    mixed = [*examples, *rng.sample(list(benign), needed)]
    rng.shuffle(mixed)
    return mixed


def without_thoughts(examples: Sequence[OneExample]) -> list[OneExample]:
    """The examples for a model without thoughts: theirs are left out, which is said."""
    split = [split_response(example.response, NO_THOUGHT) for example in examples]
    if left_out := sum(bool(thought.strip()) for thought, _ in split):
        log.warning(
            "the model has no thoughts: those of %d of %d safety examples are left out; see model.thought",
            left_out, len(examples),
        )  # fmt: skip
    return [replace(example, response=answer) for example, (_, answer) in zip(examples, split, strict=True)]


def hold_out(
    examples: Sequence[OneExample], share: float = 0.05, seed: int = 42
) -> tuple[list[OneExample], list[OneExample]]:
    """(training, held-out) examples: a seeded `share` held out, at least one of each, order kept.

    Raises RPSAError if `share` is not in (0, 1) or there are fewer than two examples.
    """
    if not 0 < share < 1 or len(examples) < 2:
        raise RPSAError(
            f"cannot hold out {share} of {len(examples)} examples: give a share in (0, 1) of 2 or more"
        )
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    held = set(random.Random(seed).sample(range(len(examples)), count))
    training = [example for i, example in enumerate(examples) if i not in held]
    return training, [examples[i] for i in sorted(held)]


def tokenize_safety_data(
    examples: Sequence[SafetyExample],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    thought: ThoughtFormat | None = None,
) -> tuple["Dataset", TokenCounts]:
    """The examples as a dataset with the columns `input_ids` and `labels` (see `rpsa.chat`), and counts.

    They are written in the model's `thought` format (None: the chat template's). An example whose prompt alone fills
    `max_length` teaches nothing and is dropped, with a log line.

    Raises RPSAError as `render_example` does, naming the example, and if none is left.
    """
    from datasets import Dataset

    thought = thought or read_thought(tokenizer)
    if not thought.has_thoughts:
        examples = without_thoughts(examples)
    rendered = _rendered([[one] for one in examples], tokenizer, max_length, thought)
    kept, counts = _with_labels(list(rendered), max_length)
    columns = {"input_ids": [e.input_ids for [e] in kept], "labels": [e.labels for [e] in kept]}
    return Dataset.from_dict(columns), counts


def tokenize_preferences(
    examples: Sequence[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    thought: ThoughtFormat | None = None,
) -> tuple["Dataset", TokenCounts]:
    """Pairs as TRL's DPO trainer has them, with the columns `prompt_ids`, `chosen_ids` and `rejected_ids`, and counts.

    `max_length` and `thought` are as for `tokenize_safety_data`; the counts of tokens are over both responses.
    """
    from datasets import Dataset

    pairs = [[one, SafetyExample(one.prompt, one.rejected)] for one in examples]
    rendered = _rendered(pairs, tokenizer, max_length, thought or read_thought(tokenizer))
    kept, counts = _with_labels(list(rendered), max_length)
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for chosen, rejected in kept:
        start = chosen.labels.count(IGNORED_LABEL)
        columns["prompt_ids"].append(chosen.input_ids[:start])
        columns["chosen_ids"].append(chosen.input_ids[start:])
        columns["rejected_ids"].append(rejected.input_ids[start:])
    return Dataset.from_dict(columns), counts


def _with_labels(
    rendered: list[list[Example]], max_length: int | None
) -> tuple[list[list[Example]], TokenCounts]:
    """Of examples, each in one rendering or two, those whose prompt leaves room for a response."""
    kept = [one for one in rendered if all(e.labels[-1] != IGNORED_LABEL for e in one)]
    counts = TokenCounts(
        examples=len(kept),
        truncated=sum(any(e.truncated for e in one) for one in kept),
        dropped=len(rendered) - len(kept),
        tokens=sum(len(e.input_ids) for one in kept for e in one),
        response_tokens=sum(label != IGNORED_LABEL for one in kept for e in one for label in e.labels),
    )
    if not kept:
        raise RPSAError(f"max_length {max_length} leaves nothing of {len(rendered)} examples: raise it")
    if counts.truncated or counts.dropped:
        log.warning(
            "max_length %s truncates %d of %d safety examples and drops %d whose prompt alone fills it",
            max_length, counts.truncated, len(rendered), counts.dropped,
        )  # fmt: skip
    return kept, counts


def contamination(
    examples: Sequence[SafetyExample], evaluation_prompts: Sequence[str]
) -> list[Contamination]:
    """Pairs of a training and an evaluation prompt with the same words, or with a run of eight in common.

    Case, punctuation and spacing do not count. Prompts that share a long preamble overlap too: the caller
    decides, by `share`, what to take out.
    """
    evaluation = [_words(prompt) for prompt in evaluation_prompts]
    holders: dict[tuple[str, ...], list[int]] = {}
    for index, words in enumerate(evaluation):
        for run in {tuple(words), *_runs(words)}:
            holders.setdefault(run, []).append(index)
    found = []
    for number, example in enumerate(examples):
        words = _words(example.prompt)
        runs = _runs(words)
        candidates = {index for run in {tuple(words), *runs} for index in holders.get(run, ())}
        for index in sorted(candidates):
            if evaluation[index] == words:
                found.append(Contamination(number, index, "exact", 1.0))
            elif shared := _runs(evaluation[index]) & runs:
                share = len(shared) / len(_runs(evaluation[index]))
                found.append(Contamination(number, index, "overlap", share))
    return found


def _load(
    source: str | Path, format: str, n: int | None, seed: int, thought: ThoughtFormat, benign: bool
) -> list[SafetyExample]:
    rows = read_rows(source)
    chosen = format_of(rows[0]) if format == "auto" else known_format(format)
    if benign and chosen == "direct_refusal":
        chosen = "prompt_response"
    return _drawn(source, [as_example(row, chosen, thought) for row in rows], n, seed)


def _drawn(source: str | Path, examples: list[OneExample], n: int | None, seed: int) -> list[OneExample]:
    random.Random(seed).shuffle(examples)
    if n is not None and not 1 <= n <= len(examples):
        raise RPSAError(f"{source} has {len(examples)} examples: ask for 1 to {len(examples)}, not {n}")
    return examples[:n]


def _rendered(
    examples: Sequence[Sequence[SafetyExample]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    thought: ThoughtFormat,
) -> Iterator[list[Example]]:
    """Each with all of its responses."""
    for number, responses in enumerate(examples):
        try:
            yield [render_example(tokenizer, e.prompt, e.response, max_length, thought) for e in responses]
        except RPSAError as error:
            raise RPSAError(f"safety example {number}: {error}") from error


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: list[str], length: int = 8) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
