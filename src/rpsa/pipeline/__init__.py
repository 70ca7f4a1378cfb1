"""`rpsa run`: reference traces -> Fisher -> alignment -> evaluation -> report, each stage only where inputs changed."""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import (
    MANIFEST,
    altered_files,
    atomic_write,
    stable_json,
    write_manifest,
)
from rpsa.errors import RPSAError
from rpsa.recipe.schema import Recipe

if TYPE_CHECKING:
    from rpsa.pipeline.tasks import Stage, Task
    from rpsa.report import RunResult

__all__ = ["run", "verify"]


def run(recipe: Recipe, *, only: str | None = None) -> Path:
    """Bring a recipe's run up to date, or one stage of it; returns the run's folder.

    Raises:
        RPSAError: `only` is no stage, or what it stands on has not been run.
    """
    from rpsa.pipeline import launch
    from rpsa.pipeline.tasks import STAGES
    from rpsa.recipe.problems import did_you_mean

    if only is not None and only not in STAGES:
        raise RPSAError(f"--only: there is no stage {only!r}{did_you_mean(only, STAGES)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes one says what all have to say
    logging.basicConfig(level=logging.WARNING if is_first else logging.ERROR, format="%(message)s")
    stages = [stage for stage in STAGES if only in (None, stage)]
    launch.check(recipe, stages)
    atomic_write(recipe.folder / "recipe.json", stable_json(recipe.model_dump(mode="json")))
    with launch.joined(recipe):
        _run_tasks(recipe, [stage for stage in stages if stage != "report"])
    if "report" in stages:
        _report(recipe)
    return recipe.folder


def verify(run_dir: Path) -> None:
    """Compare every file of a run with the hash that its stage recorded.

    Raises:
        RPSAError: a file is missing or changed, or there is no run in the folder.
    """
    folders = sorted(path.parent for path in run_dir.rglob(MANIFEST))
    if not folders:
        raise RPSAError(f"{run_dir}: no run here (no stage has left a {MANIFEST})")
    problems = [problem for folder in folders for problem in altered_files(folder)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RPSAError(f"{problems[0]}{more}")
    print(f"{len(folders)} stage folders verified: every file is as it was written")


def _run_tasks(recipe: Recipe, stages: "list[Stage]") -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from rpsa.pipeline import launch
    from rpsa.pipeline.tasks import tasks_of, unfinished
    from rpsa.sharding import rank

    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[now]}"),
    )
    with (
        Progress(*columns, console=Console(stderr=True), disable=rank() > 0) as bar,
        _Performer(recipe) as performer,
    ):
        for stage in stages:
            tasks = tasks_of(recipe, stage)
            if not tasks:
                continue
            waiting = unfinished(recipe, tasks)
            news = "" if waiting else "up to date"
            if waiting and recipe.launch and stage in launch.LAUNCHED_STAGES and not launch.is_launched():
                performer.check_settings()
                bar.stop()
                launch.launch(recipe, stage)
                bar.start()
                waiting = []
            line = bar.add_task(stage, total=len(tasks), completed=len(tasks) - len(waiting), now="")
            for task in performer.perform(waiting):
                bar.update(line, advance=1, now=task.name)
            bar.update(line, now=news)


class _Performer:
    """Does tasks in this process, or in `matrix.parallel` workers that start when they are first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._stack: Any = None
        self._executor: Any = None
        self._checked = False

    def __enter__(self) -> "_Performer":
        from contextlib import ExitStack

        self._stack = ExitStack()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def perform(self, tasks: "list[Task]") -> "Iterable[Task]":
        if not tasks:
            return
        from rpsa.pipeline import runner

        if self.recipe.matrix.parallel == 1:
            self.check_settings()
            for task in tasks:
                runner.perform(self.recipe, task)
                yield task
            return
        if self._executor is None:
            self._executor = self._stack.enter_context(runner.workers(self.recipe.matrix.parallel))
        self._check(lambda recipe: self._executor.submit(runner.check_settings, recipe).result())
        yield from runner.perform_all(self._executor, self.recipe, tasks)

    def check_settings(self) -> None:
        """In this process, and once."""
        from rpsa.pipeline import runner

        runner.quiet()
        self._check(runner.check_settings)

    def _check(self, check: "Callable[[Recipe], None]") -> None:
        if not self._checked:
            check(self.recipe)
            self._checked = True


def _report(recipe: Recipe) -> None:
    if not recipe.evaluate.tasks:
        print(
            f"\nNo report: evaluate.tasks names nothing, so nothing was measured. Models: {recipe.folder / 'align'}"
        )
        return
    from rpsa.pipeline.cards import write_cards
    from rpsa.pipeline.results import analysis_figures, collect, provenance, report_inputs
    from rpsa.report import render_console, write_report

    results: list[RunResult] = collect(recipe)
    folder = recipe.folder / "report"
    summaries = write_report(results, folder, provenance(recipe), analysis_figures(recipe))
    write_cards(recipe, results, folder / "cards")
    write_manifest(folder, "report", report_inputs(recipe))
    render_console(summaries)
    print(f"\nReport: {folder / 'index.html'}")
