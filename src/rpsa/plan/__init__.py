"""`rpsa plan`: what a recipe needs, from configs alone: memory by part, steps, tokens, rough hours. No weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpsa.errors import RPSAError
from rpsa.recipe.schema import Cell, Recipe

if TYPE_CHECKING:
    from rpsa.plan.memory import Sharding, StageMemory
    from rpsa.plan.steps import Steps
    from rpsa.plan.tokens import Responses, SafetyTokens

__all__ = ["Layout", "MethodPlan", "Plan", "SingleGpuStage", "TrainingTime", "make_plan"]

_GIB = 1 << 30
_CONTEXT_BYTES = _GIB
_FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Layout:
    """The align stage of a method on some GPUs."""

    gpus: int
    sharding: "Sharding"
    memory: "StageMemory"
    fits: bool
    steps: "Steps | None"
    """None where the number of training examples is unknown."""


@dataclass(frozen=True)
class SingleGpuStage:
    """A stage that one GPU does: generation of D_ref, the Fisher, generation for the evaluation."""

    stage: str
    memory: "StageMemory"
    fits: bool
    seconds: dict[str, float]
    """By GPU name, on one GPU; only where it fits in that GPU's memory."""


@dataclass(frozen=True)
class TrainingTime:
    """One run on the fewest GPUs of a kind that hold it."""

    gpus: int
    seconds: float


@dataclass(frozen=True)
class MethodPlan:
    """One method on one base. `measurement_cost`: what measuring c once costs, in steps; None if it never does."""

    base: str
    method: str
    cell: Cell
    parameters: int
    trainable: int
    dtype: str
    safety: "SafetyTokens"
    layouts: list[Layout]
    measurement_cost: float | None
    training: "dict[str, TrainingTime]"
    """By GPU name; only where one of the numbers of GPUs holds it."""
    runs: int
    """Cells of the matrix with this method and base: its seeds and the points of the grid."""


@dataclass(frozen=True)
class Plan:
    name: str
    gpu_memory: float
    parameters: dict[str, int]
    methods: list[MethodPlan]
    stages: dict[str, list[SingleGpuStage]]
    """By base."""
    reference: "Responses | None"
    evaluation: "list[Responses]"
    evaluated: int
    """Models that answer the evaluation."""
    warnings: list[str]


def make_plan(recipe: Recipe, gpu_memory: float = 80, gpus: Sequence[int] = (1, 2, 4, 8)) -> Plan:
    """Plan a checked recipe for GPUs of `gpu_memory` GiB, with 1 GiB and 5% left to CUDA and fragmentation.

    Raises:
        RPSAError: a model's config is not to be had, or the recipe's settings contradict each other.
    """
    from rpsa.plan.base import plan_base
    from rpsa.plan.tokens import evaluation_responses, reference_responses

    if gpu_memory <= 0 or not gpus or min(gpus) < 1:
        raise RPSAError("--gpu-memory is GiB greater than 0, --gpus one or more numbers such as 1,2,4")
    methods: list[MethodPlan] = []
    stages: dict[str, list[SingleGpuStage]] = {}
    parameters: dict[str, int] = {}
    for base in recipe.bases:
        found = plan_base(recipe, base, gpus, fits_on(gpu_memory))
        methods += found.methods
        stages[base] = found.stages
        parameters[base] = found.parameters
    cells = recipe.cells()
    is_frozen = any(cell.align for cell in cells)
    return Plan(
        name=recipe.name,
        gpu_memory=gpu_memory,
        parameters=parameters,
        methods=methods,
        stages=stages,
        reference=reference_responses(recipe) if is_frozen else None,
        evaluation=evaluation_responses(recipe.evaluate),
        evaluated=len(cells),
        warnings=_warnings(methods, stages),
    )


def fits_on(gpu_memory: float) -> Callable[[int], bool]:
    return lambda total: total * (1 + _FRAGMENTATION) + _CONTEXT_BYTES <= gpu_memory * _GIB


def _warnings(methods: list[MethodPlan], stages: dict[str, list[SingleGpuStage]]) -> list[str]:
    from rpsa.plan.steps import never_dynamic_warning

    warnings = []
    for base, found in stages.items():
        warnings += [
            f"{base}: stage {s.stage} does not fit on one GPU{_advice(s.stage)}" for s in found if not s.fits
        ]
    for method in methods:
        where = f"{method.method} on {method.base}"
        if not any(layout.fits for layout in method.layouts):
            warnings.append(f"{where}: fits on none of these numbers of GPUs")
        for layout in method.layouts:
            if layout.steps and layout.steps.never_dynamic:
                warnings.append(f"{where}: {never_dynamic_warning(layout.steps, layout.gpus)}")
        if method.safety.examples is None:
            warnings.append(
                f"{where}: steps unknown; set safety.n, or give safety.data a file on this machine"
            )
    return warnings


def _advice(stage: str) -> str:
    if stage.startswith("Fisher"):
        return ": set fisher.activation_checkpointing, a smaller fisher.batch_size or reference.reference_max_length"
    section = "reference" if stage.startswith("reference") else "evaluate"
    return f": lower {section}.batch_size or {section}.max_new_tokens"
