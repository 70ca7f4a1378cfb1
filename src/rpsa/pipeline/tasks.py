"""What a recipe asks for, as tasks: each fills one folder of the run, and is done again only if its inputs change."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpsa.artifacts import folder_name, sha256_of
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.loading import local_benchmarks
from rpsa.evaluation.sources import DATA_DIR
from rpsa.pipeline.manifests import Stage, is_current, outdated, read_manifest
from rpsa.pipeline.models import identity, training_dtype
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import Fisher, Safety
from rpsa.recipe.sources import SHIPPED

FISHER_MAP = "fisher-map"
_FISHER_COSTS = {"batch_size", "activation_checkpointing"}
"""Settings of the section fisher that do not change it."""


Progress = Callable[[int, int], None]
"""Called with what is done and what there is."""


def no_progress(done: int, total: int) -> None:
    """For a run beside others, whose output would be in the way."""


@dataclass(frozen=True)
class Task:
    """One unit of work. `cell` is None where a task serves several cells, as D_ref and a full model's Fisher do.

    `fisher` says how a Fisher is estimated.
    """

    stage: Stage
    name: str
    folder: Path
    base: str
    cell: Cell | None = None
    fisher: Fisher = field(default_factory=Fisher)


def tasks_of(recipe: Recipe, stage: Stage) -> list[Task]:
    """The tasks of a stage, without repetition. Nothing is measured that no method of the matrix uses."""
    if stage == "analyse":
        return analysis_tasks(recipe)
    if stage == "evaluate" and not recipe.evaluate.tasks:
        return []
    makers: dict[Stage, Callable[[Recipe, Cell], Task | None]] = {
        "reference": reference_task,
        "fisher": fisher_task,
        "align": align_task,
        "evaluate": evaluate_task,
    }
    found = (makers[stage](recipe, cell) for cell in recipe.cells())
    return list({task.folder: task for task in found if task is not None}.values())


def reference_task(recipe: Recipe, cell: Cell) -> Task | None:
    return _reference(recipe, cell.base) if cell.needs_reference else None


def _reference(recipe: Recipe, base: str) -> Task:
    return Task("reference", base, recipe.folder / "reference" / folder_name(base), base)


def fisher_task(recipe: Recipe, cell: Cell) -> Task | None:
    if not cell.needs_fisher:
        return None
    folder = recipe.folder / "fisher" / folder_name(cell.base)
    own = _own_fisher(recipe, cell.fisher)
    if cell.paradigm == "fft":
        return Task("fisher", f"{cell.base}{own}", folder / f"full{own}", cell.base, fisher=cell.fisher)
    # F depends on the adapter's random start
    start = sha256_of({"lora": dict(cell.lora), "seed": cell.seed})[:8]
    name = f"{cell.base} lora seed{cell.seed}{own}"
    return Task("fisher", name, folder / f"lora-{start}{own}", cell.base, cell, cell.fisher)


def _own_fisher(recipe: Recipe, fisher: Fisher) -> str:
    """What tells a method's own Fisher from the recipe's in a folder's name."""
    settings = [_fisher_settings(one) for one in (fisher, recipe.fisher)]
    return "" if settings[0] == settings[1] else f"-{fisher.estimator}-{sha256_of(settings[0])[:8]}"


def _fisher_settings(fisher: Fisher) -> dict[str, Any]:
    settings = fisher.model_dump(exclude=_FISHER_COSTS)
    if settings["precision"] == "fp32":  # what runs were made in before there was a choice
        del settings["precision"]
    return settings


def analysis_tasks(recipe: Recipe) -> list[Task]:
    """Fig. 1 and 2 of all bases whose full Fisher is measured, and Fig. 3 of each."""
    bases = [task.base for task in full_fishers(recipe)]
    tasks = []
    if recipe.analysis.fisher_map and bases:
        tasks.append(Task("analyse", FISHER_MAP, recipe.folder / "analyse" / FISHER_MAP, bases[0]))
    if recipe.analysis.perturb:
        folder = recipe.folder / "analyse" / "perturb"
        tasks += [Task("analyse", f"perturb {base}", folder / folder_name(base), base) for base in bases]
    return tasks


def full_fishers(recipe: Recipe) -> list[Task]:
    """The Fishers of whole models, by the recipe's own estimator."""
    found = (fisher_task(recipe, cell) for cell in recipe.cells() if cell.paradigm == "fft")
    tasks = {task.folder: task for task in found if task is not None and task.folder.name == "full"}
    return list(tasks.values())


def align_task(recipe: Recipe, cell: Cell) -> Task | None:
    if cell.paradigm == "none":
        return None
    return Task("align", cell.id, recipe.folder / "align" / cell.id, cell.base, cell)


def evaluate_task(recipe: Recipe, cell: Cell) -> Task:
    return Task("evaluate", cell.id, recipe.folder / "evaluate" / cell.id, cell.base, cell)


def place_of(recipe: Recipe, task: Task) -> str:
    """Where in the run the task's folder is."""
    return task.folder.relative_to(recipe.folder).as_posix()


def unfinished_folder(task: Task, key: str) -> Path:
    """Where a result grows; `key` is the identity that it will have."""
    return task.folder.with_name(f".{task.folder.name}.{key[:8]}.unfinished")


def unfinished_folders(task: Task) -> list[Path]:
    """All that has been begun and not finished of a task, for whatever inputs."""
    pattern = re.compile(re.escape(f".{task.folder.name}.") + r"[0-9a-f]{8}\.unfinished")
    siblings = task.folder.parent.iterdir() if task.folder.parent.is_dir() else ()
    return sorted(path for path in siblings if pattern.fullmatch(path.name))


def failure_file(task: Task) -> Path:
    """Where it is kept why the task has no result."""
    return task.folder.with_name(f".{task.folder.name}.failed")


def stands_on(recipe: Recipe, task: Task) -> list[Task]:
    """The tasks whose results this one takes."""
    cell = task.cell
    needed: list[Task | None] = []
    if task.stage == "fisher":
        needed = [_reference(recipe, task.base)]
    elif task.stage == "analyse":
        needed = [f for f in full_fishers(recipe) if task.name == FISHER_MAP or f.base == task.base]
    elif task.stage == "align":
        assert cell is not None
        needed = [reference_task(recipe, cell), fisher_task(recipe, cell)]
    elif task.stage == "evaluate":
        assert cell is not None
        needed = [align_task(recipe, cell)]
        if _leaves_problems_out(recipe):
            needed.append(reference_of(recipe, cell.base))
    return [one for one in needed if one is not None]


def is_done(recipe: Recipe, task: Task) -> bool:
    """Whether the task's folder holds its result for the present inputs."""
    return is_current(task.folder, task.stage, inputs_of(recipe, task))


def why_not(recipe: Recipe, task: Task) -> str | None:
    """Why the task's result is not what the recipe asks for, all that it stands on included; None if it is."""
    for needed in stands_on(recipe, task):
        if reason := why_not(recipe, needed):
            return f"{needed.stage} {needed.name}: {reason}"
    reasons = outdated(task.folder, task.stage, inputs_of(recipe, task))
    return ", ".join(reasons) or None


def inputs_of(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Everything that decides the task's result: settings, models, data, and the results that it stands on."""
    model = identity(task.base, recipe.model) | recipe.model.model_dump(exclude={"name"})
    if task.stage == "reference":
        problems = recipe.reference.problems or ""
        return {
            "model": model,
            "reference": recipe.reference.model_dump(
                exclude={"reference_max_length", "batch_size", "engine"}
            ),
            "problems": source_identity(problems, "problems"),
        }
    cell = task.cell
    if task.stage == "fisher":
        return {
            "reference": upstream(_reference(recipe, task.base)),
            "reference_max_length": recipe.reference.reference_max_length,
            "fisher": _fisher_settings(task.fisher),
            "adapter": {"lora": dict(cell.lora), "seed": cell.seed} if cell else None,
            "dtype": training_dtype(cell.train if cell else {}, "lora" if cell else "fft", recipe.model),
        }
    if task.stage == "analyse":
        if task.name == FISHER_MAP:
            fishers = [upstream(fisher) for fisher in full_fishers(recipe)]
            return {"fishers": fishers, "k": recipe.analysis.fisher_map}
        assert recipe.analysis.perturb is not None
        return {
            "fisher": [upstream(fisher) for fisher in full_fishers(recipe) if fisher.base == task.base],
            "perturb": recipe.analysis.perturb.model_dump(),
            "evaluate": recipe.evaluate.model_dump(exclude={"batch_size"}),
            "data": tasks_identity(recipe.evaluate.tasks, recipe.data_dir),
            "data_dir": recipe.data_dir,
        }
    assert cell is not None
    if task.stage == "align":
        assert cell.safety is not None
        fisher = fisher_task(recipe, cell)
        return {
            "model": model,
            "paradigm": cell.paradigm,
            "seed": cell.seed,
            "train": dict(cell.train),
            "lora": dict(cell.lora),
            "align": cell.align.model_dump() if cell.align else None,
            "safety": cell.safety.model_dump(),
            "data": source_identity(cell.safety.data or "", "safety"),
            "fisher": upstream(fisher) if fisher else None,
            **(_alternatives(recipe, cell) if cell.alternatives else {}),
            **_benign_file(cell.safety),
        }
    aligned = align_task(recipe, cell)
    return {
        "model": upstream(aligned) if aligned else model,
        "evaluate": recipe.evaluate.model_dump(exclude={"batch_size"}),
        "data": tasks_identity(recipe.evaluate.tasks, recipe.data_dir),
        "data_dir": recipe.data_dir,
        "reference": _problems_left_out(recipe, cell),
    }


def _alternatives(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """The inputs of a method that does something else than freezing, or beside it."""
    assert cell.alternatives is not None
    reference = reference_task(recipe, cell) if cell.alternatives.needs_reference else None
    projects = cell.alternatives.projection is not None
    return {
        "alternatives": cell.alternatives.model_dump(),
        "reference": upstream(reference) if reference else None,
        "reference_max_length": recipe.reference.reference_max_length if projects else None,
    }


def reference_of(recipe: Recipe, base: str) -> Task | None:
    """The D_ref of a base, if any method of the matrix has one."""
    tasks = (reference_task(recipe, cell) for cell in recipe.cells() if cell.base == base)
    return next((task for task in tasks if task is not None), None)


def _problems_left_out(recipe: Recipe, cell: Cell) -> str | None:
    reference = reference_of(recipe, cell.base) if _leaves_problems_out(recipe) else None
    return upstream(reference) if reference else None


def _leaves_problems_out(recipe: Recipe) -> bool:
    """MATH-500 as a test leaves out what D_ref has, so that its result stands on D_ref."""
    return "rpsa_math500" in recipe.evaluate.tasks


def upstream(task: Task) -> str:
    """The identity of a finished task's result.

    Raises:
        RPSAError: it has not been run.
    """
    manifest = read_manifest(task.folder)
    if manifest is None:
        raise RPSAError(
            f"stage {task.stage} has no result in {task.folder}: run the recipe without --only, or that stage first"
        )
    return str(manifest["inputs_sha256"])


def source_identity(source: str, kind: str) -> Any:
    path = Path(source)
    if source in SHIPPED[kind] or not path.exists():
        return source
    return {"path": source, "sha256": sha256_of(path)}


def tasks_identity(tasks: Sequence[str], data_dir: str | None) -> list[Any]:
    """What the tasks read: their names, the user's own files and the benchmarks' files in `data_dir` by content.

    Without a `data_dir`, files are looked for in $RPSA_DATA_DIR.
    """
    folder = data_dir or os.environ.get(DATA_DIR)
    files = local_benchmarks(tasks, folder) if folder else {}
    return [
        *(source_identity(source, "task") for source in tasks),
        *({"benchmark": name, "sha256": sha256_of(path)} for name, path in files.items()),
    ]


def _benign_file(safety: Safety) -> dict[str, Any]:
    """A key only where a file is read: other runs keep the inputs that they had before it counted."""
    found = source_identity(safety.benign, "safety") if safety.benign and safety.benign_share else None
    return {"benign": found} if isinstance(found, dict) else {}


def unfinished(recipe: Recipe, tasks: Iterable[Task]) -> list[Task]:
    return [task for task in tasks if not is_done(recipe, task)]


def task_options(recipe: Recipe, reference: Task | None = None) -> TaskOptions:
    """Which items are asked."""
    settings = recipe.evaluate
    folder = str(reference.folder) if reference else None
    return TaskOptions(settings.n, settings.seed, recipe.data_dir, folder, settings.prompt_style)
