"""`rpsa status`: what of a run is done, what runs, what failed, and how long the rest may take; from another shell."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rpsa.errors import RPSAError
from rpsa.pipeline.launch import GIVEN
from rpsa.pipeline.live import Pulse, TimeLeft, is_finished, left_in_words, pulse_of
from rpsa.pipeline.runner import failure_of
from rpsa.pipeline.stages import tasks_of
from rpsa.pipeline.tasks import Task
from rpsa.provenance import STAGES, Stage
from rpsa.recipe import load_recipe
from rpsa.recipe.schema import Recipe


@dataclass(frozen=True)
class StageStatus:
    """The tasks of a stage: how many there are and have a result; those that run, by name; why others have none."""

    stage: Stage
    tasks: int
    finished: int
    running: dict[str, Pulse]
    failed: dict[str, str]

    def lines(self) -> Iterator[str]:
        counts = [f"{self.finished} of {self.tasks}"]
        counts += [f"{len(self.running)} running"] if self.running else []
        counts += [f"{len(self.failed)} failed"] if self.failed else []
        yield f"{self.stage:10} {', '.join(counts)}"
        for name, pulse in self.running.items():
            yield f"  {name}: {pulse if pulse.is_alive else 'its process is gone'}"
        for name, why in self.failed.items():
            yield f"  {name}: failed: {why}"


@dataclass(frozen=True)
class RunStatus:
    """A whole run; `left` is in words, empty where nothing is known or left."""

    folder: Path
    stages: list[StageStatus]
    left: str

    @property
    def is_running(self) -> bool:
        return any(pulse.is_alive for stage in self.stages for pulse in stage.running.values())

    def lines(self) -> Iterator[str]:
        done = all(stage.finished == stage.tasks for stage in self.stages)
        state = "running" if self.is_running else "finished" if done else "not running"
        yield f"{self.folder}: {state}" + (f", {self.left}" if self.left else "")
        for stage in self.stages:
            yield from stage.lines()


def run_status(folder: Path) -> RunStatus:
    """What can be seen in a run's folder. Results count as finished whatever inputs they are of.

    Raises:
        RPSAError: there is no run in it.
    """
    recipe = recipe_of_run(folder)
    tasks = {stage: tasks_of(recipe, stage) for stage in STAGES if stage != "report"}
    stages = [_stage_status(stage, found) for stage, found in tasks.items() if found]
    return RunStatus(folder, stages, _left(recipe, [task for found in tasks.values() for task in found]))


def recipe_of_run(folder: Path) -> Recipe:
    """The recipe of the run in a folder, which may have been moved.

    Raises:
        RPSAError: there is no run in it.
    """
    given = folder / GIVEN
    if not given.is_file():
        raise RPSAError(
            f"{folder}: no run is here (it has no {GIVEN}); name the folder that `rpsa run` writes to"
        )
    return load_recipe(given, [f"output_dir={folder}"])


def _stage_status(stage: Stage, tasks: list[Task]) -> StageStatus:
    running = {task.name: pulse for task in tasks if (pulse := pulse_of(task)) is not None}
    failures = {task.name: failure for task in tasks if (failure := failure_of(task)) is not None}
    failed = {name: failure.why for name, failure in failures.items() if name not in running}
    return StageStatus(stage, len(tasks), sum(map(is_finished, tasks)), running, failed)


def _left(recipe: Recipe, tasks: list[Task]) -> str:
    estimate = TimeLeft()
    estimate.learn(tasks)
    waiting = [task for task in tasks if not is_finished(task) and failure_of(task) is None]
    return left_in_words(*estimate.left(waiting, recipe.matrix.parallel)) if waiting else ""
