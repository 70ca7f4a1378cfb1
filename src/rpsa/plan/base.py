"""The plan of one base: every method on it, and the stages that one GPU does."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpsa.pipeline.models import load_tokenizer, location, training_dtype
from rpsa.pipeline.stages import training_arguments
from rpsa.plan import Layout, MethodPlan, SingleGpuStage, TrainingTime, fits_on
from rpsa.plan.dry_run import Precision, Shape, cache_bytes_per_token
from rpsa.plan.memory import (
    AlignMemory,
    Freezing,
    Passes,
    Sharding,
    StageMemory,
    align_memory,
    dry_passes,
    fisher_memory,
    generation_memory,
    sharded_passes,
)
from rpsa.plan.skeleton import build_model, fake_tensors, load_config
from rpsa.plan.steps import count_steps
from rpsa.plan.time import (
    GPUS,
    Gpu,
    compute_seconds,
    fisher_operations,
    generation_seconds,
    training_operations,
    update_seconds,
)
from rpsa.plan.tokens import (
    CHARACTERS_PER_TOKEN,
    Responses,
    SafetyTokens,
    evaluation_responses,
    prompt_tokens,
    reference_responses,
    safety_tokens,
)
from rpsa.recipe.schema import Cell, Recipe

Fits = Callable[[int], bool]


@dataclass(frozen=True)
class BasePlan:
    parameters: int
    methods: list[MethodPlan]
    stages: list[SingleGpuStage]


def plan_base(recipe: Recipe, base: str, gpus: Sequence[int], fits: Fits) -> BasePlan:
    config = load_config(base, recipe.model)
    cells = [cell for cell in recipe.cells() if cell.base == base]
    planner = _Planner(recipe, base, config, list(gpus), fits)
    with fake_tensors():
        methods = [
            planner.method(cell, sum(c.method == cell.method for c in cells))
            for cell in {cell.method: cell for cell in reversed(cells) if cell.paradigm != "none"}.values()
        ][::-1]
        stages = list(planner.single_gpu_stages(cells))
        parameters = sum(p.numel() for p in planner.model(recipe.model.dtype, None).parameters())
    return BasePlan(parameters, methods, stages)


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
    """Plans the parts; dry runs with the same settings are done once."""

    def __init__(self, recipe: Recipe, base: str, config: Any, gpus: list[int], fits: Fits) -> None:
        self.recipe = recipe
        self.base = base
        self.config = config
        self.gpus = gpus
        self.fits = fits
        self._passes: dict[str, Passes] = {}
        self._models: dict[str, Any] = {}
        self._reference_tokens = min(
            recipe.reference.reference_max_length,
            prompt_tokens(recipe.reference.problems) + recipe.reference.max_new_tokens,
        )
        self._count = _token_counter(recipe, base)

    def model(self, dtype: str, lora: dict[str, Any] | None) -> Any:
        key = json.dumps([dtype, lora])
        if key not in self._models:
            self._models[key] = build_model(self.config, dtype, lora)
        return self._models[key]

    # The align stage

    def method(self, cell: Cell, runs: int) -> MethodPlan:
        on_cpu = replace(
            cell, train={**cell.train, "use_cpu": True}
        )  # bf16 is then no matter of this machine
        args = training_arguments(self.recipe, on_cpu, self.recipe.folder, quiet=True)
        dtype = training_dtype(cell.train, cell.paradigm, self.recipe.model)
        safety = safety_tokens(cell, self._count)
        freezing = _freezing(args) if cell.align else None
        model = self.model(dtype, dict(cell.lora) or None)
        run = _DryRun(cell, args, model, Shape(args.per_device_train_batch_size, safety.longest))
        memory = align_memory(model, self._passes_of(run), str(args.optim.value), freezing)
        layouts = [self._layout(run, memory, gpus, safety) for gpus in self.gpus]
        return MethodPlan(
            base=self.base,
            method=cell.method,
            cell=cell,
            parameters=memory.parameters,
            trainable=memory.trainable,
            dtype=dtype,
            safety=safety,
            layouts=layouts,
            measurement_cost=self._measurement_cost(safety) if freezing and freezing.dynamic else None,
            training=self._training_times(run, memory, layouts, safety),
            runs=runs,
        )

    def _passes_of(self, run: "_DryRun", *, sharded: bool = False) -> Passes:
        precision = Precision(bool(run.args.bf16), _checkpoints(run.args))
        reference = self._reference_shape(run)
        lora = dict(run.cell.lora) or None
        dtype = next(run.model.parameters()).dtype
        key = repr((sharded, lora, dtype, run.shape, reference, precision, run.accumulated))
        if key not in self._passes:
            if sharded:
                lean = self.model("bfloat16" if precision.bf16 else "float32", lora)
                self._passes[key] = sharded_passes(lean, run.shape, reference, precision)
            else:
                self._passes[key] = dry_passes(
                    run.model, run.shape, reference, precision, accumulated=run.accumulated
                )
        return self._passes[key]

    def _reference_shape(self, run: "_DryRun") -> Shape | None:
        """g_R's batch, if any method of this paradigm measures it: the methods then share their dry runs."""
        same = [c for c in self.recipe.cells() if c.paradigm == run.cell.paradigm and c.base == self.base]
        if not any(c.align and c.align.frozen_ratio == "dynamic" for c in same):
            return None
        return Shape(run.shape.sequences, self._reference_tokens)

    def _layout(self, run: "_DryRun", memory: AlignMemory, gpus: int, safety: SafetyTokens) -> Layout:
        """DDP where it fits, as it is simpler and faster; FSDP2 otherwise."""
        sharding: Sharding = "DDP" if gpus > 1 else "one GPU"
        stage = memory.on(gpus, sharding)
        if gpus > 1 and not self.fits(stage.total):
            sharding = "FSDP2"
            stage = replace(memory, passes=self._passes_of(run, sharded=True)).on(gpus, sharding)
        steps = count_steps(run.args, safety.examples, gpus) if safety.examples else None
        return Layout(gpus, sharding, stage, self.fits(stage.total), steps)

    def _measurement_cost(self, safety: SafetyTokens) -> float:
        """g_R takes as many sequences as a step: what differs is how long they are."""
        expected = reference_responses(self.recipe).tokens + prompt_tokens(self.recipe.reference.problems)
        return min(expected, self._reference_tokens) / safety.mean

    def _training_times(
        self, run: "_DryRun", memory: AlignMemory, layouts: list[Layout], safety: SafetyTokens
    ) -> dict[str, TrainingTime]:
        times = {}
        for gpu in GPUS:
            holds = fits_on(gpu.memory)
            layout = next((layout for layout in layouts if holds(layout.memory.total)), None)
            if layout is None or layout.steps is None:
                continue
            steps = layout.steps
            tokens = steps.steps * steps.sequences_per_step * safety.mean
            if steps.measurements:
                tokens += int(
                    steps.measurements
                    * steps.sequences_per_step
                    * safety.mean
                    * self._measurement_cost(safety)
                )
            operations = training_operations(
                memory.parameters,
                tokens,
                lora=run.cell.paradigm == "lora",
                checkpointing=_checkpoints(run.args),
            )
            kept = sum(layout.memory.kept.values())
            seconds = compute_seconds(operations, gpu, bf16=bool(run.args.bf16), gpus=layout.gpus)
            seconds += (steps.steps + steps.measurements) * update_seconds(kept, gpu)
            times[gpu.name] = TrainingTime(layout.gpus, seconds)
        return times

    # What one GPU does

    def single_gpu_stages(self, cells: list[Cell]) -> Iterator[SingleGpuStage]:
        recipe = self.recipe
        frozen = [cell for cell in cells if cell.align]
        if frozen:
            prompt = prompt_tokens(recipe.reference.problems)
            yield self._generation(
                "reference", [reference_responses(recipe)], recipe.reference.batch_size, prompt
            )
        for paradigm in ("fft", "lora"):
            of_it = [cell for cell in frozen if cell.paradigm == paradigm]
            if of_it:
                yield self._fisher(of_it[0])
        responses = evaluation_responses(recipe.evaluate)
        if responses:
            prompt = prompt_tokens(recipe.evaluate.tasks[0])
            yield self._generation("evaluate, each model", responses, recipe.evaluate.batch_size, prompt)

    def _fisher(self, cell: Cell) -> SingleGpuStage:
        settings = self.recipe.fisher
        is_lora = cell.paradigm == "lora"
        dtype = training_dtype(cell.train, cell.paradigm, self.recipe.model)
        if not is_lora:
            dtype = training_dtype({}, "fft", self.recipe.model)
        model = self.model(dtype, dict(cell.lora) or None)
        shape = Shape(min(settings.batch_size, self.recipe.reference.n), self._reference_tokens)
        probes = settings.probes if settings.estimator == "token_signs" else 1
        checkpointing = settings.activation_checkpointing
        memory = fisher_memory(model, shape, probes, checkpointing=checkpointing)
        reference = reference_responses(self.recipe)
        tokens = reference.count * min(
            self._reference_tokens, reference.tokens + prompt_tokens(self.recipe.reference.problems)
        )
        passes = reference.tokens if settings.estimator == "per_token" else probes
        operations = fisher_operations(
            sum(p.numel() for p in model.parameters()),
            tokens,
            passes,
            lora=is_lora,
            checkpointing=checkpointing,
        )
        is_bf16 = dtype == "bfloat16"
        return self._stage(
            f"Fisher, {'LoRA' if is_lora else 'full'}",
            memory,
            lambda gpu: compute_seconds(operations, gpu, bf16=is_bf16),
        )

    def _generation(self, stage: str, responses: list[Responses], batch: int, prompt: int) -> SingleGpuStage:
        model = self.model(self.recipe.model.dtype, None)
        text = self.config.get_text_config()
        per_token = cache_bytes_per_token(model)
        sequences = min(batch, max(r.count for r in responses))
        longest = prompt + max(r.limit for r in responses)
        memory = generation_memory(
            model, per_token, text.num_hidden_layers, sequences, longest, text.vocab_size
        )
        total = sum(r.total for r in responses)
        mean = total // sum(r.count for r in responses)
        cache = per_token * sequences * (prompt + mean // 2)
        weights = memory.kept["weights"]
        return self._stage(
            stage, memory, lambda gpu: generation_seconds(total, sequences, weights, cache, gpu)
        )

    def _stage(self, stage: str, memory: StageMemory, seconds: Callable[[Gpu], float]) -> SingleGpuStage:
        by_gpu = {gpu.name: seconds(gpu) for gpu in GPUS if fits_on(gpu.memory)(memory.total)}
        return SingleGpuStage(stage, memory, self.fits(memory.total), by_gpu)


def _freezing(args: Any) -> Freezing:
    dynamic = args.frozen_ratio == "dynamic"
    return Freezing(
        dynamic=dynamic,
        control=args.mask != "fisher",
        raw_moments=args.frozen_moments == "raw",
        gradient_only=args.gradient_only,
        audit=args.audit,
        largest_k=1.0 if dynamic else float(args.frozen_ratio),
    )


def _checkpoints(args: Any) -> bool:
    """Newer versions of transformers have a new name for it."""
    return bool(getattr(args, "activation_checkpointing", args.gradient_checkpointing))


def _token_counter(recipe: Recipe, base: str) -> Callable[[str], int]:
    """The model's own tokenizer where it is on this machine; elsewhere a rule of thumb."""
    if not (Path(location(base)) / "tokenizer.json").is_file():
        return lambda text: len(text) // CHARACTERS_PER_TOKEN + 1
    tokenizer = load_tokenizer(base, recipe.model)
    return lambda text: len(tokenizer(text)["input_ids"])
