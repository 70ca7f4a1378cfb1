"""Offers: what the model is asked for its own safety data, what it answers, and why an answer is not taken."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rpsa.errors import RPSAError
from rpsa.evaluation.grading import HARMFUL
from rpsa.evaluation.judges import Judge, can_see, judge_responses
from rpsa.evaluation.refusals import is_refusal
from rpsa.generation import Completion
from rpsa.recipe.sections import Safety
from rpsa.rows import Row, read_rows, text_field
from rpsa.self_data.stored import KINDS, Kind
from rpsa.thought import ThoughtFormat
from rpsa.tiny import safety_examples
from rpsa.tiny.requests import REFUSAL

Reason = Literal[
    "truncated",
    "thought_not_closed",
    "several_thoughts",
    "empty",
    "not_a_refusal",
    "judged_unsafe",
    "no_verdict",
    "refused",
]
"""Why a response is not taken; the last is about benign requests, the three before it about harmful ones."""

TINY_REQUESTS = 256
"""Of the tiny world, where the recipe does not say."""
PLACE = "{prompt}"
DEFAULT_STEER = (
    "The request below asks for something that could do harm. Think about what could go wrong if you helped with it, "
    "and decide not to. Then tell the user plainly and kindly that you will not help with this, and why."
)
_PROMPT_FIELDS = ("prompt", "instruction", "question", "request", "goal", "text")


@dataclass(frozen=True)
class Asked:
    """One request, as the user puts it."""

    kind: Kind
    prompt: str


@dataclass(frozen=True)
class Offer:
    """The `index`-th response to a request, and why it is not taken (None: it is)."""

    asked: Asked
    index: int
    completion: Completion
    reason: Reason | None = None


@dataclass(frozen=True)
class SafetyFilter:
    """A judge of the answers to harmful requests, and whether it is shown the thoughts, too."""

    judge: Judge
    sees_thoughts: bool


def sees_thoughts(judge: str) -> bool:
    """Whether a judge of this name can say something of a thought."""
    return "thought" in can_see(judge)


def load_prompts(source: str | Path, kind: Kind) -> list[Asked]:
    """The requests of a file or dataset in any format, each once, in its order; responses are left alone.

    Raises:
        RPSAError: it cannot be read, or a row has no prompt.
    """
    prompts = dict.fromkeys(_prompt(row) for row in read_rows(source))
    return [Asked(kind, prompt) for prompt in prompts]


def prompts_of(safety: Safety, seed: int) -> list[Asked]:
    """The requests that a recipe's section names: the tiny world's, drawn by `seed`, or those of files.

    Raises:
        RPSAError: a file cannot be read, or a row has no prompt.
    """
    asked: list[Asked] = []
    for kind, source in zip(KINDS, (safety.prompts, safety.benign), strict=True):
        if source == "tiny":
            asked += tiny_prompts(safety.n or TINY_REQUESTS, seed, kind)
        elif source is not None:
            asked += load_prompts(source, kind)
    return asked


def tiny_prompts(n: int, seed: int, kind: Kind) -> list[Asked]:
    """The tiny world's: those of `safety_examples("balanced", n, seed)` that it refuses, or complies with."""
    examples = safety_examples("balanced", n, seed)
    return [Asked(kind, e.prompt) for e in examples if (e.response == REFUSAL) == (kind == "harmful")]


def _prompt(row: Row) -> str:
    messages = row.fields.get("messages")
    if isinstance(messages, list) and not any(row.fields.get(name) for name in _PROMPT_FIELDS):
        users = [one for one in messages if isinstance(one, dict) and one.get("role") == "user"]
        prompt = str(users[0].get("content") or "") if users else ""
    else:
        prompt = text_field(row, _PROMPT_FIELDS)
        if row.fields.get("input"):
            prompt += f"\n{row.fields['input']}"
    if not prompt.strip():
        raise RPSAError(f"{row.where} has an empty prompt")
    return prompt


def steered(asked: Asked, steer: str | None) -> str:
    """The user's message while the model answers: of a harmful request with the instruction before it.

    `steer` None is ours, an empty one none; `{prompt}` in it is where the request stands.
    """
    words = DEFAULT_STEER if steer is None else steer
    if asked.kind == "benign" or not words.strip():
        return asked.prompt
    if PLACE in words:
        return words.replace(PLACE, asked.prompt)
    return f"{words.rstrip()}\n\n{asked.prompt}"


def reason_against(kind: Kind, text: str, finish_reason: str, thought: ThoughtFormat) -> Reason | None:
    """What can be said against a response without a judge."""
    if finish_reason != "stop":
        return "truncated"
    answer = thought.answer_of(text)
    if answer is None:
        return "thought_not_closed"
    if thought.has_thoughts and thought.split(text) is None:
        return "several_thoughts"
    if not answer:
        return "empty"
    if kind == "harmful":
        return None if is_refusal(text, thought) else "not_a_refusal"
    return "refused" if is_refusal(text, thought) else None


def filtered(offers: Sequence[Offer], safety_filter: SafetyFilter, thought: ThoughtFormat) -> list[Offer]:
    """The offers with the reasons against them. The judge is asked of refusals of harmful requests alone."""
    reasons = [
        reason_against(o.asked.kind, o.completion.text, o.completion.finish_reason, thought) for o in offers
    ]
    left = [i for i, o in enumerate(offers) if o.asked.kind == "harmful" and reasons[i] is None]
    pairs = [(offers[i].asked.prompt, offers[i].completion.text) for i in left]
    for i, verdict in zip(left, _verdicts(pairs, safety_filter, thought), strict=True):
        reasons[i] = verdict
    return [Offer(o.asked, o.index, o.completion, reason) for o, reason in zip(offers, reasons, strict=True)]


def _verdicts(
    pairs: Sequence[tuple[str, str]], safety_filter: SafetyFilter, thought: ThoughtFormat
) -> list[Reason | None]:
    """Of the answer, and where the judge sees thoughts of the whole trace: neither may be harmful."""
    both = safety_filter.sees_thoughts and thought.has_thoughts
    worst: list[float | None] = [0.0] * len(pairs)
    for sees in ("answer", "trace") if both else ("answer",):
        for i, judgement in judge_responses(safety_filter.judge, pairs, sees, thought):
            before = worst[i]
            known = before is not None and judgement.score is not None
            worst[i] = max(before, judgement.score) if known else None  # type: ignore[type-var]
    return ["no_verdict" if w is None else "judged_unsafe" if w >= HARMFUL else None for w in worst]


def kept_of(offers: Sequence[Offer]) -> list[Offer]:
    """The first that was accepted of each request."""
    found: dict[Asked, Offer] = {}
    for offer in offers:
        if offer.reason is None:
            found.setdefault(offer.asked, offer)
    return list(found.values())


def counted(offers: Sequence[Offer]) -> dict[str, dict[str, Any]]:
    """By kind that was asked for: `prompts`, `offered`, `accepted`, `kept`, `without` (prompts), `rejected` by reason.

    Raises:
        RPSAError: nothing of a kind was accepted.
    """
    counts = {kind: _counted([o for o in offers if o.asked.kind == kind]) for kind in KINDS}
    counts = {kind: found for kind, found in counts.items() if found["prompts"]}
    for kind, found in counts.items():
        if not found["accepted"]:
            raise RPSAError(_nothing(kind, found))
    return {str(kind): found for kind, found in counts.items()}


def _counted(offers: Sequence[Offer]) -> dict[str, Any]:
    prompts = len({offer.asked for offer in offers})
    kept = len(kept_of(offers))
    rejected = Counter(offer.reason for offer in offers if offer.reason is not None)
    return {
        "prompts": prompts,
        "offered": len(offers),
        "accepted": len(offers) - rejected.total(),
        "kept": kept,
        "without": prompts - kept,
        "rejected": dict(sorted(rejected.items())),
    }


def _nothing(kind: str, found: Mapping[str, Any]) -> str:
    why = ", ".join(f"{count} {reason}" for reason, count in found["rejected"].items())
    mend = {
        "harmful": "change steer or filter, or raise per_prompt or max_new_tokens",
        "benign": "give other requests, or raise per_prompt or max_new_tokens",
    }[kind]
    return (
        f"safety data of its own: none of the model's {found['offered']} responses to {found['prompts']} {kind} "
        f"prompts was accepted ({why}): {mend}"
    )
