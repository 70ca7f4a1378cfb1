"""Aligning: the align stage of every method: its memory on so many GPUs, its steps, its time."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rpsa.alternatives.product import lora_updates
from rpsa.models import alignment_dtype
from rpsa.pipeline.alignment import training_arguments
from rpsa.plan.bases import Base
from rpsa.plan.dry_run import Precision, Shape
from rpsa.plan.layers import Skeleton
from rpsa.plan.memory import (
    AlignMemory,
    Freezing,
    Instead,
    Passes,
    Sharding,
    align_memory,
    dry_passes,
    sharded_passes,
    weights_bytes,
)
from rpsa.plan.render import Layout, MethodPlan, TrainingTime
from rpsa.plan.time import (
    GPUS,
    UTILISATION,
    Gpu,
    SafetyTokens,
    compute_seconds,
    count_steps,
    held_out_responses,
    launch_seconds,
    operations_a_second,
    packed,
    safety_tokens,
    training_operations,
    update_seconds,
    with_rehearsal,
)
from rpsa.plan.totals import Work
from rpsa.recipe.schema import Cell
from rpsa.recipe.sections import Align
from rpsa.thought import THINK


def method_plans(base: Base) -> list[MethodPlan]:
    """One plan a method, that of its first cell: seeds do not matter, and of a grid the first point stands for all."""
    planner = _Planner(base)
    first = {cell.method: cell for cell in reversed(base.cells) if cell.paradigm != "none"}
    cells = reversed(first.values())
    return [planner.method(cell, sum(c.method == cell.method for c in base.cells)) for cell in cells]


@dataclass(frozen=True)
class _DryRun:
    """One configuration of the align stage: `args` are its trainer's config."""

    cell: Cell
    args: Any
    skeleton: Skeleton
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
        args = training_arguments(self.base.recipe, on_cpu, self.base.recipe.folder)
        dtype = alignment_dtype(cell, self.base.recipe.model)
        safety = safety_tokens(cell, self.base.count_tokens, self.base.thought or THINK)
        if cell.alternatives and cell.alternatives.rehearsal_share:
            safety = with_rehearsal(safety, cell, self.base.recipe)
        if getattr(args, "packing", False) and args.max_length:
            safety = packed(safety, args.max_length)
        freezing = _freezing(args, cell.align) if cell.align else None
        skeleton = self.base.skeleton(dtype, cell.lora)
        model = skeleton.model
        sequences = args.per_device_train_batch_size * (2 if cell.trainer == "dpo" else 1)
        run = _DryRun(cell, args, skeleton, Shape(sequences, safety.longest))
        instead = _instead(args, model) if cell.alternatives and not cell.align else None
        memory = replace(
            align_memory(model, self._passes_of(run), str(args.optim.value), freezing, instead),
            anchored=_is_anchored(cell),
            reference=weights_bytes(skeleton) if _keeps_reference(cell, args) else 0,
        )
        layouts = [self._layout(run, memory, gpus, safety) for gpus in self.base.gpus]
        times = self._training_times(run, memory, layouts, safety)
        arithmetic = self._arithmetic(run, memory, layouts, safety)
        return MethodPlan(
            base=self.base.name,
            method=cell.method,
            parameters=memory.parameters,
            trainable=memory.trainable,
            dtype=dtype,
            safety=safety,
            layouts=layouts,
            measurement_cost=self._measurement_cost(safety) if _measures_g_r(cell) else None,
            training={gpu: TrainingTime(*next(iter(of.items()))) for gpu, of in times.items() if of},
            runs=runs,
            saved_bytes=memory.trainable_bytes,
            checkpoint_bytes=_checkpoint_bytes(args, memory),
            checkpoints=_checkpoints_at_once(args, layouts[0]),
            is_adapter=cell.paradigm == "lora",
            work=Work("align", f"{self.base.name}: {cell.method}", runs, times, arithmetic),
        )

    def _passes_of(self, run: _DryRun, *, sharded: bool = False) -> Passes:
        """Of the step with what is particular to the run, and of g_R, which is the same with and without it."""
        share = _trained_share(run.args) if run.cell.align and not sharded else None
        training = self._dry_run(run, None, share, sharded=sharded)
        reference = self._reference_shape(run)
        reasoning = self._dry_run(run, reference, None, sharded=sharded).reasoning if reference else 0
        return replace(training, reasoning=reasoning)

    def _dry_run(
        self, run: _DryRun, reference: Shape | None, share: float | None, *, sharded: bool
    ) -> Passes:
        precision = Precision(bool(run.args.bf16), _checkpoints(run.args))
        dtype = next(run.skeleton.model.parameters()).dtype
        lora, accumulated = dict(run.cell.lora), run.accumulated and not sharded
        key = repr((sharded, lora, dtype, run.shape, reference, precision, accumulated, share))
        if key not in self._passes:
            shape = None if reference else run.shape
            if sharded:
                lean = self.base.skeleton("bfloat16" if precision.bf16 else "float32", lora)
                self._passes[key] = sharded_passes(lean, shape, reference, precision)
            else:
                self._passes[key] = dry_passes(
                    run.skeleton, shape, reference, precision, share, accumulated=accumulated
                )
        return self._passes[key]

    def _reference_shape(self, run: _DryRun) -> Shape | None:
        """g_R's batch, if any method of this paradigm measures it: the methods then share their dry runs."""
        same = [c for c in self.base.cells if c.paradigm == run.cell.paradigm]
        if not any(_measures_g_r(c) or _is_anchored(c) for c in same):
            return None
        return Shape(run.args.per_device_train_batch_size, self.base.reference_tokens)

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
    ) -> dict[str, dict[int, float]]:
        """Seconds of one run by kind and number of GPUs, where it fits."""
        return {
            gpu.name: {
                layout.gpus: self._training(run, memory, layout, safety, gpu).seconds
                for layout in layouts
                if layout.memory.fits(gpu.memory) and layout.steps
            }
            for gpu in GPUS
        }

    def _training(
        self, run: _DryRun, memory: AlignMemory, layout: Layout, safety: SafetyTokens, gpu: Gpu
    ) -> "_Training":
        steps, args = layout.steps, run.args
        assert steps
        sequences, checkpointing = steps.sequences_per_step, _checkpoints(args)
        is_lora = run.cell.paradigm == "lora"
        cost = self._measurement_cost(safety) if steps.measurements else 0
        trained = steps.steps * sequences * safety.mean
        measured = int(steps.measurements * cost * sequences * safety.mean)
        anchored = steps.steps * sequences * self._anchor_tokens(run.cell, safety)
        looked_at = self._evaluated_tokens(run, steps.steps, safety)
        tokens = trained + measured + anchored
        operations = training_operations(memory.parameters, tokens, lora=is_lora, checkpointing=checkpointing)
        compared = trained if run.cell.trainer == "dpo" else 0  # with what the model said before training
        operations += 2.0 * memory.parameters * (looked_at + compared)
        precision = "bf16" if args.bf16 else "fp32"
        compute = compute_seconds(operations, gpu, precision=precision, gpus=layout.gpus)
        updates = steps.steps + steps.measurements
        passes = updates + (steps.steps if anchored else 0)
        launch = passes * args.gradient_accumulation_steps * launch_seconds(checkpointing=checkpointing)
        moved = updates * update_seconds(sum(layout.memory.kept.values()), gpu)
        said = (
            f"on {layout.gpus}: {operations:.3g} operations of {memory.parameters / 1e9:.2f}B parameters on "
            f"{trained / 1e6:.2f}M tokens"
            + (f", {measured / 1e6:.2f}M of g_R" if measured else "")
            + (f", {anchored / 1e6:.2f}M of the anchor" if anchored else "")
            + (f", {compared / 1e6:.2f}M read by the reference model" if compared else "")
            + (f", {looked_at / 1e6:.2f}M looked at in between" if looked_at else "")
            + f" / ({layout.gpus} × {operations_a_second(gpu, precision) / 1e12:.0f} TFLOP/s × {UTILISATION:.0%}): "
            f"{compute / 60:.1f} min, at least {launch / 60:.1f} min for {passes:,} passes; and {updates:,} updates "
            f"of {sum(layout.memory.kept.values()) / 2**30:.1f} GiB: {moved / 60:.1f} min"
        )
        return _Training(max(compute, launch) + moved, said)

    def _arithmetic(
        self, run: _DryRun, memory: AlignMemory, layouts: list[Layout], safety: SafetyTokens
    ) -> list[str]:
        gpu = self.base.gpu
        fitting = [layout for layout in layouts if layout.steps and layout.memory.fits(gpu.memory)]
        return [self._training(run, memory, layout, safety, gpu).arithmetic for layout in fitting]

    def _anchor_tokens(self, cell: Cell, safety: SafetyTokens) -> int:
        """Tokens of a sequence of an anchor's own pass, which every step has; 0 without one."""
        if not _is_anchored(cell):
            return 0
        assert cell.alternatives
        reference = self.base.mean_reference_tokens
        benign = safety.mean
        return {"reference": reference, "benign": benign}.get(
            cell.alternatives.anchor, (reference + benign) // 2
        )

    def _evaluated_tokens(self, run: _DryRun, steps: int, safety: SafetyTokens) -> int:
        """Tokens of held-out rows and responses that are looked at while it is trained."""
        if not run.cell.evaluates_in_training or safety.examples is None:
            return 0
        assert run.cell.safety
        share = run.cell.safety.validation_share
        rows = round(safety.examples * share / (1 - share)) * safety.mean
        held_out = held_out_responses(self.base.recipe)
        rows += held_out.count * self.base.mean_reference_tokens if held_out else 0
        is_epoch = run.args.eval_strategy == "epoch"
        times = run.args.num_train_epochs if is_epoch else steps / max(1, run.args.eval_steps or steps)
        return int(times * rows)


@dataclass(frozen=True)
class _Training:
    seconds: float
    arithmetic: str


def _checkpoints_at_once(args: Any, layout: Layout) -> int:
    """The last, the best where it is kept, and the one that is being written; without a limit all."""
    if layout.steps is None:
        return 1
    every = layout.steps.steps / args.num_train_epochs if args.save_strategy == "epoch" else args.save_steps
    written = max(1, int(layout.steps.steps / every) if every >= 1 else 1)
    if args.save_total_limit is None:
        return written
    kept: int = max(args.save_total_limit, 2 if args.load_best_model_at_end else 1)
    return min(written, kept + 1)


def _checkpoint_bytes(args: Any, memory: AlignMemory) -> int:
    """Of one checkpoint: what is trained, or all of a compact run's weights, and the optimizer's state."""
    if getattr(args.save_strategy, "value", args.save_strategy) == "no":
        return 0
    kept = memory.on(1, "one GPU").kept
    return memory.trainable_bytes + kept["optimizer"] + kept.get("masters", 0)


def _keeps_reference(cell: Cell, args: Any) -> bool:
    """DPO's other model: under LoRA it is the same base, and its log-probabilities may be taken before training."""
    return cell.trainer == "dpo" and cell.paradigm == "fft" and not args.precompute_ref_log_probs


def _measures_g_r(cell: Cell) -> bool:
    projects = cell.alternatives is not None and cell.alternatives.measures_g_r
    return projects or (cell.align is not None and cell.align.frozen_ratio in ("dynamic", "noise"))


def _is_anchored(cell: Cell) -> bool:
    return cell.alternatives is not None and cell.alternatives.has_anchor


def _instead(args: Any, model: Any) -> Instead | None:
    """None where only the data are different."""
    if not hasattr(args, "penalty"):
        return None
    adapted, squares = [], []
    if args.penalty == "product":
        adapted = [update.layer.base_layer.weight.numel() for update in lora_updates(model).values()]
    if args.projection == "nullspace":
        squares = [layer.in_features**2 for layer in model.modules() if isinstance(layer, nn.Linear)]
    return Instead(
        args.penalty,
        args.projection in ("agem", "signs"),
        *(sum(adapted), max(adapted, default=0)),
        *(sum(squares), max(squares, default=0)),
    )


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
