"""How much is read and written: examples to train on, D_ref, the answers of the evaluation. Lengths are estimates.

Where a file is on this machine its own lengths count (text at 4 characters a token); elsewhere the assumptions below.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rpsa.recipe.schema import Cell, Evaluate, Recipe
from rpsa.recipe.sources import SHIPPED

CHARACTERS_PER_TOKEN = 4

# What a distilled 7B to 8B reasoning model writes, in tokens, and what it is asked how often.
RESPONSE_TOKENS = {"math": 4000, "request": 800, "tiny": 30}
_PROMPT_TOKENS = {"real": 200, "tiny": 30}
# A safety example with its prompt: a refusal after one constant sentence, or after a thought of its own.
_REFUSAL_TOKENS = 150
_THOUGHT_TOKENS = 900
_TEMPLATE_TOKENS = 5


@dataclass(frozen=True)
class Benchmark:
    problems: int
    samples: int
    response_tokens: int


BENCHMARKS = {
    "rpsa_aime24": Benchmark(30, 16, 12000),
    "rpsa_gpqa_main": Benchmark(448, 4, 6000),
    "rpsa_humaneval_plus": Benchmark(164, 4, 4000),
    "rpsa_mbpp_plus": Benchmark(378, 4, 3000),
    "rpsa_math500": Benchmark(400, 4, 4000),
    "rpsa_strongreject": Benchmark(313, 4, 800),
    "rpsa_wildjailbreak": Benchmark(250, 4, 800),
    "rpsa_xstest": Benchmark(450, 4, 800),
}


@dataclass(frozen=True)
class SafetyTokens:
    """Training examples after the held-out share (None: unknown), and tokens of a mean and of the longest one."""

    examples: int | None
    mean: int
    longest: int
    known: bool
    """Whether the lengths are those of the data."""


@dataclass(frozen=True)
class Responses:
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


def safety_tokens(cell: Cell, count_tokens: Callable[[str], int]) -> SafetyTokens:
    """What a run of the align stage trains on. Data on the hub are not fetched: `safety.n` says how many."""
    from rpsa.pipeline.stages import safety_data
    from rpsa.training.safety_data import hold_out

    safety = cell.safety
    assert safety is not None
    limit = safety.max_length or 1 << 20
    is_here = safety.data is not None and (safety.data in SHIPPED["safety"] or Path(safety.data).is_file())
    if is_here and (safety.benign is None or Path(safety.benign).is_file()):
        examples = safety_data(safety, cell.seed)
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


def reference_responses(recipe: Recipe) -> Responses:
    settings = recipe.reference
    expected = RESPONSE_TOKENS["tiny" if settings.problems == "tiny" else "math"]
    limit = settings.max_new_tokens
    return Responses("reference", settings.n, min(expected, limit), limit)


def evaluation_responses(settings: Evaluate) -> list[Responses]:
    """One entry a task: its problems times its samples."""
    return [_task_responses(task, settings) for task in settings.tasks]


def _task_responses(task: str, settings: Evaluate) -> Responses:
    limit = settings.max_new_tokens
    if task in BENCHMARKS:
        known = BENCHMARKS[task]
        count = min(known.problems, settings.n or known.problems) * known.samples
        return Responses(task, count, min(known.response_tokens, limit), limit)
    from rpsa.evaluation.tasks import load_task

    items = load_task(task, settings.n, settings.seed)
    kind = "tiny" if task == "tiny" else "math" if items[0].kind == "reasoning" else "request"
    return Responses(Path(task).stem, len(items), min(RESPONSE_TOKENS[kind], limit), limit)
