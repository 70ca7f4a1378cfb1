"""Time: rough hours on GPUs of a kind, good to a factor of two, from tokens and operations; and optimizer steps.

Tokens are those of the examples to train on, of D_ref and of the evaluation's answers. Where a file is on this machine
its own lengths count (text at 4 characters a token); elsewhere the assumptions below.

Operations of one token with N parameters: 2 N forward, 2 N for the gradient of activations, 2 N for that of weights
(not under LoRA), 2 N again where the forward pass is recomputed (6 N D and its variants). Generation reads all weights
and the cache for every token of a batch. Any pass takes some milliseconds at the least.

With everything else unchanged the number of GPUs decides how many steps there are, and so whether k ever moves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpsa.evaluation.benchmarks import BENCHMARKS, Kind, TaskOptions
from rpsa.evaluation.items import expanded, load_task
from rpsa.freezing.ratio import ConflictRatio
from rpsa.recipe.problems import SHIPPED
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import Evaluate, Safety
from rpsa.self_data.offers import Asked, prompts_of
from rpsa.thought import THINK, ThoughtFormat

CHARACTERS_PER_TOKEN = 4

# What a distilled 7B to 8B reasoning model writes, in tokens, and what it is asked how often.
RESPONSE_TOKENS = {"math": 4000, "request": 800, "tiny": 30}
_PROMPT_TOKENS = {"real": 200, "tiny": 30}
_OF_TINY = {source for kind in ("problems", "prompts") for source in SHIPPED[kind]}
# A safety example with its prompt: a refusal after one constant sentence, or after a thought of its own.
_REFUSAL_TOKENS = 150
_THOUGHT_TOKENS = 900
_TEMPLATE_TOKENS = 5


@dataclass(frozen=True)
class SafetyTokens:
    """Rows trained on: safety data without the held-out share, and D_ref's traces (None: unknown).

    `mean` and `longest` are tokens of one; of pairs, of both sequences together, and of the longest sequence.
    """

    examples: int | None
    mean: int
    longest: int
    known: bool
    """Whether the lengths are those of the data."""
    refusing: float | None = None
    """The share that refuses; None where the data are not here."""


@dataclass(frozen=True)
class ResponseTokens:
    """`count` responses of `tokens` each on average, at most `limit`."""

    name: str
    count: int
    tokens: int
    limit: int
    kind: Kind = "reasoning"
    judged: bool = False

    @property
    def total(self) -> int:
        return self.count * self.tokens


def prompt_tokens(source: str | None) -> int:
    return _PROMPT_TOKENS["tiny" if source in _OF_TINY else "real"]


def safety_tokens(
    cell: Cell, count_tokens: Callable[[str], int], thought: ThoughtFormat = THINK
) -> SafetyTokens:
    """What a run of the align stage trains on. Data on the hub are not fetched: `safety.n` says how many."""
    from rpsa.pipeline.alignment import complying_of, preference_data, refusing_share, safety_data
    from rpsa.safety_data import SafetyExample, hold_out

    safety = cell.safety
    assert safety is not None
    limit = safety.max_length or 1 << 20
    is_dpo = cell.trainer == "dpo"
    sequences = 2 if is_dpo else 1
    if safety.is_self_made:
        return _self_made_tokens(safety, cell.seed, limit)
    is_here = safety.data is not None and (safety.data in SHIPPED["safety"] or Path(safety.data).is_file())
    if is_here and (safety.benign is None or Path(safety.benign).is_file()):
        pairs = preference_data(safety, cell.seed, thought) if is_dpo else []
        examples: list[SafetyExample] = [*pairs] if is_dpo else safety_data(safety, cell.seed, thought)
        if safety.validation_share:
            examples, _ = hold_out(examples, safety.validation_share, cell.seed)
        said = [e.prompt + e.response for e in examples] + [e.prompt + e.rejected for e in pairs]
        lengths = [min(limit, count_tokens(text) + _TEMPLATE_TOKENS) for text in said]
        mean = sum(lengths) * sequences // len(lengths)
        refusing = refusing_share(examples, complying_of(examples, thought))
        return SafetyTokens(len(examples), mean, max(lengths), True, refusing)
    expected = _REFUSAL_TOKENS if safety.format == "direct_refusal" else _THOUGHT_TOKENS
    count = None
    if safety.n is not None:
        count = round(safety.n / (1 - safety.benign_share))
        count -= max(1, round(safety.validation_share * count)) if safety.validation_share else 0
    # of DirectRefusal it is known without a look
    share = 1.0 - safety.benign_share if safety.format == "direct_refusal" else None
    return SafetyTokens(count, sequences * min(limit, expected), limit, False, share)


def packed(safety: SafetyTokens, max_length: int) -> SafetyTokens:
    """The rows that examples are packed into, all of them full."""
    rows = None if safety.examples is None else -(-safety.examples * safety.mean // max_length)
    return replace(safety, examples=rows, mean=max_length, longest=max_length)


def _self_made_tokens(safety: Safety, seed: int, limit: int) -> SafetyTokens:
    """What the model would write if every request got a response that is kept."""
    asked = own_requests(safety, seed)
    tokens = RESPONSE_TOKENS["tiny" if safety.prompts == "tiny" else "request"]
    count = None if asked is None else min(len(asked), safety.n or len(asked))
    if count is not None and safety.validation_share:
        count -= max(1, round(safety.validation_share * count))
    refusing = None if asked is None else sum(one.kind == "harmful" for one in asked) / len(asked)
    return SafetyTokens(count, min(limit, prompt_tokens(safety.prompts) + tokens), limit, False, refusing)


def own_requests(safety: Safety, seed: int) -> list[Asked] | None:
    """What the model is asked for its own safety data; None where a file is not here: nothing is fetched."""
    sources = [source for source in (safety.prompts, safety.benign) if source is not None]
    if not all(source in SHIPPED["prompts"] or Path(source).is_file() for source in sources):
        return None
    return prompts_of(safety, safety.drawing_seed(seed))


def own_responses(recipe: Recipe, cell: Cell) -> ResponseTokens | None:
    """What one base samples for its own safety data; None where that is not known, or there are others."""
    if cell.safety is None or not cell.safety.is_self_made:
        return None
    asked, settings = own_requests(cell.safety, cell.seed), recipe.reference
    if asked is None:
        return None
    count = len(asked) * (1 if settings.temperature == 0 else cell.safety.per_prompt)
    expected = RESPONSE_TOKENS["tiny" if cell.safety.prompts == "tiny" else "request"]
    return ResponseTokens("safety", count, min(expected, settings.max_new_tokens), settings.max_new_tokens)


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
    expected = RESPONSE_TOKENS["tiny" if settings.problems in _OF_TINY else "math"]
    limit = settings.max_new_tokens
    return ResponseTokens("reference", settings.n, min(expected, limit), limit)


def held_out_responses(recipe: Recipe) -> ResponseTokens | None:
    """Those on which the reasoning loss is measured; of a file as many as the recipe asks for."""
    settings = recipe.reference
    if settings.problems is None or not settings.held_out:
        return None
    return replace(reference_responses(recipe), name="held out", count=settings.held_out)


def evaluation_responses(settings: Evaluate) -> list[ResponseTokens]:
    """One entry a task: its items times its samples."""
    return [_task_responses(task, settings) for task in expanded(settings.tasks)]


def attacked_responses(recipe: Recipe) -> list[ResponseTokens]:
    """What is asked again under each attack: requests, unless the recipe names tasks. No data are fetched."""
    if recipe.robustness is None:
        return []
    tasks = recipe.robustness.tasks
    if tasks is not None:
        return evaluation_responses(recipe.evaluate.model_copy(update={"tasks": tasks}))
    return [one for one in evaluation_responses(recipe.evaluate) if one.kind != "reasoning"]


def _task_responses(task: str, settings: Evaluate) -> ResponseTokens:
    limit = settings.max_new_tokens
    if known := BENCHMARKS.get(task):
        items = min(known.size, settings.n or known.size)
        samples = 1 if settings.temperature == 0 else settings.samples or known.samples
        return ResponseTokens(
            task, items * samples, min(known.tokens, limit), limit, known.kind, known.scorer == "judge"
        )
    asked = load_task(task, TaskOptions(settings.n, settings.seed))
    kind = "tiny" if "tiny" in task else "math" if asked[0].kind == "reasoning" else "request"
    samples = 1 if settings.temperature == 0 else settings.samples or 1
    return ResponseTokens(
        Path(task).stem,
        len(asked) * samples,
        min(RESPONSE_TOKENS[kind], limit),
        limit,
        next((item.kind for item in asked if item.scorer == "judge"), asked[0].kind),
        any(item.scorer == "judge" for item in asked),
    )


@dataclass(frozen=True)
class Steps:
    """`measurements` of g_R, 0 unless k is dynamic or gradients are projected.

    `dynamic_from` is the first step (from 0) whose k can leave 0.5.
    """

    sequences_per_step: int
    steps: int
    measurements: int
    dynamic_from: int | None

    @property
    def never_dynamic(self) -> bool:
        return self.dynamic_from is not None and self.steps <= self.dynamic_from


def count_steps(args: Any, examples: int, gpus: int) -> Steps:
    """The steps of a run on `examples` training examples, counted as `transformers.Trainer` counts them.

    `args` is the run's `SFTConfig`, `RPSAConfig` or `AlternativesConfig`.
    """
    batches = math.ceil(examples / args.per_device_train_batch_size)
    batches_per_gpu = math.ceil(batches / gpus)
    updates = max(1, math.ceil(batches_per_gpu / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus
    if getattr(args, "projection", None) in ("agem", "signs"):
        return Steps(sequences, steps, steps, None)
    ratio = args.ratio() if hasattr(args, "ratio") else None
    if not isinstance(ratio, ConflictRatio):
        return Steps(sequences, steps, 0, None)
    return Steps(sequences, steps, math.ceil(steps / ratio.every), ratio.first_dynamic_step)


def never_dynamic_warning(steps: Steps, gpus: int) -> str:
    assert steps.dynamic_from is not None
    return (
        f"on {gpus} GPU{'s' if gpus > 1 else ''} k stays at 0.5: {steps.steps} steps, and the first dynamic k "
        f"comes at step {steps.dynamic_from}; at least {steps.dynamic_from + 1} steps, or a smaller align.every "
        "or align.window"
    )


UTILISATION = 0.4
"""Share of the peak operations that training reaches (MFU)."""
BANDWIDTH_SHARE = 0.6
SECONDS_PER_PASS = 0.025
"""The least that one pass through a model takes, forward or backward, as its kernels are launched one by one."""


@dataclass(frozen=True)
class Gpu:
    """Dense peaks of a data sheet: operations a second in bf16 and in fp32, memory in GiB, bytes a second."""

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float


GPUS = (
    Gpu("H100", 989e12, 67e12, 80, 3.35e12),
    Gpu("A100", 312e12, 19.5e12, 80, 2.0e12),
    Gpu("4090", 165e12, 82.6e12, 24, 1.01e12),
)


def training_operations(parameters: int, tokens: int, *, lora: bool, checkpointing: bool) -> float:
    """A forward and a backward pass over `tokens`."""
    return (4 if lora else 6) * parameters * tokens + (2 * parameters * tokens if checkpointing else 0)


def fisher_operations(parameters: int, tokens: int, probes: int, *, lora: bool, checkpointing: bool) -> float:
    """A forward pass over D_ref and `probes` backward passes, each recomputing it under checkpointing."""
    backward = (2 if lora else 4) + (2 if checkpointing else 0)
    return (2 + probes * backward) * parameters * tokens


def operations_a_second(gpu: Gpu, precision: str) -> float:
    """Peak of products of matrices in "bf16", "tf32" (half as many) or "fp32"."""
    return {"bf16": gpu.bf16, "tf32": gpu.bf16 / 2, "fp32": gpu.fp32}[precision]


def compute_seconds(operations: float, gpu: Gpu, *, precision: str, gpus: int = 1) -> float:
    return operations / (operations_a_second(gpu, precision) * UTILISATION * gpus)


def launch_seconds(*, checkpointing: bool) -> float:
    """A forward pass, and a backward pass of twice its operations, on however few tokens."""
    return SECONDS_PER_PASS * (4 if checkpointing else 3)


def update_seconds(kept: int, gpu: Gpu) -> float:
    """One optimizer step or measurement reads and writes what a GPU keeps, in bytes."""
    return 2 * kept / (gpu.bandwidth * BANDWIDTH_SHARE)


def generation_seconds(tokens: int, batch: int, weights: int, cache: int, gpu: Gpu) -> float:
    """`tokens` in all, `batch` at once; `weights` and `cache` (the batch's mean) in bytes."""
    step = max(SECONDS_PER_PASS, (weights + cache) / (gpu.bandwidth * BANDWIDTH_SHARE))
    return tokens / batch * step
