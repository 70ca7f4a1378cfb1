"""The work of each stage: reference traces, Fisher, alignment, evaluation. Each fills the folder that it is given."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpsa.answers import grade
from rpsa.artifacts import atomic_write, stable_json
from rpsa.errors import RPSAError
from rpsa.fisher.config import FisherConfig
from rpsa.fisher.estimators import estimate_fisher
from rpsa.pipeline.alignment import make_aligned
from rpsa.pipeline.evaluation import evaluate
from rpsa.pipeline.manifests import TIMING, Stage
from rpsa.pipeline.models import (
    ADAPTER,
    add_adapter,
    generation_dtype,
    load_model,
    load_tokenizer,
    location,
    settle_adapter,
    sharded,
    thought_of,
    training_dtype,
    vllm_engine,
)
from rpsa.pipeline.subjects import cell_subject
from rpsa.pipeline.tasks import (
    FISHER_MAP,
    Progress,
    Task,
    full_fishers,
    no_progress,
    reference_of,
    stands_on,
    task_options,
    unfinished_folders,
)
from rpsa.recipe.schema import Recipe
from rpsa.reference import Problem, ReferenceConfig, ReferenceDataset, build_reference, load_problems
from rpsa.sharding import rank, world_size
from rpsa.tiny import REFERENCE_FAMILIES, reasoning_problems
from rpsa.training.warmup import warm_up

log = logging.getLogger(__name__)


# reference


def make_reference(recipe: Recipe, task: Task, folder: Path, progress: Progress) -> None:
    """D_ref: the model's own responses to reasoning problems."""
    from rpsa.generation.backends import BackendConfig, has_gpu, make_generator

    settings = recipe.reference
    if settings.problems is None:
        raise RPSAError(
            "reference.problems: not given; a frozen ratio needs reasoning problems to measure on"
        )
    problems = reference_problems(settings.problems, settings.n, settings.seed)
    tokenizer = load_tokenizer(task.base, recipe.model)
    thought = thought_of(tokenizer, recipe.model)
    config = BackendConfig(settings.backend, settings.batch_size, vllm_engine(recipe.model, settings.engine))
    dtype = generation_dtype(recipe.model, on_gpu=has_gpu())
    generator = make_generator(
        config, location(task.base), tokenizer, lambda _: load_model(task.base, recipe.model, dtype), thought
    )
    done = 0

    def on_trace(trace: Any) -> None:
        nonlocal done
        done += 1
        progress(done, len(problems))

    build_reference(
        generator,
        tokenizer,
        problems,
        ReferenceConfig(
            problems=settings.n,
            seed=settings.seed,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            only_correct=settings.only_correct,
        ),
        folder,
        grade=lambda response, answer: grade(response, answer, "math", thought),
        identity=task.base,
        on_trace=on_trace,
        thought=thought,
    )


def reference_problems(source: str, n: int, seed: int) -> list[Problem]:
    if source == "tiny":
        return reasoning_problems(n, seed, "train", REFERENCE_FAMILIES)
    return load_problems(source, n, seed)


# fisher


def make_fisher(recipe: Recipe, task: Task, folder: Path, progress: Progress) -> None:
    """The Fisher diagonal of a base, or of a LoRA adapter on it, which is saved too: alignment starts from it."""
    [traces] = stands_on(recipe, task)
    reference = ReferenceDataset.load(traces.folder)
    settings = task.fisher
    train = task.cell.train if task.cell else {}
    model: Any = load_model(
        task.base, recipe.model, training_dtype(train, "lora" if task.cell else "fft", recipe.model)
    )
    if task.cell is not None:
        model = add_adapter(model, task.cell)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if task.cell is not None:
        if settings.warmup_steps:
            _warm_up(recipe, task, model, reference)
        if rank() == 0:
            model.save_pretrained(folder / ADAPTER)
            settle_adapter(folder / ADAPTER)
    fisher = estimate_fisher(
        sharded(model),
        reference.batches(settings.batch_size, recipe.reference.reference_max_length),
        FisherConfig(
            estimator=settings.estimator,
            probes=settings.probes,
            seed=settings.seed,
            scope=settings.scope,
            on_nonfinite=settings.on_nonfinite,
            precision=settings.precision,
            progress=progress is not no_progress,
        ),
    )
    log.info("%s: split-half overlap %s", task.name, fisher.manifest["estimation"]["split_half"])
    seconds = fisher.manifest["estimation"].pop("seconds", None)
    fisher.save(folder)
    if rank() == 0:
        atomic_write(folder / TIMING, stable_json({"seconds": seconds}))


def _warm_up(recipe: Recipe, task: Task, model: Any, reference: ReferenceDataset) -> None:
    assert task.cell is not None
    if world_size() > 1:
        raise RPSAError("fisher.warmup_steps is for one process: run --only fisher without launch first")
    batches = (
        reference.rotating_batch(step, task.fisher.batch_size, recipe.reference.reference_max_length)
        for step in range(task.fisher.warmup_steps)
    )
    warm_up(model, batches, task.cell.train["learning_rate"])


# analyse


def make_analysis(recipe: Recipe, task: Task, folder: Path, progress: Progress) -> None:
    """Fig. 1 and 2 (the Fisher maps of all bases), or Fig. 3 (the perturbation of one)."""
    from rpsa.pipeline.fisher_map import fisher_map
    from rpsa.pipeline.perturb import PerturbationConfig, run_perturbation

    if task.name == FISHER_MAP:
        folders = [fisher.folder for fisher in full_fishers(recipe)]
        fisher_map(folders, recipe.analysis.fisher_map, folder)
        return
    settings = recipe.analysis.perturb
    assert settings is not None
    [fisher] = [found for found in full_fishers(recipe) if found.base == task.base]
    config = PerturbationConfig(
        tuple(settings.fractions), tuple(settings.factors), tuple(settings.selections), settings.draws
    )
    run_perturbation(
        *(task.base, fisher.folder, recipe.evaluate, config, folder, recipe.data_dir, recipe.model),
        earlier=[one for one in (task.folder, *unfinished_folders(task)) if one != folder],
    )


# evaluate


def make_evaluated(recipe: Recipe, task: Task, folder: Path, progress: Progress) -> None:
    """Answers of one model to every evaluation prompt, graded; stored sample by sample."""
    cell = task.cell
    assert cell is not None
    # the problems of this base's D_ref are no test of it, whatever the method
    options = task_options(recipe, reference_of(recipe, cell.base))
    subject = cell_subject(recipe, cell)
    earlier = [task.folder, *unfinished_folders(task)]
    evaluate(subject, recipe.evaluate, options, folder, progress, [one for one in earlier if one != folder])


WORK: dict[Stage, Callable[[Recipe, Task, Path, Progress], None]] = {
    "reference": make_reference,
    "fisher": make_fisher,
    "analyse": make_analysis,
    "align": make_aligned,
    "evaluate": make_evaluated,
}
