"""`rpsa sweep`: Fig. 5 and 7 of the paper, over any settings of a recipe. Each point is an ordinary run.

Points run as commands of their own, side by side up to a limit, here or wherever a launcher takes them. One that fails
does not end the others, and a finished one is not run again. The first runs alone: the others take over from it, and
from each other, whatever the swept settings do not change.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpsa.artifacts import atomic_write, folder_name, locked, stable_json
from rpsa.errors import RPSAError
from rpsa.pipeline.results import collect
from rpsa.pipeline.sharing import is_finished, take_over
from rpsa.pipeline.sweep_points import Point, Value, parse_axes, points_of
from rpsa.report.results import Summary, summarise

SWEEP = "sweep.json"
LOG = "run.log"
_LOOK = 0.2  # seconds between two looks at the running points
_GRACE = 10.0  # seconds that they have to end by themselves


@dataclass(frozen=True)
class SweepConfig:
    """Attributes:
    recipe: the recipe's file.
    over: settings and the values that each takes: `lora.r=1,2,4`, `lora.target_modules=[[q_proj], [up_proj]]`.
    overrides: settings of every point: `section.key=value`.
    folder: holds a folder for each point; by default `sweeps/RECIPE/KEYS`.
    parallel: how many points run at a time.
    launcher: a command line that runs a point. `{args}` stands for the words after `rpsa`, `{command}` for the whole
        command as one word, as `sbatch --wrap` wants it, `{log}` for the point's log, and `{slot}` for a number below
        `parallel` that no other running point has.
    keep_finished: leave results alone that other versions of packages or of this one have made.
    """

    recipe: Path
    over: Sequence[str]
    overrides: Sequence[str] = ()
    folder: Path | None = None
    parallel: int = 1
    launcher: str | None = None
    keep_finished: bool = False


@dataclass(frozen=True)
class Outcome:
    """A point with its summaries, or why it has none, in one line."""

    point: Point
    summaries: Sequence[Summary] = ()
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": dict(self.point.settings),
            "folder": self.point.name,
            "failure": self.failure,
            "summary": [summary.to_json() for summary in self.summaries],
        }


def sweep(config: SweepConfig) -> list[Outcome]:
    """Run every point that is not finished; writes `sweep.json` and the figure, and prints the table.

    Raises:
        RPSAError: a setting, a value or the launcher is wrong; found before anything runs.
    """
    axes = parse_axes(config.over, config.overrides)
    keys = folder_name("+".join(axes))
    folder = config.folder or Path("sweeps") / folder_name(config.recipe.stem) / keys
    points = points_of(config.recipe, axes, config.overrides, folder)
    _check_launcher(_launcher(config))

    with locked(folder):
        return _sweep(config, axes, points, folder)


def _sweep(
    config: SweepConfig, axes: Mapping[str, Sequence[Value]], points: Sequence[Point], folder: Path
) -> list[Outcome]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from rpsa.report.sweep_table import render_sweep

    waiting = [point for point in points if not is_finished(point.recipe)]
    failures: dict[str, str] = {}
    columns = (TextColumn("points"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.fields[now]}", style="dim", markup=False), console=Console(stderr=True)
    ) as bar:
        news = "" if waiting else "up to date"
        line = bar.add_task("", total=len(points), completed=len(points) - len(waiting), now=news)

        def on_end(point: Point, failure: str | None) -> None:
            if failure is not None:
                failures[point.name] = failure
            bar.update(line, advance=1, now=f"{point.name}{' failed' if failure else ''}")

        _run(config, waiting, is_first=len(waiting) == len(points), on_end=on_end)
    outcomes = [_outcome(point, failures.get(point.name)) for point in points]
    found = {
        "recipe": str(config.recipe),
        "overrides": list(config.overrides),
        "over": {key: [value.label for value in values] for key, values in axes.items()},
        "points": [outcome.to_json() for outcome in outcomes],
    }
    atomic_write(folder / SWEEP, stable_json(found))
    render_sweep([(o.point.settings, o.summaries) for o in outcomes])
    _draw(folder, list(axes), outcomes)
    for outcome in outcomes:
        if outcome.failure is not None:
            print(f"{outcome.point.name} failed: {outcome.failure} ({outcome.point.folder / LOG})")
    print(f"\nNumbers and runs: {folder}")
    return outcomes


def _run(
    config: SweepConfig,
    points: Sequence[Point],
    *,
    is_first: bool,
    on_end: Callable[[Point, str | None], None],
) -> None:
    """Run the points, the first alone unless the sweep has finished ones already."""
    waiting = list(points)
    running: dict[int, tuple[Point, subprocess.Popen[bytes]]] = {}
    limit = 1 if is_first else config.parallel
    try:
        while waiting or running:
            for slot in range(limit):
                if waiting and slot not in running:
                    point = waiting.pop(0)
                    running[slot] = point, _start(config, point, slot)
            for slot, (point, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    limit = config.parallel
                    on_end(point, _failure(point, process.returncode))
            time.sleep(_LOOK)
    finally:
        _end([process for _, process in running.values()])


def _start(config: SweepConfig, point: Point, slot: int) -> "subprocess.Popen[bytes]":
    """Start a point in this process group: what ends the sweep ends its runs."""
    point.folder.mkdir(parents=True, exist_ok=True)
    siblings = sorted(point.folder.parent.iterdir())
    take_over(point.recipe, [path for path in siblings if path.is_dir() and path != point.folder])
    arguments = ["run", str(config.recipe), *point.overrides]
    arguments += ["--keep-finished"] if config.keep_finished else []
    log = point.folder / LOG
    with log.open("wb") as file:
        return subprocess.Popen(
            launched(_launcher(config), arguments, log, slot),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def launched(launcher: str, arguments: Sequence[str], log: Path, slot: int) -> list[str]:
    """The launcher's words with its placeholders filled in."""
    words: list[str] = []
    values = {
        "{command}": shlex.join([sys.executable, "-m", "rpsa", *arguments]),
        "{log}": str(log),
        "{slot}": str(slot),
    }
    for word in shlex.split(launcher):
        if word == "{args}":
            words += arguments
            continue
        for name, value in values.items():
            word = word.replace(name, value)
        words.append(word)
    return words


def _launcher(config: SweepConfig) -> str:
    return config.launcher or f"{shlex.quote(sys.executable)} -m rpsa {{args}}"


def _check_launcher(launcher: str) -> None:
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise RPSAError(f"--launcher {launcher}: {str(error).lower()}") from None
    if "{args}" not in words and not any("{command}" in word for word in words):
        raise RPSAError(f"--launcher {launcher}: has no {{command}} or {{args}} where the run belongs")
    if shutil.which(words[0]) is None:
        raise RPSAError(f"--launcher {launcher}: there is no command {words[0]!r} here")


def _failure(point: Point, returncode: int) -> str | None:
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    if returncode == 0:
        if is_finished(point.recipe):
            return None
        return "the launcher has returned, and the run is not finished (sbatch needs --wait)"
    lines = (point.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return said.removeprefix("error: ") or f"exit code {returncode}"


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """A terminal's Ctrl-C has reached them, too: they are told again only if they do not end."""
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
    for process in processes:
        process.wait()


def _outcome(point: Point, failure: str | None) -> Outcome:
    if failure is not None:
        return Outcome(point, failure=failure)
    results, _ = collect(point.recipe)
    return Outcome(point, summarise(results.values()))


def _draw(folder: Path, keys: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """One swept setting along the axis, a second as columns. More, or a grid of the recipe's own, have no figure."""
    from rpsa.report.drawing import write_figure
    from rpsa.report.sweep_figure import sweep_figure
    from rpsa.report.sweeps import point_of

    points = [
        point_of(summary, outcome.point.settings[keys[0]], _column(keys[1:], outcome.point.settings))
        for outcome in outcomes
        for summary in outcome.summaries
    ]
    distinct = {(point.value, point.method, point.column) for point in points}
    if len(keys) > 2 or not points or len(distinct) < len(points):
        return
    figure = sweep_figure(keys[0], points)
    write_figure(figure, folder, "sweep")


def _column(keys: Sequence[str], settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} = {settings[key]}" for key in keys)
