"""The stages of a study, each a kind of task: what `rpsa.pipeline.groundwork` has, analyses, alignment, evaluation.

Stages fill the folders of a run in this order. Two cells that need the same thing (a base's D_ref, a whole model's
Fisher) have one task between them: tasks are equal where their places are.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rpsa.artifacts import folder_name, sha256_of
from rpsa.evaluation.robustness.attacks import Attack, Target, asked_under_attack, attacks_of, sources_of
from rpsa.models import (
    identity,
)
from rpsa.pipeline.groundwork import (
    FisherTask,
    HeldOutTask,
    ReferenceTask,
    SafetyTask,
    model_inputs,
)
from rpsa.pipeline.tasks import Task, policies_identity, source_identity, task_options, tasks_identity
from rpsa.pipeline.tracking import TRACKING, tracked
from rpsa.progress import Progress
from rpsa.provenance import Stage
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import OF_SELF_MADE, Alternatives, Evaluate, Safety

if TYPE_CHECKING:
    from rpsa.evaluation.benchmarks import TaskOptions
    from rpsa.evaluation.original import HeldOut
    from rpsa.pipeline.alignment import Groundwork

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FisherMapTask(Task):
    """Fig. 1 and 2 of all bases whose full Fisher is measured."""

    stage: ClassVar[Stage] = "analyse"
    name = "fisher-map"
    place = "analyse/fisher-map"

    def needs(self) -> list[FisherTask]:
        return full_fishers(self.recipe)

    def inputs(self) -> dict[str, Any]:
        return {"fishers": [fisher.result() for fisher in self.needs()], "k": self.recipe.analysis.fisher_map}

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.pipeline.analyses import fisher_map

        fisher_map([fisher.folder for fisher in self.needs()], self.recipe.analysis.fisher_map, folder)


@dataclass(frozen=True)
class PerturbationTask(Task):
    """Fig. 3: the perturbation of one base by its full Fisher."""

    fisher: FisherTask

    stage: ClassVar[Stage] = "analyse"

    @property
    def name(self) -> str:
        return f"perturb {self.fisher.base}"

    @property
    def place(self) -> str:
        return f"analyse/perturb/{folder_name(self.fisher.base)}"

    def needs(self) -> list[FisherTask]:
        return [self.fisher]

    def inputs(self) -> dict[str, Any]:
        recipe = self.recipe
        assert recipe.analysis.perturb is not None
        return {
            "fisher": [self.fisher.result()],
            "perturb": recipe.analysis.perturb.model_dump(),
            "evaluate": recipe.evaluate.model_dump(exclude={"batch_size"}),
            "data": tasks_identity(recipe.evaluate.tasks, recipe.data_dir),
            "data_dir": recipe.data_dir,
        }

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.pipeline.analyses import PerturbationConfig, run_perturbation

        recipe, settings = self.recipe, self.recipe.analysis.perturb
        assert settings is not None
        config = PerturbationConfig(
            tuple(settings.fractions), tuple(settings.factors), tuple(settings.selections), settings.draws
        )
        run_perturbation(
            *(self.fisher.base, self.fisher.folder, recipe.evaluate, config),
            *(folder, recipe.data_dir, recipe.model),
            earlier=self.earlier_folders(folder),
            progress=progress,
        )


@dataclass(frozen=True)
class CellTask(Task):
    """What one run of the matrix or of a sweep needs for itself alone."""

    cell: Cell

    @property
    def name(self) -> str:
        return self.cell.id

    @property
    def title(self) -> str:
        return self.stage

    @property
    def kind(self) -> str:
        return f"{self.stage} {self.cell.method}"

    @property
    def place(self) -> str:
        return f"{self.stage}/{self.cell.id}"


@dataclass(frozen=True)
class AlignTask(CellTask):
    """One cell's fine-tuning on safety data, plainly or with RPSA."""

    stage: ClassVar[Stage] = "align"

    def needs(self) -> list[Task]:
        of_cell = (reference_task, fisher_task, watched_task, safety_task)
        tasks = (task(self.recipe, self.cell) for task in of_cell)
        return [task for task in tasks if task is not None]

    def inputs(self) -> dict[str, Any]:
        cell = self.cell
        assert cell.safety is not None
        fisher = fisher_task(self.recipe, cell)
        inputs = {
            "model": model_inputs(self.recipe, cell.base),
            "paradigm": cell.paradigm,
            # a key only where it is not what all runs were before there was a choice
            **({"trainer": cell.trainer} if cell.trainer != "sft" else {}),
            "seed": cell.seed,
            "train": {name: value for name, value in cell.train.items() if name not in TRACKING},
            "lora": dict(cell.lora),
            "align": cell.align.model_dump() if cell.align else None,
            "safety": _safety_settings(cell.safety),
            "data": source_identity(cell.safety.data or "", "safety"),
            "fisher": fisher.result() if fisher else None,
        }
        if cell.alternatives:
            reference = reference_task(self.recipe, cell) if cell.alternatives.needs_reference else None
            longest = self.recipe.reference.reference_max_length
            has_cut = cell.alternatives.projection is not None or cell.alternatives.has_anchor
            inputs |= {
                "alternatives": _alternatives_settings(cell.alternatives),
                "reference": reference.result() if reference else None,
                "reference_max_length": longest if has_cut else None,
            }
        own_data = safety_task(self.recipe, cell)
        if own_data is not None:
            inputs |= {"self_made": own_data.result()}
        elif cell.safety.benign and cell.safety.benign_share:
            benign = source_identity(cell.safety.benign, "safety")
            # a key only where a file is read: other runs keep the inputs that they had before it counted
            inputs |= {"benign": benign} if isinstance(benign, dict) else {}
        if cell.safety.keep_best == "safety_and_reasoning" and (watched := watched_task(self.recipe, cell)):
            longest = self.recipe.reference.reference_max_length
            inputs |= {"held_out": {"traces": watched.result(), "max_length": longest}}
        return inputs

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.pipeline.alignment import align

        with tracked(self.recipe, self.cell):
            align(self.recipe, self.cell, self.groundwork, folder, progress)

    @property
    def groundwork(self) -> "Groundwork":
        """Where the results are that alignment takes."""
        from rpsa.pipeline.alignment import Groundwork

        recipe, cell = self.recipe, self.cell
        of_cell = (fisher_task, reference_task, watched_task, safety_task)
        tasks = (task(recipe, cell) for task in of_cell)
        return Groundwork(*(task.folder if task else None for task in tasks))


def _safety_settings(safety: Safety) -> dict[str, Any]:
    # runs on other data keep the inputs that they had before these settings were there
    settings = safety.model_dump(exclude=set(OF_SELF_MADE))
    if settings["keep_best"] is None:  # what runs were made with before there was a choice
        del settings["keep_best"]
    return settings


def _alternatives_settings(alternatives: Alternatives) -> dict[str, Any]:
    """Without what says nothing here: the inputs of others are what they were before there was a choice."""
    unused = set() if alternatives.has_anchor else set(alternatives.anchoring)
    unused |= set() if alternatives.projection == "nullspace" else {"nullspace_energy"}
    return alternatives.model_dump(exclude=unused)


@dataclass(frozen=True)
class EvaluateTask(CellTask):
    """Answers of one cell's model to every evaluation prompt, graded; stored sample by sample."""

    stage: ClassVar[Stage] = "evaluate"

    @property
    def _left_out(self) -> ReferenceTask | None:
        """MATH-500 as a test leaves out what D_ref has, so that its result stands on D_ref."""
        needed = "rpsa_math500" in self.recipe.evaluate.tasks
        return reference_of(self.recipe, self.cell.base) if needed else None

    def needs(self) -> list[Task]:
        recipe, base = self.recipe, self.cell.base
        tasks = (align_task(recipe, self.cell), self._left_out, held_out_task(recipe, base))
        return [task for task in tasks if task is not None]

    def inputs(self) -> dict[str, Any]:
        recipe, aligned, left_out = self.recipe, align_task(self.recipe, self.cell), self._left_out
        held_out = held_out_task(recipe, self.cell.base)
        longest = recipe.reference.reference_max_length
        measured = {"traces": held_out.result(), "max_length": longest} if held_out else None
        return {
            "model": aligned.result() if aligned else model_inputs(recipe, self.cell.base),
            "evaluate": recipe.evaluate.model_dump(exclude={"batch_size"}),
            **policies_identity(recipe.evaluate),
            "data": tasks_identity(recipe.evaluate.tasks, recipe.data_dir),
            "data_dir": recipe.data_dir,
            "reference": left_out.result() if left_out else None,
            **({"held_out": measured} if measured else {}),
        }

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.evaluation.run import evaluate

        evaluate(
            self.subject(),
            self.recipe.evaluate,
            self.options,
            folder,
            progress,
            self.earlier_folders(folder),
            self.held_out,
        )

    @property
    def options(self) -> "TaskOptions":
        """The problems of this base's D_ref are not a test of it, whatever the method."""
        reference = reference_of(self.recipe, self.cell.base)
        return task_options(self.recipe, reference.folder if reference else None)

    @property
    def held_out(self) -> "HeldOut | None":
        """What the reasoning loss is measured on."""
        from rpsa.evaluation.original import HeldOut

        task, longest = (
            held_out_task(self.recipe, self.cell.base),
            self.recipe.reference.reference_max_length,
        )
        return HeldOut(task.folder, self.cell.base, longest, self.recipe.model) if task else None

    def subject(self) -> Any:
        """The model that the cell's alignment left, or its untouched base."""
        return target_of(self.recipe, self.cell).subject(self.recipe.evaluate)


def target_of(recipe: Recipe, cell: Cell) -> Target:
    """The model that a cell's alignment left, or its untouched base, which there is nothing to merge with."""
    task = align_task(recipe, cell)
    if task is None:
        return Target(sha256_of(identity(cell.base, recipe.model)), cell.base, None, None, recipe.model)
    folder = str(task.folder)
    weights, adapter = (cell.base, folder) if cell.paradigm == "lora" else (folder, None)
    return Target(task.result(), weights, adapter, cell.base, recipe.model)


@dataclass(frozen=True)
class RobustnessTask(CellTask):
    """One cell's evaluation under one attack, on requests unless the recipe says otherwise."""

    attack: Attack

    stage: ClassVar[Stage] = "robustness"

    @property
    def name(self) -> str:
        return f"{self.cell.id} {self.attack.name}"

    @property
    def kind(self) -> str:
        return f"{self.stage} {self.attack.kind}"

    @property
    def place(self) -> str:
        return f"{self.stage}/{self.cell.id}/{self.attack.name}"

    @property
    def evaluation(self) -> EvaluateTask:
        """Of the same model without the attack."""
        return EvaluateTask(self.recipe, self.cell)

    @property
    def settings(self) -> Evaluate:
        assert self.recipe.robustness is not None
        return asked_under_attack(self.recipe.robustness, self.recipe.evaluate, self.evaluation.options)

    def needs(self) -> list[Task]:
        return self.evaluation.needs()

    def inputs(self) -> dict[str, Any]:
        recipe, settings = self.recipe, self.settings
        found = self.evaluation.inputs() | {
            "evaluate": settings.model_dump(exclude={"batch_size"}),
            "data": tasks_identity(settings.tasks, recipe.data_dir),
            "attack": {"kind": self.attack.kind, **self.attack.settings},
            "rows": [source_identity(source, "rows") for source in sources_of(self.attack)],
        }
        if self.attack.kind == "merge":
            found |= {"base": model_inputs(recipe, self.cell.base)}
        if not self.attack.changes_weights:
            found.pop("held_out", None)
        return found

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.evaluation.run import evaluate

        settings, evaluated = self.settings, self.evaluation
        # what an attack by the prompt leaves alone has been said already
        earlier = [
            *self.earlier_folders(folder),
            *([] if self.attack.changes_weights else [evaluated.folder]),
        ]
        held_out = evaluated.held_out if self.attack.changes_weights else None
        subject = target_of(self.recipe, self.cell).subject(settings, self.attack)
        evaluate(subject, settings, evaluated.options, folder, progress, earlier, held_out)


# which tasks a recipe has


def tasks_of(recipe: Recipe, stage: Stage) -> list[Task]:
    """The tasks of a stage, without repetition. Nothing is measured that no method of the matrix uses."""
    if stage == "analyse":
        return list(analysis_tasks(recipe))
    if stage == "robustness":
        return list(robustness_tasks(recipe))
    if stage == "evaluate" and not recipe.evaluate.tasks:
        return []
    of_cell: dict[Stage, Callable[[Recipe, Cell], Task | None]] = {
        "reference": reference_task,
        "fisher": fisher_task,
        "safety": safety_task,
        "align": align_task,
        "evaluate": EvaluateTask,
    }
    found = [of_cell[stage](recipe, cell) for cell in recipe.cells()]
    if stage == "reference":
        found += [held_out_task(recipe, base) for base in recipe.bases if _is_held_out(recipe, base)]
    return list({task.place: task for task in found if task is not None}.values())


def reference_task(recipe: Recipe, cell: Cell) -> ReferenceTask | None:
    return ReferenceTask(recipe, cell.base) if cell.needs_reference else None


def reference_of(recipe: Recipe, base: str) -> ReferenceTask | None:
    """The D_ref of a base, if any method of the matrix has one."""
    has_one = any(cell.needs_reference for cell in recipe.cells() if cell.base == base)
    return ReferenceTask(recipe, base) if has_one else None


def held_out_task(recipe: Recipe, base: str) -> HeldOutTask | None:
    """None where the recipe names no reasoning problems, or asks for no reasoning loss."""
    settings = recipe.reference
    return HeldOutTask(recipe, base) if settings.problems is not None and settings.held_out else None


def watched_task(recipe: Recipe, cell: Cell) -> HeldOutTask | None:
    """The held-out traces on which the reasoning loss is measured while the cell is trained: if it is evaluated."""
    return held_out_task(recipe, cell.base) if cell.evaluates_in_training else None


def _is_held_out(recipe: Recipe, base: str) -> bool:
    """Whether anything is measured on a base's held-out traces."""
    cells = [cell for cell in recipe.cells() if cell.base == base]
    return bool(recipe.evaluate.tasks and cells) or any(watched_task(recipe, cell) for cell in cells)


def fisher_task(recipe: Recipe, cell: Cell) -> FisherTask | None:
    if not cell.needs_fisher:
        return None
    return FisherTask(recipe, cell.base, cell.fisher, cell if cell.starts_from_fisher else None)


def safety_task(recipe: Recipe, cell: Cell) -> SafetyTask | None:
    """Where the cell's safety data are the model's own."""
    if cell.safety is None or not cell.safety.is_self_made:
        return None
    return SafetyTask(recipe, cell.base, cell.safety, cell.safety.drawing_seed(cell.seed))


def align_task(recipe: Recipe, cell: Cell) -> AlignTask | None:
    return AlignTask(recipe, cell) if cell.paradigm != "none" else None


def analysis_tasks(recipe: Recipe) -> list[FisherMapTask | PerturbationTask]:
    """Fig. 1 and 2 of all bases whose full Fisher is measured, and Fig. 3 of each."""
    fishers = full_fishers(recipe)
    tasks: list[FisherMapTask | PerturbationTask] = []
    if recipe.analysis.fisher_map and fishers:
        tasks.append(FisherMapTask(recipe))
    if recipe.analysis.perturb:
        tasks += [PerturbationTask(recipe, fisher) for fisher in fishers]
    return tasks


def robustness_tasks(recipe: Recipe) -> list[RobustnessTask]:
    """Every attack on every cell of the matrix; a sweep's are not attacked."""
    if recipe.robustness is None:
        return []
    return [
        RobustnessTask(recipe, cell, attack)
        for cell in recipe.cells()
        if cell.sweep is None
        for attack in attacks_of(recipe.robustness, has_base=cell.paradigm != "none")
    ]


def full_fishers(recipe: Recipe) -> list[FisherTask]:
    """The Fishers of whole models, by the recipe's own estimator."""
    found = (fisher_task(recipe, cell) for cell in recipe.cells())
    return list({task.place: task for task in found if task is not None and task.is_whole_model}.values())
