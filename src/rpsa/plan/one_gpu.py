"""On one GPU: generation of D_ref, of safety data and for the evaluation, with its judges, and the Fisher."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rpsa.models import generation_dtype, training_dtype
from rpsa.parameters import trainable_parameters
from rpsa.plan.bases import Base
from rpsa.plan.dry_run import Shape
from rpsa.plan.judging import Judging, judgings, own_judgings
from rpsa.plan.layers import Skeleton
from rpsa.plan.memory import (
    StageMemory,
    fisher_memory,
    generation_memory,
    server_memory,
    warmup_memory,
    weights_bytes,
)
from rpsa.plan.render import SingleGpuStage
from rpsa.plan.serving import START_SECONDS, WAVE, ResponseSet, Served, expected, server
from rpsa.plan.time import (
    BANDWIDTH_SHARE,
    GPUS,
    UTILISATION,
    Gpu,
    ResponseTokens,
    attacked_responses,
    compute_seconds,
    evaluation_responses,
    fisher_operations,
    generation_seconds,
    held_out_responses,
    launch_seconds,
    operations_a_second,
    own_responses,
    prompt_tokens,
    reference_responses,
    training_operations,
)
from rpsa.plan.totals import Work
from rpsa.provenance import Stage
from rpsa.recipe.schema import Cell
from rpsa.recipe.sections import Evaluate, Reference


def single_gpu_stages(base: Base) -> Iterator[SingleGpuStage]:
    recipe = base.recipe
    frozen = [cell for cell in base.cells if cell.needs_fisher]
    settings = recipe.reference
    asked = Asking(settings, prompt_tokens(settings.problems))
    if any(cell.needs_reference for cell in base.cells):
        yield _generation(base, "reference", "reference", 1, [reference_responses(recipe)], asked)
    held_out = held_out_responses(recipe)
    if held_out and any(task.place.startswith("held-out/") for task in base.tasks("reference")):
        yield _generation(base, "reference", "held out", 1, [held_out], asked)
    own = next((one for cell in base.cells if (one := own_responses(recipe, cell))), None)
    if own:
        times = len(base.tasks("safety"))
        asked = Asking(settings, prompt_tokens(recipe.safety.prompts))
        yield _generation(base, "safety", "safety", times, [own], asked, own_judgings(recipe.safety, own))
    for of_adapter in (False, True):
        of_it = [cell for cell in frozen if cell.starts_from_fisher == of_adapter]
        if of_it:
            yield _fisher(base, of_it[0])
    responses = evaluation_responses(recipe.evaluate)
    if responses:
        asked = Asking(recipe.evaluate, prompt_tokens(recipe.evaluate.tasks[0]))
        judges = judgings(recipe.evaluate, responses)
        yield _generation(
            base, "evaluate", "evaluate, each model", len(base.cells), responses, asked, judges, held_out
        )
    under_attack = attacked_responses(recipe)
    attacks = base.tasks("robustness")
    if under_attack and attacks:
        asked = Asking(recipe.evaluate, prompt_tokens(recipe.evaluate.tasks[0]))
        judges = judgings(recipe.evaluate, under_attack)
        yield _generation(base, "robustness", "attacks, each", len(attacks), under_attack, asked, judges)


def _fisher(base: Base, cell: Cell) -> SingleGpuStage:
    settings = base.recipe.fisher
    is_lora = cell.starts_from_fisher
    dtype = training_dtype(cell.train, "lora" if is_lora else "fft", base.recipe.model)
    skeleton = base.skeleton(dtype, cell.lora if is_lora else {})
    shape = Shape(min(settings.batch_size, base.recipe.reference.n), base.reference_tokens)
    probes = settings.probes if settings.estimator == "token_signs" else 1
    checkpointing = settings.activation_checkpointing
    memory = fisher_memory(skeleton, shape, probes, checkpointing=checkpointing)
    reference = reference_responses(base.recipe)
    tokens = reference.count * base.mean_reference_tokens
    passes = reference.tokens if settings.estimator == "per_token" else probes
    parameters = sum(p.numel() for p in skeleton.model.parameters())
    operations = fisher_operations(parameters, tokens, passes, lora=is_lora, checkpointing=checkpointing)
    # of weights in bf16 all is in bf16; of others the recipe says in what their products are taken
    precision = "bf16" if dtype in ("bfloat16", "float16") else settings.precision
    stage = f"Fisher, {'LoRA' if is_lora else 'full'}"
    seconds = {gpu.name: compute_seconds(operations, gpu, precision=precision) for gpu in GPUS}
    gpu = base.gpu
    arithmetic = [
        f"{operations / parameters / tokens:.0f} operations × {parameters / 1e9:.2f}B parameters × {tokens:,} tokens "
        f"({passes:,} backward passes) / ({operations_a_second(gpu, precision) / 1e12:.0f} TFLOP/s in {precision} × "
        f"{UTILISATION:.0%}): {seconds[gpu.name] / 60:.1f} min"
    ]
    if is_lora and settings.warmup_steps:
        warmup, by_gpu = _warmup(base, skeleton, precision)
        seconds = {name: seconds[name] + by_gpu[name] for name in seconds}
        memory = max(memory, warmup, key=lambda one: one.total)  # the one is over when the other begins
        arithmetic.append(f"{settings.warmup_steps:,} steps of warm-up: {by_gpu[gpu.name] / 60:.1f} min")
    times = sum(task.place.split("/")[-1].startswith("lora-") == is_lora for task in base.tasks("fisher"))
    by_number = {
        gpu.name: {number: seconds[gpu.name] / number for number in sorted({1, *base.gpus})}
        for gpu in GPUS
        if memory.fits(gpu.memory)
    }
    return SingleGpuStage(
        stage,
        memory,
        memory.fits(base.gpu_memory),
        {name: of[1] for name, of in by_number.items()},
        Work("fisher", f"{base.name}: {stage}", times, by_number, arithmetic),
        scored=sum(p.numel() for p in trainable_parameters(skeleton.model).values()),
    )


def _warmup(base: Base, skeleton: Skeleton, precision: str) -> tuple[StageMemory, dict[str, float]]:
    """An adapter's steps on D_ref; a batch of more sequences than there are takes some again. Seconds by GPU."""
    settings = base.recipe.fisher
    shape = Shape(settings.batch_size, base.reference_tokens)
    checkpointing = settings.activation_checkpointing
    tokens = settings.warmup_steps * shape.sequences * base.mean_reference_tokens
    parameters = sum(p.numel() for p in skeleton.model.parameters())
    operations = training_operations(parameters, tokens, lora=True, checkpointing=checkpointing)
    launch = settings.warmup_steps * launch_seconds(checkpointing=checkpointing)
    return (
        warmup_memory(skeleton, shape, checkpointing=checkpointing),
        {gpu.name: max(launch, compute_seconds(operations, gpu, precision=precision)) for gpu in GPUS},
    )


@dataclass(frozen=True)
class Asking:
    """How responses are generated: `settings` say by what, `prompt` is the length of what is asked."""

    settings: Reference | Evaluate
    prompt: int

    @property
    def by_vllm(self) -> bool:
        """On a GPU "auto" is vLLM."""
        return self.settings.backend != "transformers"

    @property
    def gpus(self) -> int:
        """GPUs that one engine, or several with the model each, take together."""
        return self._number("tensor_parallel_size") * self.engines if self.by_vllm else 1

    @property
    def engines(self) -> int:
        return self._number("data_parallel_size") if self.by_vllm else 1

    def room(self, base: Base, longest: int) -> int:
        """Tokens of one sequence for which vLLM wants room, or it does not start."""
        return self._number("max_model_len", max(base.context, longest))

    def _number(self, name: str, default: int = 1) -> int:
        return int(self.settings.engine.get(name) or default)


def _generation(
    base: Base,
    stage: Stage,
    name: str,
    times: int,
    responses: list[ResponseTokens],
    asking: Asking,
    judges: Sequence[Judging] = (),
    held_out: ResponseTokens | None = None,
) -> SingleGpuStage:
    """Responses, what judges make of them, and the reasoning loss on held-out ones."""
    longest = asking.prompt + max(r.limit for r in responses)
    skeleton = base.skeleton(generation_dtype(base.recipe.model, on_gpu=True))
    vocabulary = base.config.get_text_config().vocab_size
    sequences = min(asking.settings.batch_size, max(r.count for r in responses))
    if asking.by_vllm:
        memory = server_memory(skeleton, asking.room(base, longest))
    else:
        memory = generation_memory(skeleton, Shape(sequences, longest), vocabulary)
    together = asking.gpus
    parts = together // asking.engines
    share = replace(memory, kept={part: size // parts for part, size in memory.kept.items()})
    by_gpu: dict[str, dict[int, float]] = {}
    arithmetic: list[str] = []
    for gpu in GPUS:
        if not share.fits(gpu.memory):
            continue
        seconds, said = (
            _served(base, skeleton, responses, asking, gpu)
            if asking.by_vllm
            else _by_transformers(memory, responses, asking.prompt, sequences, longest, gpu)
        )
        loss = 0.0
        if held_out:
            tokens = held_out.count * min(asking.prompt + held_out.tokens, base.reference_tokens)
            loss = compute_seconds(2.0 * base.parameters * tokens, gpu, precision="bf16")
        by_gpu[gpu.name] = {together: seconds + loss + sum(judge.seconds(gpu) for judge in judges)}
        if gpu == base.gpu:
            arithmetic = said + [judge.arithmetic(gpu) for judge in judges if judge.model]
            arithmetic += (
                [f"reasoning loss of {held_out.count} responses: {loss / 60:.1f} min"] if held_out else []
            )
    return SingleGpuStage(
        name,
        share,
        share.fits(base.gpu_memory),
        {gpu: of[together] for gpu, of in by_gpu.items()},
        Work(stage, f"{base.name}: {name}", times, by_gpu, arithmetic),
    )


def _by_transformers(
    memory: StageMemory, responses: list[ResponseTokens], prompt: int, sequences: int, longest: int, gpu: Gpu
) -> tuple[float, list[str]]:
    total = sum(r.total for r in responses)
    mean = total // sum(r.count for r in responses)
    cache = memory.kept["KV cache"] * (prompt + mean // 2) // longest
    seconds = generation_seconds(total, sequences, memory.kept["weights"], cache, gpu)
    each = seconds * sequences / total
    return seconds, [
        f"{total / 1e6:.2f}M tokens by transformers, {sequences} at a time, {1000 * each:.0f} ms a step: "
        f"{seconds / 3600:.2f} h"
    ]


def _served(
    base: Base, skeleton: Skeleton, responses: list[ResponseTokens], asking: Asking, gpu: Gpu
) -> tuple[float, list[str]]:
    """By vLLM, engine start included; several engines share the responses, from one queue."""
    weights, token_bytes = weights_bytes(skeleton), base.token_bytes(skeleton)
    each = 2.0 * base.parameters / (operations_a_second(gpu, "bf16") * UTILISATION)
    by = server(
        asking.settings.engine,
        gpu.memory * 2**30,
        weights,
        token_bytes,
        gpu.bandwidth * BANDWIDTH_SHARE,
        each,
    )
    asked = [
        ResponseSet(math.ceil(r.count / asking.engines), asking.prompt, r.tokens, r.limit) for r in responses
    ]
    wave = WAVE if asking.engines == 1 else None
    done = expected(asked, by, wave)
    arithmetic = [
        f"{asking.engines if asking.engines > 1 else 'one'} vLLM engine, room for {by.cache:,} tokens of "
        f"{token_bytes / 1024:.0f} KiB beside {weights / 2**30:.1f} GiB of weights, at most {by.sequences} sequences",
        *(_said(one, expected([part], by, wave)) for one, part in zip(responses, asked, strict=True)),
        f"{done.tokens / 1e6:.2f}M tokens / {done.rate:,.0f} tokens a second = {done.seconds / 3600:.2f} h "
        f"({done.at_once:.0f} sequences at a time in steps of {1000 * done.seconds / done.steps:.0f} ms)",
        f"start of the engine: {START_SECONDS / 60:.0f} min",
    ]
    return done.seconds + START_SECONDS, arithmetic


def _said(responses: ResponseTokens, done: Served) -> str:
    return (
        f"  {responses.name}: {responses.count:,} × ~{responses.tokens:,} tokens, "
        f"{done.at_once:.0f} at a time, {done.rate:,.0f} tokens a second: {done.seconds / 60:.1f} min"
    )
