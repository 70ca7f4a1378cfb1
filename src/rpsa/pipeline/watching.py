"""`rpsa report`: the report of a run as far as it is, at its end, again later, or whenever a result has come."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpsa.artifacts import atomic_directory
from rpsa.errors import RPSAError
from rpsa.pipeline.reporting import ReportTask, report_inputs
from rpsa.pipeline.status import recipe_of_run, run_status
from rpsa.pipeline.tasks import MANIFEST, write_manifest
from rpsa.recipe.schema import Recipe
from rpsa.report import Summary, render_console
from rpsa.report.attacked import render_robustness
from rpsa.report.console import render_sweep
from rpsa.report.prediction import predict
from rpsa.report.self_made import render_self_made
from rpsa.report.sweeps import sweep_points

_EVERY = 10.0
"""Seconds between two looks; ten times as long as a look takes if that is more."""


def report(recipe: Recipe, without_result: Mapping[Path, str]) -> dict[str, str]:
    """Write and show the report of the cells that have a result; returns the others, each with the reason."""
    if not recipe.evaluate.tasks:
        print(
            f"\nNo report: evaluate.tasks names nothing, so nothing was measured. Models: {recipe.folder / 'align'}"
        )
        return {}
    task = ReportTask(recipe, without_result)
    if task.results:
        _show(task)
    return task.missing


def _show(task: ReportTask) -> None:
    summaries = _write(task)
    render_console(summaries, missing=task.missing)
    render_self_made(task.made)
    render_robustness(task.attacked)
    for name, points in sweep_points(list(task.results.values())).items():
        print(f"\nSweep {name}:\n")
        render_sweep(points)
    if prediction := predict(list(task.results.values())):
        print(f"\n{prediction.sentence}")
    print(f"\nReport: {task.folder / 'index.html'}")


def _write(task: ReportTask) -> list[Summary]:
    with atomic_directory(task.folder, MANIFEST) as new:
        summaries = task.write(new)
        write_manifest(new, task.stage, task.inputs(), task.place)
    return summaries


def report_again(folder: Path) -> None:
    """Write the report of what a run's folder holds now, and show it.

    Raises:
        RPSAError: there is no run in it, or nothing was evaluated yet.
    """
    task = ReportTask(recipe_of_run(folder))
    if not task.results:
        name, why = next(iter(task.missing.items()))
        raise RPSAError(f"{folder}: nothing is evaluated yet; {name}: {why}")
    _show(task)


def watch_report(folder: Path) -> None:
    """Write the report again whenever a run has another result, until the run has ended.

    Raises:
        RPSAError: there is no run in it.
    """
    recipe = recipe_of_run(folder)
    seen: dict[str, Any] | None = None
    while True:
        began = time.monotonic()
        is_running = run_status(folder).is_running
        inputs = report_inputs(recipe)
        if inputs != seen:
            seen = inputs
            print(_written(ReportTask(recipe)), flush=True)
        if not is_running:
            return
        time.sleep(max(_EVERY, 10 * (time.monotonic() - began)))


def _written(task: ReportTask) -> str:
    of = f"{len(task.results)} of {len(task.recipe.cells())} models"
    if not task.results:
        return f"{of} are evaluated, and there is no report yet"
    _write(task)
    return f"{time.strftime('%H:%M:%S')} {of}: {task.folder / 'index.html'}"
