"""Plans: of a recipe's bases the stages that one GPU does, the align stage of every method, and what to warn of.

What one GPU does, however many there are, is the generation of D_ref and for the evaluation, and the Fisher. Memory
comes from `memory`, tokens from `tokens`, seconds and steps from `time`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from rpsa.alternatives.product import lora_updates
from rpsa.errors import RPSAError
from rpsa.evaluation.robustness.attacks import asked_under_attack, attacks_of
from rpsa.models import (
    alignment_dtype,
    generation_dtype,
    load_tokenizer,
    location,
    thought_of,
    training_dtype,
)
from rpsa.pipeline.alignment import training_arguments
from rpsa.pipeline.tasks import task_options
from rpsa.plan.dry_run import Precision, Shape, build_model, fake_tensors, load_config
from rpsa.plan.memory import (
    AlignMemory,
    Freezing,
    Instead,
    Passes,
    Sharding,
    StageMemory,
    align_memory,
    dry_passes,
    fisher_memory,
    generation_memory,
    sharded_passes,
    warmup_memory,
)
from rpsa.plan.render import Layout, MethodPlan, Plan, SingleGpuStage, TrainingTime
from rpsa.plan.time import (
    CHARACTERS_PER_TOKEN,
    GPUS,
    Gpu,
    ResponseTokens,
    SafetyTokens,
    compute_seconds,
    count_steps,
    evaluation_responses,
    fisher_operations,
    generation_seconds,
    launch_seconds,
    never_dynamic_warning,
    own_responses,
    prompt_tokens,
    reference_responses,
    safety_tokens,
    training_operations,
    update_seconds,
    with_rehearsal,
)
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import Align
from rpsa.safety_data import ALL_REFUSE, REFUSALS_ALONE
from rpsa.thought import THINK, ThoughtFormat


def make_plan(recipe: Recipe, gpu_memory: float = 80, gpus: Sequence[int] = (1, 2, 4, 8)) -> Plan:
    """Plan a checked recipe for GPUs of `gpu_memory` GiB, with 1 GiB and 5% left to CUDA and fragmentation.

    Raises:
        RPSAError: a model's config is not available, or the recipe's settings contradict each other.
    """
    if not 0 < gpu_memory < math.inf or not gpus or min(gpus) < 1:
        raise RPSAError("--gpu-memory is GiB greater than 0, --gpus one or more numbers such as 1,2,4")
    methods: list[MethodPlan] = []
    stages: dict[str, list[SingleGpuStage]] = {}
    parameters: dict[str, int] = {}
    thoughts: dict[str, str | None] = {}
    for name in recipe.bases:
        base = Base(recipe, name, sorted(gpus), gpu_memory)
        thoughts[name] = None if base.thought is None else str(base.thought)
        with fake_tensors():
            methods += _methods(base)
            stages[name] = list(_single_gpu_stages(base))
            parameters[name] = sum(p.numel() for p in base.model(recipe.model.dtype).parameters())
    cells = recipe.cells()
    return Plan(
        name=recipe.name,
        gpu_memory=gpu_memory,
        parameters=parameters,
        thoughts=thoughts,
        methods=methods,
        stages=stages,
        reference=reference_responses(recipe) if any(cell.needs_reference for cell in cells) else None,
        evaluation=evaluation_responses(recipe.evaluate),
        evaluated=len(cells),
        warnings=_warnings(methods, stages),
    )


class Base:
    """A base of a recipe: its skeletons, and what the plans of its stages share.

    Args:
        gpus: numbers of them to plan for, ascending.
        gpu_memory: GiB of each.

    Raises:
        RPSAError: there is no config.
    """

    def __init__(self, recipe: Recipe, name: str, gpus: list[int], gpu_memory: float) -> None:
        self.recipe = recipe
        self.name = name
        self.gpus = gpus
        self.gpu_memory = gpu_memory
        self.config = load_config(name, recipe.model)
        self.cells: list[Cell] = [cell for cell in recipe.cells() if cell.base == name]
        self._models: dict[str, Any] = {}

    def model(self, dtype: str, lora: Mapping[str, Any] | None = None) -> Any:
        """The skeleton, built once. Call it in `fake_tensors`."""
        key = json.dumps([dtype, dict(lora or {})])
        if key not in self._models:
            self._models[key] = build_model(self.config, dtype, lora)
        return self._models[key]

    @property
    def reference_tokens(self) -> int:
        """The longest that a trace can be for Fisher and g_R."""
        settings = self.recipe.reference
        return min(settings.reference_max_length, prompt_tokens(settings.problems) + settings.max_new_tokens)

    @property
    def mean_reference_tokens(self) -> int:
        responses = reference_responses(self.recipe)
        return min(prompt_tokens(self.recipe.reference.problems) + responses.tokens, self.reference_tokens)

    @cached_property
    def count_tokens(self) -> Callable[[str], int]:
        """The model's own tokenizer where it is on this machine; elsewhere a rule of thumb."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return lambda text: len(text) // CHARACTERS_PER_TOKEN + 1
        return lambda text: len(tokenizer(text)["input_ids"])

    @cached_property
    def thought(self) -> ThoughtFormat | None:
        """What sets the model's thoughts apart; None where its chat template is not on this machine."""
        return thought_of(self._tokenizer, self.recipe.model) if self._tokenizer else None

    @cached_property
    def _tokenizer(self) -> Any:
        is_here = (Path(location(self.name)) / "tokenizer.json").is_file()
        return load_tokenizer(self.name, self.recipe.model) if is_here else None


def _single_gpu_stages(base: Base) -> Iterator[SingleGpuStage]:
    recipe = base.recipe
    frozen = [cell for cell in base.cells if cell.needs_fisher]
    if any(cell.needs_reference for cell in base.cells):
        prompt = prompt_tokens(recipe.reference.problems)
        yield _generation(
            base, "reference", [reference_responses(recipe)], recipe.reference.batch_size, prompt
        )
    own = next((one for cell in base.cells if (one := own_responses(recipe, cell))), None)
    if own:
        yield _generation(
            base, "safety", [own], recipe.reference.batch_size, prompt_tokens(recipe.safety.prompts)
        )
    for of_adapter in (False, True):
        of_it = [cell for cell in frozen if cell.starts_from_fisher == of_adapter]
        if of_it:
            yield _fisher(base, of_it[0])
    responses = evaluation_responses(recipe.evaluate)
    if responses:
        prompt = prompt_tokens(recipe.evaluate.tasks[0])
        yield _generation(base, "evaluate, each model", responses, recipe.evaluate.batch_size, prompt)
    if recipe.robustness is not None:
        attacks = attacks_of(recipe.robustness, has_base=True)
        settings = asked_under_attack(recipe.robustness, recipe.evaluate, task_options(recipe))
        asked = [replace(one, count=len(attacks) * one.count) for one in evaluation_responses(settings)]
        prompt = prompt_tokens(settings.tasks[0])
        yield _generation(base, "attacks, each model", asked, settings.batch_size, prompt)


def _fisher(base: Base, cell: Cell) -> SingleGpuStage:
    settings = base.recipe.fisher
    is_lora = cell.starts_from_fisher
    dtype = training_dtype(cell.train, "lora" if is_lora else "fft", base.recipe.model)
    model = base.model(dtype, cell.lora if is_lora else {})
    shape = Shape(min(settings.batch_size, base.recipe.reference.n), base.reference_tokens)
    probes = settings.probes if settings.estimator == "token_signs" else 1
    checkpointing = settings.activation_checkpointing
    memory = fisher_memory(model, shape, probes, checkpointing=checkpointing)
    reference = reference_responses(base.recipe)
    tokens = reference.count * base.mean_reference_tokens
    passes = reference.tokens if settings.estimator == "per_token" else probes
    operations = fisher_operations(
        sum(p.numel() for p in model.parameters()),
        tokens,
        passes,
        lora=is_lora,
        checkpointing=checkpointing,
    )
    is_bf16 = dtype == "bfloat16"
    stage = f"Fisher, {'LoRA' if is_lora else 'full'}"

    def seconds(gpu: Gpu) -> float:
        return compute_seconds(operations, gpu, bf16=is_bf16)

    if not is_lora or not settings.warmup_steps:
        return _stage(base, stage, memory, seconds)
    warmup, warmup_seconds = _warmup(base, model, is_bf16=is_bf16)
    largest = max(memory, warmup, key=lambda one: one.total)  # the one is over when the other begins
    return _stage(base, stage, largest, lambda gpu: warmup_seconds(gpu) + seconds(gpu))


def _warmup(base: Base, model: Any, *, is_bf16: bool) -> tuple[StageMemory, Callable[[Gpu], float]]:
    """An adapter's steps on D_ref; a batch of more sequences than there are takes some again."""
    settings = base.recipe.fisher
    shape = Shape(settings.batch_size, base.reference_tokens)
    checkpointing = settings.activation_checkpointing
    tokens = settings.warmup_steps * shape.sequences * base.mean_reference_tokens
    parameters = sum(p.numel() for p in model.parameters())
    operations = training_operations(parameters, tokens, lora=True, checkpointing=checkpointing)
    launch = settings.warmup_steps * launch_seconds(checkpointing=checkpointing)
    return (
        warmup_memory(model, shape, checkpointing=checkpointing),
        lambda gpu: max(launch, compute_seconds(operations, gpu, bf16=is_bf16)),
    )


def _generation(
    base: Base, stage: str, responses: list[ResponseTokens], batch: int, prompt: int
) -> SingleGpuStage:
    sequences = min(batch, max(r.count for r in responses))
    longest = prompt + max(r.limit for r in responses)
    model = base.model(generation_dtype(base.recipe.model, on_gpu=True))
    memory = generation_memory(model, Shape(sequences, longest), base.config.get_text_config().vocab_size)
    total = sum(r.total for r in responses)
    mean = total // sum(r.count for r in responses)
    cache = memory.kept["KV cache"] * (prompt + mean // 2) // longest
    weights = memory.kept["weights"]
    return _stage(base, stage, memory, lambda gpu: generation_seconds(total, sequences, weights, cache, gpu))


def _stage(base: Base, stage: str, memory: StageMemory, seconds: Callable[[Gpu], float]) -> SingleGpuStage:
    by_gpu = {gpu.name: seconds(gpu) for gpu in GPUS if memory.fits(gpu.memory)}
    return SingleGpuStage(stage, memory, memory.fits(base.gpu_memory), by_gpu)


def _methods(base: Base) -> list[MethodPlan]:
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
        args = training_arguments(self.base.recipe, on_cpu, self.base.recipe.folder)
        dtype = alignment_dtype(cell, self.base.recipe.model)
        safety = safety_tokens(cell, self.base.count_tokens, self.base.thought or THINK)
        if cell.alternatives and cell.alternatives.rehearsal_share:
            safety = with_rehearsal(safety, cell, self.base.recipe)
        freezing = _freezing(args, cell.align) if cell.align else None
        model = self.base.model(dtype, cell.lora)
        run = _DryRun(cell, args, model, Shape(args.per_device_train_batch_size, safety.longest))
        instead = _instead(args, model) if cell.alternatives and not cell.align else None
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
    projects = cell.alternatives is not None and cell.alternatives.measures_g_r
    return projects or (cell.align is not None and cell.align.frozen_ratio in ("dynamic", "noise"))


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


def _warnings(methods: list[MethodPlan], stages: dict[str, list[SingleGpuStage]]) -> list[str]:
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
    alone = dict.fromkeys(m.method for m in methods if (m.safety.refusing or 0.0) >= ALL_REFUSE)
    return warnings + ([f"{', '.join(alone)}: {REFUSALS_ALONE}"] if alone else [])


def _advice(stage: str) -> str:
    if stage.startswith("Fisher"):
        return ": set fisher.activation_checkpointing, a smaller fisher.batch_size or reference.reference_max_length"
    section = "reference" if stage.startswith(("reference", "safety")) else "evaluate"
    return f": lower {section}.batch_size or {section}.max_new_tokens"
