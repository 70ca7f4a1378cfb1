"""Verification (`rpsa verify`): whether a run holds what its recipe asks for, as its stages wrote it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rpsa.artifacts import files_below, read_json, stable_json
from rpsa.errors import RPSAError
from rpsa.recipe.problems import validation_problems
from rpsa.recipe.schema import Recipe

if TYPE_CHECKING:
    from rpsa.pipeline.tasks import Task

_ELSEWHERE = {"model", "problems", "data", "benign", "data_dir"}
"""Inputs from outside of the run: they may have moved, or be on another machine."""


@dataclass
class Findings:
    """Stage folders looked at, what is wrong, and what a run would do again although nothing is wrong."""

    folders: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(run_dir: Path) -> None:
    """Compare a run, or each of a sweep's, with its own recipe and with the hashes that its stages recorded.

    Raises:
        RPSAError: a stage or a file is missing or changed, a result was made with other settings or from another one
            than is there, belongs elsewhere, or there is no run in the folder.
    """
    from rpsa.pipeline.launch import GIVEN

    runs = [run_dir] if (run_dir / GIVEN).is_file() else sorted(p.parent for p in run_dir.glob(f"*/{GIVEN}"))
    if not runs:
        raise RPSAError(f"{run_dir}: no run here ({GIVEN}, the recipe as it was given, is missing)")
    found = Findings()
    for run in runs:
        _look_at(run, _recipe_of(run / GIVEN, run), found)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise RPSAError(f"{found.problems[0]}{more}")
    for note in dict.fromkeys(found.notes):
        print(note)
    print(
        f"{len(found.folders)} stage folders verified: all that the recipe asks for, and every file as it was written"
    )


def _recipe_of(path: Path, run: Path) -> Recipe:
    """The run's own recipe, wherever the folder is now."""
    raw = read_json(path)
    try:
        return Recipe.model_validate(raw | {"output_dir": str(run)} if isinstance(raw, dict) else raw)
    except ValidationError as error:
        raise RPSAError(f"{path}: {validation_problems(error, Recipe)[0]}") from None


def _look_at(run: Path, recipe: Recipe, found: Findings) -> None:
    from rpsa.pipeline.reporting import ReportTask
    from rpsa.pipeline.stages import tasks_of
    from rpsa.pipeline.tasks import MANIFEST, Task, altered_files, is_edited
    from rpsa.provenance import STAGES

    wanted: list[Task] = [task for stage in STAGES[:-1] for task in tasks_of(recipe, stage)]
    if recipe.evaluate.tasks:
        wanted.append(ReportTask(recipe))
    for task in wanted:
        found.folders.add(task.folder)
        found.problems += _problems(task, found.notes)
        found.notes += _strangers(task.folder)
    # what earlier recipes have left in the folder
    for path in sorted(run.rglob(MANIFEST)):
        hidden = any(part.startswith(".") for part in path.relative_to(run).parts)
        if not hidden and path.parent not in found.folders:
            found.folders.add(path.parent)
            found.problems += altered_files(path.parent)
    found.problems += [
        f"{folder / MANIFEST}: edited: its inputs are not those that it has the hash of"
        for folder in sorted(found.folders)
        if is_edited(folder)
    ]


def _strangers(folder: Path) -> list[str]:
    """A line where there are files that the stage has not written: some are loaded by their names."""
    from rpsa.pipeline.tasks import MANIFEST, read_manifest
    from rpsa.provenance import TIMING

    manifest = read_manifest(folder)
    known = {MANIFEST, TIMING, *(manifest["files"] if manifest else ())}
    strange = [name for name in files_below(folder) if name not in known and not name.startswith(".")]
    return (
        [f"{folder}: holds {len(strange)} files that its stage has not written, such as {strange[0]}"]
        if manifest and strange
        else []
    )


def _problems(task: "Task", notes: list[str]) -> Iterator[str]:
    from rpsa.pipeline.runner import failure_of
    from rpsa.pipeline.tasks import MANIFEST, altered_files, outdated, read_manifest

    manifest = read_manifest(task.folder)
    if manifest is None:
        failure = failure_of(task)
        why = f"failed: {failure.why}" if failure else "deleted, or never run"
        there = f"no readable {MANIFEST}" if task.folder.is_dir() else "missing"
        yield f"{task.folder}: {there}: the stage {task.stage} has no result here ({why})"
        return
    yield from altered_files(task.folder)
    if manifest["stage"] != task.stage or manifest.get("place") != task.place:
        yield f"{task.folder}: holds the result of another place, {manifest.get('place')}"
        return
    try:
        inputs = _inputs(task)
    except RPSAError as error:
        notes.append(f"{task.folder}: its inputs cannot be looked at: {error}")
        return
    for key in sorted(_different(manifest["inputs"], inputs)):
        is_of_the_run = key == "model" and isinstance(inputs[key], str)
        if key in _ELSEWHERE and not is_of_the_run:
            notes.append(f"{task.folder}: {key} is another now than when it was made")
        else:
            yield f"{task.folder}: was made with another {key} than the run has"
    if reasons := [one for one in outdated(task.folder, task.stage, inputs) if not one.startswith("another")]:
        notes.append(f"{task.stage}: out of date for rpsa run: {', '.join(reasons)}")


def _inputs(task: "Task") -> dict[str, Any]:
    from rpsa.pipeline.reporting import report_inputs

    inputs = report_inputs(task.recipe, current=False) if task.stage == "report" else task.inputs()
    found: dict[str, Any] = json.loads(stable_json(inputs))
    return found


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Inputs that disagree. What only one of the two knows is a setting of another version."""
    return {key for key in before.keys() & now.keys() if not _agree(before[key], now[key])}


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return not _different(one, other)
    return bool(one == other)
