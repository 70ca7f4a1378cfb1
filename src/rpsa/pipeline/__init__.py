"""`rpsa run`: reference traces -> Fisher -> alignment -> evaluation -> report, each stage only where inputs changed."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import atomic_directory, atomic_write, locked, stable_json
from rpsa.errors import RPSAError
from rpsa.pipeline.verification import verify
from rpsa.recipe.schema import Recipe
from rpsa.text import printable

if TYPE_CHECKING:
    from rpsa.pipeline.manifests import Stage
    from rpsa.pipeline.runner import Failure
    from rpsa.pipeline.tasks import Task

__all__ = ["run", "verify"]

log = logging.getLogger(__name__)


def run(recipe: Recipe, *, only: str | None = None, keep_finished: bool = False) -> Path:
    """Bring a recipe's run up to date, or one stage of it; returns the run's folder.

    Args:
        keep_finished: leave results alone that other versions of packages or of this one have made.

    Raises:
        RPSAError: `only` is no stage, what it stands on has not been run, another process is in the run's folder, or
            some tasks have failed; the others have been done then, and the report shows what is missing.
    """
    from rpsa.pipeline import launch
    from rpsa.pipeline.manifests import STAGES
    from rpsa.recipe.problems import did_you_mean

    if only is not None and only not in STAGES:
        raise RPSAError(f"--only: there is no stage {only!r}{did_you_mean(only, STAGES)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING if launch.is_first() else logging.ERROR, format="%(message)s")
    stages = [stage for stage in STAGES if only in (None, stage)]
    launch.check(recipe, stages)
    with _alone_in(recipe):
        work = _Run(recipe, keep_finished)
        with launch.joined(recipe):
            work.do([stage for stage in stages if stage != "report"])
        missing = _report(recipe, work.without_result) if "report" in stages else {}
    if work.failed:
        raise RPSAError(_summary(work.failed))
    if missing:
        name, why = next(iter(missing.items()))
        raise RPSAError(f"the report lacks {len(missing)} results; the first: {name}: {why}")
    return recipe.folder


@contextmanager
def _alone_in(recipe: Recipe) -> Iterator[None]:
    """One process holds the folder of a run for all that it has launched, on other machines, too."""
    from rpsa.pipeline import launch

    elsewhere = recipe.launch is not None and recipe.launch.machine_rank
    if launch.MARK in os.environ or elsewhere or not launch.is_first():
        yield
        return
    with locked(recipe.folder):
        yield


class _Run:
    """Does a recipe's tasks, in this process, in `matrix.parallel` workers, or through `accelerate launch`.

    `failed` has a line for each task that failed; `without_result` its folder, and those of what stands on it, with
    the reason.
    """

    def __init__(self, recipe: Recipe, keep_finished: bool) -> None:
        self.recipe = recipe
        self.keep_finished = keep_finished
        self.failed: list[str] = []
        self.without_result: dict[Path, str] = {}
        self._stack = ExitStack()
        self._executor: Any = None
        self._bar: Any = None
        self._is_prepared = False

    def do(self, stages: "list[Stage]") -> None:
        """Bring the stages up to date."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from rpsa.pipeline.tasks import tasks_of
        from rpsa.sharding import rank

        columns = (
            TextColumn("{task.description:10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}", style="dim", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True), disable=rank() > 0) as self._bar, self._stack:
            for stage in stages:
                tasks = tasks_of(self.recipe, stage)
                if not tasks:
                    continue
                waiting = self._waiting(tasks)
                if waiting:
                    self._prepare()
                done = len(tasks) - len(waiting)
                line = self._bar.add_task(stage, total=len(tasks), completed=done, now="")
                for task, failure in self._attempts(stage, waiting):
                    if failure is not None:
                        self._fail(task, failure.why)
                    self._bar.update(line, advance=1, now=printable(task.name))
                self._bar.update(line, now="" if waiting else "up to date")
        if not self._is_prepared:
            _record(self.recipe)

    def _waiting(self, tasks: "list[Task]") -> "list[Task]":
        """Those to be done now: not finished, and with results of all that they stand on."""
        from rpsa.pipeline.manifests import NO_RESULT, keep, outdated
        from rpsa.pipeline.tasks import inputs_of, stands_on

        waiting = []
        reasons: Counter[str] = Counter()
        for task in tasks:
            needed = stands_on(self.recipe, task)
            if failed := next((one for one in needed if one.folder in self.without_result), None):
                self.without_result[task.folder] = self.without_result[failed.folder]
                continue
            self._require(needed)
            inputs = inputs_of(self.recipe, task)
            if self.keep_finished:
                keep(task.folder, task.stage, inputs)
            if why := outdated(task.folder, task.stage, inputs):
                waiting.append(task)
                if why != [NO_RESULT]:
                    reasons[", ".join(why)] += 1
        for reason, count in reasons.items():
            log.warning("%s: %d finished, to be done again: %s", tasks[0].stage, count, reason)
        return waiting

    def _require(self, needed: "list[Task]") -> None:
        from rpsa.pipeline.manifests import NO_RESULT
        from rpsa.pipeline.tasks import why_not

        for task in needed:
            if why := why_not(self.recipe, task):
                state = f"has no result in {task.folder}" if why == NO_RESULT else f"is out of date ({why})"
                raise RPSAError(
                    f"stage {task.stage} {state}: run the recipe without --only, or that stage first"
                )

    def _attempts(self, stage: "Stage", tasks: "list[Task]") -> "Iterator[tuple[Task, Failure | None]]":
        if not tasks:
            return
        from rpsa.pipeline import launch, runner

        if self.recipe.launch and stage in launch.LAUNCHED_STAGES and not launch.is_launched():
            yield from self._launched(stage, tasks)
        elif self._executor is not None:
            yield from runner.attempt_all(self._executor, self.recipe, tasks)
        else:
            for task in tasks:
                # of several processes all have ended when a task failed: this is the next start
                known = runner.failure_of(task) if launch.MARK in os.environ else None
                yield task, known or runner.attempt(self.recipe, task)

    def _prepare(self) -> None:
        """Once, before the first task: whatever can be known beforehand, looked at where the work is done."""
        if self._is_prepared:
            return
        from rpsa.pipeline import launch, runner

        if self.recipe.matrix.parallel > 1 and not launch.is_launched():
            self._executor = self._stack.enter_context(runner.workers(self.recipe.matrix.parallel))
            self._executor.submit(runner.check, self.recipe).result()
        else:
            runner.quiet()
            if launch.MARK not in os.environ:
                runner.check(self.recipe)
        _record(self.recipe)
        self._is_prepared = True

    def _launched(self, stage: "Stage", tasks: "list[Task]") -> "Iterator[tuple[Task, Failure | None]]":
        """In processes that end together where one fails: started again for what is left after a failure."""
        from rpsa.pipeline import launch, runner
        from rpsa.pipeline.tasks import is_done

        for task in tasks:
            runner.forget_failure(task)
        left = list(tasks)
        while left:
            why, killed = "its processes ended without a result", None
            self._bar.stop()
            try:
                launch.launch(self.recipe, stage)
            except launch.RankKilled as error:
                why = str(error)
                killed = runner.Failure(why)
            except RPSAError as error:
                why = str(error)
            self._bar.start()
            failures = {task.folder: runner.failure_of(task) for task in left}
            ended = [task for task in left if failures[task.folder] or is_done(self.recipe, task)]
            if not any(failures.values()):
                ended = left  # one of them was killed, and could not say at what
            for task in ended:
                done = is_done(self.recipe, task)
                yield task, None if done else killed or failures[task.folder] or runner.Failure(why)
            left = [task for task in left if task not in ended]

    def _fail(self, task: "Task", why: str) -> None:
        from rich.text import Text

        why = why.removeprefix(f"{task.name}: ")
        what = task.stage if task.cell else f"{task.stage} {task.name}"
        self.without_result[task.folder] = f"{what} failed: {why}"
        self.failed.append(f"{task.stage} {task.name}: {why}")
        self._bar.console.print(Text(f"failed: {printable(self.failed[-1])}"), soft_wrap=True)


def _record(recipe: Recipe) -> None:
    """The recipe beside its results: as it was given, and with all defaults."""
    from rpsa.pipeline import launch

    if launch.MARK in os.environ or not launch.is_first():
        return
    given = recipe.model_dump(mode="json", exclude_unset=True)
    atomic_write(recipe.folder / launch.GIVEN, stable_json(given))
    atomic_write(recipe.folder / "recipe.json", stable_json(recipe.model_dump(mode="json")))


def _summary(failed: list[str]) -> str:
    if len(failed) == 1:
        return failed[0]
    return f"{len(failed)} tasks failed; the first: {failed[0]}"


def _report(recipe: Recipe, without_result: Mapping[Path, str]) -> dict[str, str]:
    """Write the report of the cells that have a result; returns the others, each with the reason."""
    if not recipe.evaluate.tasks:
        print(
            f"\nNo report: evaluate.tasks names nothing, so nothing was measured. Models: {recipe.folder / 'align'}"
        )
        return {}
    from rpsa.pipeline.cards import write_cards
    from rpsa.pipeline.manifests import MANIFEST, write_manifest
    from rpsa.pipeline.results import analysis_figures, collect, provenance, report_inputs
    from rpsa.report import render_console, write_report

    results, missing = collect(recipe, without_result)
    if not results:
        return missing
    folder = recipe.folder / "report"
    figures, lost = analysis_figures(recipe, without_result)
    missing |= lost
    with atomic_directory(folder, MANIFEST) as new:
        shown = list(results.values())
        summaries = write_report(shown, new, provenance(recipe, results), figures, missing)
        write_cards(recipe, results, new / "cards")
        write_manifest(new, "report", report_inputs(recipe), "report")
    render_console(summaries, missing=missing)
    print(f"\nReport: {folder / 'index.html'}")
    return missing
