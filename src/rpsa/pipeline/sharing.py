"""Runs that have tasks in common: what one run has finished, another takes over instead of doing it again."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from rpsa.artifacts import atomic_directory, locked
from rpsa.errors import RPSAError
from rpsa.pipeline.manifests import MANIFEST, STAGES, is_current
from rpsa.pipeline.results import report_inputs
from rpsa.pipeline.tasks import inputs_of, tasks_of, unfinished
from rpsa.recipe.schema import Recipe

_STAGES = STAGES[:-1]  # the report has no tasks


def is_finished(recipe: Recipe) -> bool:
    """Whether every stage of the run is there, and up to date."""
    if any(unfinished(recipe, tasks_of(recipe, stage)) for stage in _STAGES):
        return False
    return is_current(recipe.folder / "report", "report", report_inputs(recipe))


def take_over(recipe: Recipe, others: Iterable[Path]) -> None:
    """Link into the run each task's result that one of the `others`, folders of runs, has for the very same inputs.

    D_ref, a Fisher, the untouched model's evaluation, a method that a swept setting does not concern: a task's inputs
    decide, results that it stands on included.
    """
    others = list(others)
    with locked(recipe.folder):
        _take_over(recipe, others)


def _take_over(recipe: Recipe, others: Sequence[Path]) -> None:
    for stage in _STAGES:
        for task in tasks_of(recipe, stage):
            try:
                inputs = inputs_of(recipe, task)
            except RPSAError:  # what it stands on is still to be made
                continue
            if is_current(task.folder, stage, inputs):
                continue
            places = (other / task.folder.relative_to(recipe.folder) for other in others)
            source = next((place for place in places if is_current(place, stage, inputs)), None)
            if source is not None:
                with atomic_directory(task.folder, MANIFEST) as folder:
                    shutil.copytree(source, folder, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    """A model is large, and no stage changes a finished file; some disks have no hard links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
