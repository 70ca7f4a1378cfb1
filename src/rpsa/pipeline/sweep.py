"""`rpsa sweep`: Fig. 5 and 7 of the paper, over any settings of a recipe. Each point is an ordinary run.

Points run as commands of their own, side by side up to a limit, here or wherever a launcher takes them. One that fails
does not end the others, and a finished one is not run again. The first runs alone: the others take over from it, and
from each other, whatever the swept settings do not change.

Runs that have tasks in common: what one run has finished, another takes over instead of doing it again.

The points of `rpsa sweep`: every combination of the values that it was given, each checked as a whole recipe.
"""

import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpsa.artifacts import atomic_directory, atomic_write, folder_name, locked, stable_json
from rpsa.errors import RPSAError
from rpsa.pipeline.manifests import MANIFEST, is_current
from rpsa.pipeline.reporting import collect, report_inputs
from rpsa.pipeline.stages import tasks_of
from rpsa.progress import progress_bars
from rpsa.provenance import STAGES
from rpsa.recipe.loading import load_recipe, parse_yaml
from rpsa.recipe.schema import Recipe, point_name
from rpsa.report.results import Summary, summarise

_STAGES = STAGES[:-1]  # the report has no tasks


def is_finished(recipe: Recipe) -> bool:
    """Whether every stage of the run is there, and up to date."""
    if not all(task.is_done() for stage in _STAGES for task in tasks_of(recipe, stage)):
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
                inputs = task.inputs()
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


@dataclass(frozen=True)
class Value:
    """A swept value as YAML, and as folders, tables and figures show it."""

    yaml: str
    label: str


@dataclass(frozen=True)
class Point:
    """One point: the label of each swept setting's value, and the run that it stands for.

    `recipe` writes into the point's own folder; `overrides` make it from the recipe's file.
    """

    settings: Mapping[str, str]
    overrides: Sequence[str]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def name(self) -> str:
        return self.folder.name


def parse_axes(over: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, list[Value]]:
    """The swept settings in the order written, from `section.key=value,value` or `section.key=[value, value]`.

    Raises:
        RPSAError: one cannot be read, comes twice, or may not be swept.
    """
    axes: dict[str, list[Value]] = {}
    fixed = {setting.partition("=")[0].strip() for setting in overrides}
    for setting in over:
        key, _, text = (part.strip() for part in setting.partition("="))
        if not key or not text:
            raise RPSAError(f"--over {setting}: write it as section.key=value,value")
        if key in axes:
            raise RPSAError(f"--over {setting}: {key} is swept already; give all its values at once")
        if key in fixed:
            raise RPSAError(f"--over {setting}: {key} is set for all points, too; leave one of the two out")
        axes[key] = _values(key, text)
        if not axes[key]:
            raise RPSAError(f"--over {key}: give at least one value")
    if "output_dir" in fixed | set(axes):
        raise RPSAError("output_dir: each point has a folder of its own; name the sweep's folder with --out")
    return axes


def points_of(
    recipe: Path, axes: Mapping[str, Sequence[Value]], overrides: Sequence[str], folder: Path
) -> list[Point]:
    """The grid, the last setting fastest.

    Raises:
        RPSAError: a point's recipe is wrong, or two points are the same.
    """
    points: list[Point] = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = point_name({key: value.label for key, value in chosen.items()})
        own = [
            *overrides,
            *(f"{key}={value.yaml}" for key, value in chosen.items()),
            f"output_dir={json.dumps(str(folder / name))}",
        ]
        point = Point({key: value.label for key, value in chosen.items()}, own, load_recipe(recipe, own))
        if not point.recipe.evaluate.tasks:
            raise RPSAError(f"{recipe}: evaluate.tasks: empty; a sweep shows what is measured on tasks")
        for other in points:
            if other.name == name:
                raise RPSAError(f"--over: two points are called {name}; give each value once")
            if _runs(other.recipe) == _runs(point.recipe):
                raise RPSAError(
                    f"--over: {other.name} and {name} are the same runs; does a method, or its paradigm, set its own "
                    "value (matrix.methods.<name>.section.key)?"
                )
        points.append(point)
    return points


def _values(key: str, text: str) -> list[Value]:
    if not text.startswith("["):
        return [_value(key, part.strip()) for part in text.split(",")]
    return [_value(key, json.dumps(value, ensure_ascii=False)) for value in parse_yaml(text, f"--over {key}")]


def _value(key: str, yaml: str) -> Value:
    value = parse_yaml(yaml, f"--over {key}")
    if isinstance(value, list):
        return Value(yaml, "+".join(map(str, value)))
    # A number stays as it was written: 1e-4, not 0.0001.
    return Value(yaml, value if isinstance(value, str) else yaml)


def _runs(recipe: Recipe) -> Any:
    """All that the results depend on."""
    return recipe.cells(), recipe.model, recipe.reference, recipe.fisher, recipe.evaluate, recipe.data_dir


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
    from rpsa.report.tables import render_sweep

    waiting = [point for point in points if not is_finished(point.recipe)]
    failures: dict[str, str] = {}
    with progress_bars() as bar:
        news = "" if waiting else "up to date"
        line = bar.add_task("points", total=len(points), completed=len(points) - len(waiting), now=news)

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
    from rpsa.report.sweeps import point_of, sweep_figure

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
