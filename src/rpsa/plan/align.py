"""The align stage of every method on a base: memory on each number of GPUs, steps, time."""

from dataclasses import dataclass, replace
from typing import Any

from rpsa.pipeline.models import alignment_dtype
from rpsa.pipeline.trainers import training_arguments
from rpsa.plan.base import Base
from rpsa.plan.dry_run import Precision, Shape
from rpsa.plan.memory import (
    AlignMemory,
    Freezing,
    Instead,
    Passes,
    Sharding,
    align_memory,
    dry_passes,
    sharded_passes,
)
from rpsa.plan.result import Layout, MethodPlan, TrainingTime
from rpsa.plan.steps import count_steps
from rpsa.plan.time import GPUS, compute_seconds, launch_seconds, training_operations, update_seconds
from rpsa.plan.tokens import SafetyTokens, safety_tokens, with_rehearsal
from rpsa.recipe.schema import Cell
from rpsa.recipe.sections import Align
from rpsa.thought import THINK


def plan_methods(base: Base) -> list[MethodPlan]:
    """One plan a method, that of its first cell: seeds do not matter, and of a grid the first point stands for all."""
    planner = _Planner(base)
    first = {cell.method: cell for cell in reversed(base.cells) if cell.paradigm != "none"}
    cells = reversed(first.values())
    return [planner.method(cell, sum(c.method == cell.method for c in base.cells)) for cell in cells]


@dataclass(frozen=True)
class _DryRun:
    """One configuration of the align stage: `args` are its SFTConfig or RPSAConfig."""

    cell: Cell
    args: Any
    model: Any
    shape: Shape

    @property
    def accumulated(self) -> bool:
        return bool(self.args.gradient_accumulation_steps > 1)


class _Planner:
    """Dry runs with the same settings are done once."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._passes: dict[str, Passes] = {}

    def method(self, cell: Cell, runs: int) -> MethodPlan:
        # bf16 is refused on a machine without a GPU, but not for the CPU
        on_cpu = replace(cell, train={**cell.train, "use_cpu": True})
        args = training_arguments(self.base.recipe, on_cpu, self.base.recipe.folder, quiet=True)
        dtype = alignment_dtype(cell, self.base.recipe.model)
        safety = safety_tokens(cell, self.base.count_tokens, self.base.thought or THINK)
        if cell.alternatives and cell.alternatives.rehearsal_share:
            safety = with_rehearsal(safety, cell, self.base.recipe)
        freezing = _freezing(args, cell.align) if cell.align else None
        model = self.base.model(dtype, cell.lora)
        run = _DryRun(cell, args, model, Shape(args.per_device_train_batch_size, safety.longest))
        instead = _instead(args) if cell.alternatives and not cell.align else None
        memory = align_memory(model, self._passes_of(run), str(args.optim.value), freezing, instead)
        layouts = [self._layout(run, memory, gpus, safety) for gpus in self.base.gpus]
        return MethodPlan(
            base=self.base.name,
            method=cell.method,
            parameters=memory.parameters,
            trainable=memory.trainable,
            dtype=dtype,
            safety=safety,
            layouts=layouts,
            measurement_cost=self._measurement_cost(safety) if _measures_g_r(cell) else None,
            training=self._training_times(run, memory, layouts, safety),
            runs=runs,
        )

    def _passes_of(self, run: _DryRun, *, sharded: bool = False) -> Passes:
        precision = Precision(bool(run.args.bf16), _checkpoints(run.args))
        reference = self._reference_shape(run)
        dtype = next(run.model.parameters()).dtype
        share = _trained_share(run.args) if run.cell.align and not sharded else None
        key = repr(
            (sharded, dict(run.cell.lora), dtype, run.shape, reference, precision, run.accumulated, share)
        )
        if key not in self._passes:
            if sharded:
                lean = self.base.model("bfloat16" if precision.bf16 else "float32", run.cell.lora)
                self._passes[key] = sharded_passes(lean, run.shape, reference, precision)
            else:
                self._passes[key] = dry_passes(
                    run.model, run.shape, reference, precision, share, accumulated=run.accumulated
                )
        return self._passes[key]

    def _reference_shape(self, run: _DryRun) -> Shape | None:
        """g_R's batch, if any method of this paradigm measures it: the methods then share their dry runs."""
        same = [c for c in self.base.cells if c.paradigm == run.cell.paradigm]
        if not any(_measures_g_r(c) for c in same):
            return None
        return Shape(run.shape.sequences, self.base.reference_tokens)

    def _layout(self, run: _DryRun, memory: AlignMemory, gpus: int, safety: SafetyTokens) -> Layout:
        """DDP where it fits, as it is simpler and faster; FSDP2 otherwise."""
        sharding: Sharding = "DDP" if gpus > 1 else "one GPU"
        stage = memory.on(gpus, sharding)
        if gpus > 1 and not stage.fits(self.base.gpu_memory):
            sharding = "FSDP2"
            stage = replace(memory, passes=self._passes_of(run, sharded=True)).on(gpus, sharding)
        steps = count_steps(run.args, safety.examples, gpus) if safety.examples else None
        return Layout(gpus, sharding, stage, stage.fits(self.base.gpu_memory), steps)

    def _measurement_cost(self, safety: SafetyTokens) -> float:
        """g_R takes as many sequences as a step: what differs is how long they are."""
        return self.base.mean_reference_tokens / safety.mean

    def _training_times(
        self, run: _DryRun, memory: AlignMemory, layouts: list[Layout], safety: SafetyTokens
    ) -> dict[str, TrainingTime]:
        times = {}
        for gpu in GPUS:
            layout = next((layout for layout in layouts if layout.memory.fits(gpu.memory)), None)
            if layout is None or layout.steps is None:
                continue
            steps = layout.steps
            sequences = steps.sequences_per_step
            cost = self._measurement_cost(safety) if steps.measurements else 0
            operations = training_operations(
                memory.parameters,
                int((steps.steps + steps.measurements * cost) * sequences * safety.mean),
                lora=run.cell.paradigm == "lora",
                checkpointing=_checkpoints(run.args),
            )
            compute = compute_seconds(operations, gpu, bf16=bool(run.args.bf16), gpus=layout.gpus)
            updates = steps.steps + steps.measurements
            passes = updates * run.args.gradient_accumulation_steps
            launch = passes * launch_seconds(checkpointing=_checkpoints(run.args))
            kept = sum(layout.memory.kept.values())
            seconds = max(compute, launch) + updates * update_seconds(kept, gpu)
            times[gpu.name] = TrainingTime(layout.gpus, seconds)
        return times


def _measures_g_r(cell: Cell) -> bool:
    projects = cell.alternatives is not None and cell.alternatives.projection is not None
    return projects or (cell.align is not None and cell.align.frozen_ratio in ("dynamic", "noise"))


def _instead(args: Any) -> Instead | None:
    """None where only the data are different."""
    if not hasattr(args, "penalty"):
        return None
    return Instead(penalty=args.penalty, projection=args.projection is not None)


def _freezing(args: Any, align: Align) -> Freezing:
    return Freezing(
        dynamic=args.frozen_ratio in ("dynamic", "noise"),
        raw_moments=args.frozen_moments == "raw",
        gradient_only=args.gradient_only,
        audit=args.audit,
        compact=_trained_share(args),
        compact_shards=bool(align.compact),
    )


def _trained_share(args: Any) -> float | None:
    """What compact training trains of the elements: all of them where k may become 0. None if it is not compact."""
    if not getattr(args, "compact", False):
        return None
    return 1.0 if args.frozen_ratio in ("dynamic", "noise") else 1 - args.frozen_ratio


def _checkpoints(args: Any) -> bool:
    """Newer versions of transformers have a new name for it."""
    return bool(getattr(args, "activation_checkpointing", args.gradient_checkpointing))
