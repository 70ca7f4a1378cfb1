"""What a plan says, as values: bytes, seconds, counts."""

from dataclasses import dataclass

from rpsa.plan.memory import Sharding, StageMemory
from rpsa.plan.steps import Steps
from rpsa.plan.tokens import Responses, SafetyTokens


@dataclass(frozen=True)
class Layout:
    """The align stage of a method on some GPUs."""

    gpus: int
    sharding: Sharding
    memory: StageMemory
    fits: bool
    steps: Steps | None
    """None where the number of training examples is unknown."""


@dataclass(frozen=True)
class SingleGpuStage:
    """A stage that one GPU does: generation of D_ref, the Fisher, generation for the evaluation."""

    stage: str
    memory: StageMemory
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
    parameters: int
    trainable: int
    dtype: str
    safety: SafetyTokens
    layouts: list[Layout]
    measurement_cost: float | None
    training: dict[str, TrainingTime]
    """By GPU name; only where one of the numbers of GPUs holds it."""
    runs: int
    """Cells of the matrix with this method and base: its seeds and the points of the grid."""


@dataclass(frozen=True)
class Plan:
    name: str
    gpu_memory: float
    parameters: dict[str, int]
    thoughts: dict[str, str | None]
    """What sets the thoughts of each base apart; None where its chat template is not on this machine."""
    methods: list[MethodPlan]
    stages: dict[str, list[SingleGpuStage]]
    """By base."""
    reference: Responses | None
    evaluation: list[Responses]
    evaluated: int
    """Models that answer the evaluation."""
    warnings: list[str]
