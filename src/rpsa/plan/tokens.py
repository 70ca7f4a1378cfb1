"""Tokens read and written: examples to train on, D_ref, the answers of the evaluation. Lengths are estimates.

Where a file is on this machine its own lengths count (text at 4 characters a token); elsewhere the assumptions below.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rpsa.evaluation.benchmarks import BENCHMARKS, TaskOptions
from rpsa.evaluation.items import expanded, load_task
from rpsa.recipe.problems import SHIPPED
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import Evaluate
from rpsa.thought import THINK, ThoughtFormat

CHARACTERS_PER_TOKEN = 4

# What a distilled 7B to 8B reasoning model writes, in tokens, and what it is asked how often.
RESPONSE_TOKENS = {"math": 4000, "request": 800, "tiny": 30}
_PROMPT_TOKENS = {"real": 200, "tiny": 30}
# A safety example with its prompt: a refusal after one constant sentence, or after a thought of its own.
_REFUSAL_TOKENS = 150
_THOUGHT_TOKENS = 900
_TEMPLATE_TOKENS = 5


@dataclass(frozen=True)
class SafetyTokens:
    """Rows trained on: safety data without the held-out share, and D_ref's traces (None: unknown).

    `mean` and `longest` are tokens of one.
    """

    examples: int | None
    mean: int
    longest: int
    known: bool
    """Whether the lengths are those of the data."""


@dataclass(frozen=True)
class ResponseTokens:
    """`count` responses of `tokens` each on average, at most `limit`."""

    name: str
    count: int
    tokens: int
    limit: int

    @property
    def total(self) -> int:
        return self.count * self.tokens


def prompt_tokens(source: str | None) -> int:
    return _PROMPT_TOKENS["tiny" if source == "tiny" else "real"]


def safety_tokens(
    cell: Cell, count_tokens: Callable[[str], int], thought: ThoughtFormat = THINK
) -> SafetyTokens:
    """What a run of the align stage trains on. Data on the hub are not fetched: `safety.n` says how many."""
    from rpsa.pipeline.alignment import safety_data
    from rpsa.safety_data import hold_out

    safety = cell.safety
    assert safety is not None
    limit = safety.max_length or 1 << 20
    is_here = safety.data is not None and (safety.data in SHIPPED["safety"] or Path(safety.data).is_file())
    if is_here and (safety.benign is None or Path(safety.benign).is_file()):
        examples = safety_data(safety, cell.seed, thought)
        if safety.validation_share:
            examples, _ = hold_out(examples, safety.validation_share, cell.seed)
        lengths = [min(limit, count_tokens(e.prompt + e.response) + _TEMPLATE_TOKENS) for e in examples]
        return SafetyTokens(len(examples), sum(lengths) // len(lengths), max(lengths), True)
    expected = _REFUSAL_TOKENS if safety.format == "direct_refusal" else _THOUGHT_TOKENS
    count = None
    if safety.n is not None:
        count = round(safety.n / (1 - safety.benign_share))
        count -= max(1, round(safety.validation_share * count)) if safety.validation_share else 0
    return SafetyTokens(count, min(limit, expected), limit, False)


def with_rehearsal(safety: SafetyTokens, cell: Cell, recipe: Recipe) -> SafetyTokens:
    """The same with as many traces of D_ref as the cell rehearses, which are cut like the safety data."""
    assert cell.alternatives is not None
    assert cell.safety is not None
    share, limit = cell.alternatives.rehearsal_share, cell.safety.max_length or 1 << 20
    prompt, responses = prompt_tokens(recipe.reference.problems), reference_responses(recipe)
    mean, longest = min(limit, prompt + responses.tokens), min(limit, prompt + responses.limit)
    return replace(
        safety,
        examples=None if safety.examples is None else round(safety.examples / (1 - share)),
        mean=round((1 - share) * safety.mean + share * mean),
        longest=max(safety.longest, longest),
    )


def reference_responses(recipe: Recipe) -> ResponseTokens:
    settings = recipe.reference
    expected = RESPONSE_TOKENS["tiny" if settings.problems == "tiny" else "math"]
    limit = settings.max_new_tokens
    return ResponseTokens("reference", settings.n, min(expected, limit), limit)


def evaluation_responses(settings: Evaluate) -> list[ResponseTokens]:
    """One entry a task: its items times its samples."""
    return [_task_responses(task, settings) for task in expanded(settings.tasks)]


def _task_responses(task: str, settings: Evaluate) -> ResponseTokens:
    limit = settings.max_new_tokens
    if known := BENCHMARKS.get(task):
        items = min(known.size, settings.n or known.size)
        samples = 1 if settings.temperature == 0 else settings.samples or known.samples
        return ResponseTokens(task, items * samples, min(known.tokens, limit), limit)
    asked = load_task(task, TaskOptions(settings.n, settings.seed))
    kind = "tiny" if "tiny" in task else "math" if asked[0].kind == "reasoning" else "request"
    return ResponseTokens(Path(task).stem, len(asked), min(RESPONSE_TOKENS[kind], limit), limit)
