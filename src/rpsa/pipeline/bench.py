"""Bench: many methods on several kinds of data, at settings that were chosen on other bases than the table is of.

Two runs of one recipe: in the first every method is tried at every point of its grid on the bases of development; in
the second it runs once on each base and seed of the test, at the point that was chosen. Both are studies as any other,
each cell in a sweep of its own, and go on where they were stopped.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpsa.artifacts import atomic_write, locked, read_json, stable_json
from rpsa.errors import RPSAError
from rpsa.pipeline import do_stages, prepare
from rpsa.pipeline.reporting import collect
from rpsa.pipeline.stages import align_task
from rpsa.provenance import STAGES, TIMING, Stage
from rpsa.recipe.checks import recipe_problems
from rpsa.recipe.schema import Cell, Recipe, concerns
from rpsa.recipe.sections import Bench
from rpsa.report.console import print_table
from rpsa.report.leaderboard import (
    Contender,
    Leaderboard,
    Standing,
    board_table,
    compare_data,
    entry_of,
    measures,
    ranked,
    shortfall,
    write_leaderboard,
)
from rpsa.report.prediction import predict
from rpsa.report.summaries import RunResult
from rpsa.report.tables import Table

RULE = (
    "for each method on each kind of data, the point of its grid whose shortfall is smallest in the mean over the "
    "bases and seeds of development; of equal ones the first in the order of the recipe. Points with a failed run are "
    "out."
)

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One method on one kind of data, at every point of `over`: a sweep of the recipe that is run."""

    data: str
    method: str
    over: Mapping[str, Sequence[Any]]


def run_bench(recipe: Recipe, *, keep_finished: bool = False) -> Path:
    """Choose, measure, and write the leaderboard; returns its folder.

    Raises:
        RPSAError: the recipe has no section `bench`, or one that cannot be; or every run of a method has failed on
            the bases of development.
    """
    bench = check_bench(recipe)
    tried = [
        Part(data, method, axes_of(recipe, method))
        for data in bench.data
        for method, one in recipe.matrix.methods.items()
        if one.paradigm != "none"
    ]
    with locked(recipe.folder):
        developed = _Study(_part_recipe(recipe, tried, "development"), tried, keep_finished)
        chosen = choose(developed, bench)
        atomic_write(recipe.folder / "choice.json", stable_json(chosen.to_json()))
        tested = _Study(_part_recipe(recipe, chosen.parts, "test"), chosen.parts, keep_finished)
        board = leaderboard(recipe, tested, chosen)
        folder = recipe.folder / "bench"
        write_leaderboard(board, folder)
    _print(board)
    print(f"\nLeaderboard: {folder / 'bench.html'}")
    return folder


def check_bench(recipe: Recipe) -> Bench:
    """The section `bench`, once it fits the rest of the recipe."""
    bench = recipe.bench
    if bench is None:
        raise RPSAError("bench: missing; rpsa bench compares the methods of a recipe that has this section")
    shared = [base for base in bench.bases if base in recipe.bases]
    if shared and (again := [seed for seed in bench.seeds if seed in recipe.matrix.seeds]):
        raise RPSAError(
            f"bench.bases: {shared[0]} is a base of the test, too (matrix.bases), with seed {again[0]}; settings are "
            "chosen on other bases, or with other seeds"
        )
    if recipe.sweeps or recipe.matrix.grid:
        raise RPSAError(
            "bench: not together with sweeps or matrix.grid; put what is to be chosen into bench.tune"
        )
    trained = [name for name, method in recipe.matrix.methods.items() if method.paradigm != "none"]
    for name in bench.tune:
        if name not in (*trained, "fft", "lora"):
            raise RPSAError(f"bench.tune.{name}: neither a method of the matrix, nor fft nor lora")
    for name in trained:
        if not axes_of(recipe, name):
            raise RPSAError(
                f"bench.tune: nothing for {name}; give it, or its paradigm, settings and their values"
            )
    return bench


def axes_of(recipe: Recipe, method: str) -> dict[str, list[Any]]:
    """What a method is tuned over: what its paradigm is, and what itself is."""
    assert recipe.bench is not None
    of = recipe.matrix.methods[method]
    axes = recipe.bench.tune.get(of.paradigm, {}) | recipe.bench.tune.get(method, {})
    return {key: list(values) for key, values in axes.items() if concerns(key, of)}


def _part_recipe(recipe: Recipe, parts: Sequence[Part], place: str) -> Recipe:
    """The recipe of one of the two runs, its parts as sweeps.

    Raises:
        RPSAError: a part cannot be.
    """
    bench = recipe.bench
    assert bench is not None
    raw = recipe.model_dump(exclude_unset=True, exclude={"bench"})
    methods = recipe.model_dump(exclude_unset=True)["matrix"]["methods"]
    if not any(one["paradigm"] == "none" for one in methods.values()):
        methods["original"] = {"paradigm": "none"}
    raw["output_dir"] = str(recipe.folder / place)
    raw["matrix"]["methods"] = {name: one for name, one in methods.items() if one["paradigm"] == "none"}
    if place == "development":
        raw["matrix"] |= {"bases": bench.bases, "seeds": bench.seeds}
    raw["sweeps"] = {}
    for part in parts:
        method = methods[part.method]
        data = bench.data[part.data].model_dump(exclude_unset=True)
        with_data = method | {"safety": data | method.get("safety", {})}
        raw["sweeps"][_sweep(part)] = {"methods": {part.method: with_data}, "over": dict(part.over)}
    made = Recipe.model_validate(raw)
    if problem := next(recipe_problems(made), None):
        raise RPSAError(f"bench: {problem}")
    return made


def _sweep(part: Part) -> str:
    return f"{part.data}.{part.method.replace('+', '.')}"


class _Study:
    """One of the two runs, done: results, costs and failures of its cells, by part and point."""

    def __init__(self, recipe: Recipe, parts: Sequence[Part], keep_finished: bool) -> None:
        self.recipe = recipe
        self.parts = parts
        stages: list[Stage] = [stage for stage in STAGES if stage != "report"]
        prepare(recipe, stages)
        work = do_stages(recipe, stages, keep_finished)
        self._results, self._missing = collect(recipe, work.without_result)
        self.originals = {one.base: one for one in self._results.values() if one.is_original}
        if lacking := next((base for base in recipe.bases if base not in self.originals), None):
            why = next(iter(self._missing.values()), "it was not evaluated")
            raise RPSAError(f"bench: the untouched model of {lacking} has no result: {why}")
        self._cells: dict[str, list[Cell]] = {}
        for cell in recipe.cells():
            if cell.sweep is not None:
                self._cells.setdefault(cell.sweep, []).append(cell)

    @property
    def prediction(self) -> str | None:
        """Whether the reasoning loss orders the runs as their accuracy does, in words; None of too few runs."""
        found = predict(list(self._results.values()))
        return found.sentence if found else None

    def at(self, part: Part, point: Point) -> tuple[list[RunResult], list[str]]:
        """The results of a part at one point, and why some of its runs have none."""
        cells = self._at(part, point)
        return (
            [self._results[cell.id] for cell in cells if cell.id in self._results],
            [
                f"{cell.base} seed {cell.seed}: {self._missing[cell.id]}"
                for cell in cells
                if cell.id in self._missing
            ],
        )

    def seconds(self, part: Part, point: Point) -> dict[tuple[str, int], float]:
        """Of training alone, by base and seed."""
        return {
            (cell.base, cell.seed): found
            for cell in self._at(part, point)
            if cell.id in self._results and (found := _seconds(self.recipe, cell)) is not None
        }

    def _at(self, part: Part, point: Point) -> list[Cell]:
        return [cell for cell in self._cells[_sweep(part)] if cell.grid == point]


def _seconds(recipe: Recipe, cell: Cell) -> float | None:
    task = align_task(recipe, cell)
    path = task.folder / TIMING if task else None
    if path is None or not path.is_file():
        return None
    times = [entry["train_runtime"] for entry in read_json(path)["trainer"] if "train_runtime" in entry]
    return float(times[-1]) if times else None


@dataclass(frozen=True)
class Choice:
    """What was chosen on the bases of development, and all that it was chosen from."""

    parts: Sequence[Part]
    tried: Sequence[Mapping[str, Any]]
    without: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": RULE,
            "chosen": [{"data": p.data, "method": p.method, "settings": _point_of(p)} for p in self.parts],
            "tried": list(self.tried),
            "without_result": dict(self.without),
        }


def _point_of(part: Part) -> dict[str, Any]:
    return {key: values[0] for key, values in part.over.items()}


def points(part: Part) -> Iterator[dict[str, Any]]:
    """Every point of a part, in the order of the recipe."""
    for values in itertools.product(*part.over.values()):
        yield dict(zip(part.over, values, strict=True))


def choose(study: _Study, bench: Bench) -> Choice:
    """By `RULE`."""
    parts: list[Part] = []
    tried: list[dict[str, Any]] = []
    without: dict[str, str] = {}
    for part in study.parts:
        candidates = []
        for point in points(part):
            runs, failed = study.at(part, point)
            misses = [shortfall(run, study.originals[run.base], bench.targets) for run in runs]
            mean = sum(misses) / len(misses) if runs and not failed else None
            found = [measures(run, study.originals[run.base]) for run in runs]
            means = (
                {name: sum(one[name] for one in found) / len(found) for name in bench.targets}
                if found
                else {}
            )
            record = {"data": part.data, "method": part.method, "settings": point, "shortfall": mean}
            tried.append(record | {"means": means, "failed": failed})
            if mean is not None:
                candidates.append((mean, point))
        if not candidates:
            without[f"{part.method} on {part.data}"] = tried[-1]["failed"][0]
            continue
        _, best = min(candidates, key=lambda one: one[0])
        parts.append(Part(part.data, part.method, {key: [value] for key, value in best.items()}))
    if not parts:
        raise RPSAError(
            f"bench: every run on the bases of development failed; the first: {next(iter(without.values()))}"
        )
    return Choice(parts, tried, without)


def leaderboard(recipe: Recipe, study: _Study, chosen: Choice) -> Leaderboard:
    """All entries, best first."""
    bench = recipe.bench
    assert bench is not None
    contenders = [_contender(study, part) for part in study.parts]
    entries = [entry_of(one, study.originals, bench.targets) for one in contenders]
    lost = {f"{one.method} on {one.data}": one.failed[0] for one in contenders if not one.runs}
    accuracies = [one.reasoning["mean"] for one in study.originals.values()]
    return Leaderboard(
        name=recipe.name,
        rule=RULE,
        chosen_on=f"{', '.join(bench.bases)} (seeds {', '.join(map(str, bench.seeds))})",
        tested_on=f"{', '.join(recipe.bases)} (seeds {', '.join(map(str, recipe.matrix.seeds))})",
        targets=bench.targets,
        entries=ranked(entry for entry in entries if entry is not None),
        original_accuracy=sum(accuracies) / len(accuracies),
        without_result=dict(chosen.without) | lost,
        comparisons=compare_data(contenders, study.originals, bench.targets),
        prediction=study.prediction,
    )


def _contender(study: _Study, part: Part) -> Contender:
    point = _point_of(part)
    runs, failed = study.at(part, point)
    paradigm = study.recipe.sweeps[_sweep(part)].methods[part.method].paradigm
    plain = next((p for p in study.parts if (p.data, p.method) == (part.data, paradigm)), None)
    beside = study.seconds(plain, _point_of(plain)) if plain else {}
    own = study.seconds(part, point)
    costs = [own[key] / beside[key] for key in own if beside.get(key)]
    return Contender(part.data, part.method, point, runs, costs, failed)


def _print(board: Leaderboard) -> None:
    table = board_table(board)
    shown = [place for place, name in enumerate(table.header) if name not in table.minor]
    rows = [[replace(row[place], note="") for place in shown] for row in table.rows]
    print_table(Table([table.header[place] for place in shown], rows))
    if board.prediction:
        print(f"\n{board.prediction}")
    reached = [one for one in board.entries if one.reaches]
    print(f"\n{_reached(reached)}")


def _reached(entries: Sequence[Standing]) -> str:
    if not entries:
        return "No entry meets all targets on every base."
    return "All targets are met on every base by: " + "; ".join(
        f"{one.method} on {one.data}" for one in entries
    )
