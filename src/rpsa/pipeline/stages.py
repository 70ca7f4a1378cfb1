"""The work of each stage: reference traces, Fisher, alignment, evaluation. Each fills the folder that it is given."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.answers import grade
from rpsa.artifacts import atomic_write, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.loading import load_tasks
from rpsa.fisher.config import FisherConfig
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import estimate_fisher
from rpsa.pipeline.evaluation import Progress, check_evaluation, evaluate
from rpsa.pipeline.models import (
    add_adapter,
    generation_dtype,
    load_model,
    load_tokenizer,
    location,
    sharded,
    training_dtype,
    vllm_engine,
)
from rpsa.pipeline.subjects import cell_subject
from rpsa.pipeline.tasks import (
    FISHER_MAP,
    Stage,
    Task,
    fisher_task,
    full_fishers,
    reference_of,
    reference_task,
)
from rpsa.recipe.names import installed_names
from rpsa.recipe.schema import Cell, Recipe, Safety, slug
from rpsa.reference import Problem, ReferenceConfig, ReferenceDataset, build_reference, load_problems
from rpsa.sharding import rank, world_size
from rpsa.tiny import REFERENCE_FAMILIES, reasoning_problems, safety_examples
from rpsa.training.card import write_card
from rpsa.training.metadata import model_metadata
from rpsa.training.names import CardNames
from rpsa.training.safety_data import (
    SafetyExample,
    contamination,
    hold_out,
    load_benign_data,
    load_safety_data,
    mix_benign,
    tokenize_safety_data,
)

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
LOG = "log.json"


def no_progress(done: int, total: int) -> None:
    pass


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
    config = BackendConfig(settings.backend, settings.batch_size, vllm_engine(recipe.model, settings.engine))
    dtype = generation_dtype(recipe.model, on_gpu=has_gpu())
    generator = make_generator(
        config, location(task.base), tokenizer, lambda _: load_model(task.base, recipe.model, dtype)
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
        grade=lambda response, answer: grade(response, answer, "math"),
        identity=task.base,
        on_trace=on_trace,
    )


def reference_problems(source: str, n: int, seed: int) -> list[Problem]:
    if source == "tiny":
        return reasoning_problems(n, seed, "train", REFERENCE_FAMILIES)
    return load_problems(source, n, seed)


# fisher


def make_fisher(recipe: Recipe, task: Task, folder: Path, progress: Progress) -> None:
    """The Fisher diagonal of a base, or of a LoRA adapter on it, which is saved too: alignment starts from it."""
    reference = ReferenceDataset.load(recipe.folder / "reference" / task.folder.parent.name)
    settings = task.fisher
    train = task.cell.train if task.cell else {}
    model: Any = load_model(
        task.base, recipe.model, training_dtype(train, "lora" if task.cell else "fft", recipe.model)
    )
    if task.cell is not None:
        model = add_adapter(model, task.cell)
        if rank() == 0:
            model.save_pretrained(folder / ADAPTER)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fisher = estimate_fisher(
        sharded(model),
        reference.batches(settings.batch_size, recipe.reference.reference_max_length),
        FisherConfig(
            estimator=settings.estimator,
            probes=settings.probes,
            seed=settings.seed,
            scope=settings.scope,
            on_nonfinite=settings.on_nonfinite,
            progress=progress is not no_progress,
        ),
    )
    overlap = fisher.manifest["estimation"]["split_half"]
    log.info("%s: split-half overlap %s", task.name, overlap)
    fisher.save(folder)


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
    run_perturbation(task.base, fisher.folder, recipe.evaluate, config, folder, recipe.data_dir)


# align


def make_aligned(recipe: Recipe, task: Task, folder: Path, progress: Progress) -> None:
    """Fine-tune on safety data, plainly or with RPSA; goes on from the last checkpoint if there is one."""
    import transformers

    cell = task.cell
    assert cell is not None
    assert cell.safety is not None
    started = time.perf_counter()
    transformers.set_seed(cell.seed)
    tokenizer = load_tokenizer(task.base, recipe.model)
    examples = safety_data(cell.safety, cell.seed)
    held: list[SafetyExample] = []
    if cell.safety.validation_share:
        examples, held = hold_out(examples, cell.safety.validation_share, cell.seed)
    dataset, counts = tokenize_safety_data(examples, tokenizer, cell.safety.max_length)
    validation = tokenize_safety_data(held, tokenizer, cell.safety.max_length)[0] if held else None
    trainer = make_trainer(
        recipe, cell, tokenizer, dataset, validation, folder, quiet=progress is no_progress
    )
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        raise RPSAError(
            f"{task.name}: stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "its checkpoint is kept, and the same command goes on from there"
        )
    save_whole(trainer, folder)
    if rank() > 0:
        return
    tokenizer.save_pretrained(folder)
    write_card(folder, model_metadata(trainer, card_names(recipe, cell)))
    atomic_write(
        folder / LOG,
        stable_json(
            {
                "history": trainer.state.log_history,
                "steps": trainer.state.global_step,
                "seconds": time.perf_counter() - started,
                "processes": trainer.accelerator.num_processes,
                "safety_data": asdict(counts),
                "contamination": [asdict(c) for c in contaminated(recipe, examples)],
            }
        ),
    )
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def card_names(recipe: Recipe, cell: Cell) -> CardNames:
    """The recipe's own names, for the model card."""
    assert cell.safety is not None
    return CardNames(
        model=slug(cell.id), base=cell.base, dataset=cell.safety.data, problems=recipe.reference.problems
    )


def save_whole(trainer: Any, folder: Path) -> None:
    """The model as Hugging Face writes it, put together from its shards if it has been sharded."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))


def make_trainer(
    recipe: Recipe,
    cell: Cell,
    tokenizer: Any,
    dataset: "Dataset",
    validation: "Dataset | None",
    folder: Path,
    *,
    quiet: bool,
) -> Any:
    """`RPSATrainer` if the cell freezes anything, TRL's `SFTTrainer` if not; on the same start either way."""
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTTrainer

    from rpsa.training.trainer import RPSATrainer

    common = {
        "args": training_arguments(recipe, cell, folder, quiet=quiet),
        "train_dataset": dataset,
        "eval_dataset": validation,
        "processing_class": tokenizer,
    }
    if cell.align is None:
        with refusals_of_trl(cell):
            trainer = SFTTrainer(model=starting_model(recipe, cell), **common)
    else:
        fisher, reference = fisher_task(recipe, cell), reference_task(recipe, cell)
        assert fisher is not None
        assert reference is not None
        with refusals_of_trl(cell):
            trainer = RPSATrainer(
                model=starting_model(recipe, cell),
                fisher=FisherDiagonal.load(fisher.folder),
                reference_dataset=ReferenceDataset.load(reference.folder),
                **common,
            )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(recipe: Recipe, cell: Cell, folder: Path, *, quiet: bool) -> Any:
    """The cell's `RPSAConfig`, or `SFTConfig` where nothing is frozen.

    Raises:
        RPSAError: the settings contradict each other, or are not supported.
    """
    from trl import SFTConfig

    from rpsa.training.config import RPSAConfig

    settings = installed_names(cell.train, SFTConfig)
    arguments = {"disable_tqdm": quiet} | settings | {"output_dir": str(folder / CHECKPOINTS)}
    with refusals_of_trl(cell):
        if cell.align is None:
            return SFTConfig(**{"enable_jit_checkpoint": world_size() == 1} | arguments)
        return RPSAConfig(
            **arguments,
            **cell.align.model_dump(),
            reference_max_length=recipe.reference.reference_max_length,
        )


def check_settings(recipe: Recipe) -> None:
    """What TRL or RPSA refuses, a task that is not to be had, a judge or sandbox that is not there: known before
    anything runs."""
    checked = set()
    for cell in recipe.cells():
        key = sha256_of([dict(cell.train), cell.align.model_dump() if cell.align else None])
        if cell.paradigm != "none" and key not in checked:
            training_arguments(recipe, cell, recipe.folder, quiet=True)
            checked.add(key)
    check_evaluation(recipe.evaluate, task_options(recipe))


@contextmanager
def refusals_of_trl(cell: Cell) -> Iterator[None]:
    """What the libraries refuse is a mistake in the recipe: one line that names the run."""
    try:
        yield
    except RPSAError as error:
        raise RPSAError(f"{cell.id}: {error}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise RPSAError(f"{cell.id}: train: {str(error).strip().partition(chr(10))[0]}") from error


def starting_model(recipe: Recipe, cell: Cell) -> Any:
    """The base, under LoRA with the adapter on which the Fisher was measured."""
    model: Any = load_model(cell.base, recipe.model, training_dtype(cell.train, cell.paradigm, recipe.model))
    if cell.paradigm != "lora":
        return model
    fisher = fisher_task(recipe, cell)
    if fisher is None:
        return add_adapter(model, cell)
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(fisher.folder / ADAPTER), is_trainable=True)


def safety_data(safety: Safety, cell_seed: int) -> list[SafetyExample]:
    """D_S as the recipe describes it. Unless it fixes a seed, each seed of the matrix draws its own."""
    if safety.data is None:
        raise RPSAError("safety.data: not given; name a file, a dataset, tiny:refusals or tiny:balanced")
    seed = safety.seed if "seed" in safety.model_fields_set else cell_seed
    if safety.data.startswith("tiny:"):
        kind: Any = safety.data.removeprefix("tiny:")
        examples = safety_examples(kind, safety.n or 256, seed)
    else:
        examples = load_safety_data(safety.data, safety.format, safety.n, seed)
    if safety.benign and safety.benign_share:
        examples = mix_benign(examples, load_benign_data(safety.benign), safety.benign_share, seed)
    return examples


def contaminated(recipe: Recipe, examples: list[SafetyExample]) -> list[Any]:
    """Training examples that the evaluation asks about, too."""
    prompts = [item.prompt for item in load_tasks(recipe.evaluate.tasks, task_options(recipe))]
    found = contamination(examples, prompts)
    if found:
        log.warning(
            "%d safety examples share a prompt or eight words in a row with evaluation prompts; see %s",
            len({c.example for c in found}),
            LOG,
        )
    return found


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    complete = [
        path
        for path in folder.glob("checkpoint-*")
        if (path / "trainer_state.json").is_file() and not (path / "checkpoint-is-incomplete.txt").exists()
    ]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


# evaluate


def make_evaluated(recipe: Recipe, task: Task, folder: Path, progress: Progress) -> None:
    """Answers of one model to every evaluation prompt, graded; stored sample by sample."""
    cell = task.cell
    assert cell is not None
    # the problems of this base's D_ref are no test of it, whatever the method
    options = task_options(recipe, reference_of(recipe, cell.base))
    subject = cell_subject(recipe, cell)
    evaluate(subject, recipe.evaluate, options, folder, progress, earlier=task.folder)


def task_options(recipe: Recipe, reference: Task | None = None) -> TaskOptions:
    """Which items are asked."""
    settings = recipe.evaluate
    folder = str(reference.folder) if reference else None
    return TaskOptions(settings.n, settings.seed, recipe.data_dir, folder, settings.prompt_style)


WORK: dict[Stage, Callable[[Recipe, Task, Path, Progress], None]] = {
    "reference": make_reference,
    "fisher": make_fisher,
    "analyse": make_analysis,
    "align": make_aligned,
    "evaluate": make_evaluated,
}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
