"""Time: rough hours on GPUs of a kind, from operations and bytes, good to a factor of two; and optimizer steps.

Operations of one token with N parameters: 2 N forward, 2 N for the gradient of activations, 2 N for that of weights
(not under LoRA), 2 N again where the forward pass is recomputed (6 N D and its variants). Generation reads all weights
and the cache for every token of a batch. Any pass takes some milliseconds at the least.

With everything else unchanged the number of GPUs decides how many steps there are, and so whether k ever moves.
"""

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


def compute_seconds(operations: float, gpu: Gpu, *, bf16: bool, gpus: int = 1) -> float:
    return operations / ((gpu.bf16 if bf16 else gpu.fp32) * UTILISATION * gpus)


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
