"""Optimizer steps and conflict measurements, which the number of GPUs decides with everything else unchanged."""

import math
from dataclasses import dataclass
from typing import Any

from rpsa.freezing.ratio import ConflictRatio


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
    if getattr(args, "projection", None):
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
