"""What one GPU does, however many there are: generation of D_ref and for the evaluation, and the Fisher."""

from collections.abc import Callable, Iterator
from typing import Any

from rpsa.pipeline.models import generation_dtype, training_dtype
from rpsa.plan.base import Base
from rpsa.plan.dry_run import Shape
from rpsa.plan.memory import StageMemory, fisher_memory, generation_memory, warmup_memory
from rpsa.plan.result import SingleGpuStage
from rpsa.plan.time import (
    GPUS,
    Gpu,
    compute_seconds,
    fisher_operations,
    generation_seconds,
    launch_seconds,
    training_operations,
)
from rpsa.plan.tokens import Responses, evaluation_responses, prompt_tokens, reference_responses
from rpsa.recipe.schema import Cell


def plan_single_gpu_stages(base: Base) -> Iterator[SingleGpuStage]:
    recipe = base.recipe
    frozen = [cell for cell in base.cells if cell.needs_fisher]
    if any(cell.needs_reference for cell in base.cells):
        prompt = prompt_tokens(recipe.reference.problems)
        yield _generation(
            base, "reference", [reference_responses(recipe)], recipe.reference.batch_size, prompt
        )
    for paradigm in ("fft", "lora"):
        of_it = [cell for cell in frozen if cell.paradigm == paradigm]
        if of_it:
            yield _fisher(base, of_it[0])
    responses = evaluation_responses(recipe.evaluate)
    if responses:
        prompt = prompt_tokens(recipe.evaluate.tasks[0])
        yield _generation(base, "evaluate, each model", responses, recipe.evaluate.batch_size, prompt)


def _fisher(base: Base, cell: Cell) -> SingleGpuStage:
    settings = base.recipe.fisher
    is_lora = cell.paradigm == "lora"
    dtype = training_dtype(cell.train, cell.paradigm, base.recipe.model)
    model = base.model(dtype, cell.lora)
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
    base: Base, stage: str, responses: list[Responses], batch: int, prompt: int
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
