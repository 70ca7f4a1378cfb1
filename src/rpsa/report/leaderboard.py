"""Leaderboard: many methods on the same bases and seeds, with intervals, worst cases, costs and a Pareto front.

How far a run is from what is asked for is its shortfall: by how much each measure misses its target, added up. A
drop of reasoning, an attack that succeeds and a harmless request that is refused count alike, a point for a point.
"""

import base64
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rpsa.artifacts import atomic_write, stable_json
from rpsa.evaluation.statistics import mean_interval
from rpsa.report.summaries import RunResult
from rpsa.report.tables import NONE, Entry, Table, markdown, percent
from rpsa.templates import render
from rpsa.text import markdown_text

REASONING = "reasoning"
"""The measure that is compared with the untouched model."""

Targets = Mapping[str, float]
"""By measure, the most that is asked for: of `reasoning`, a drop; of a set of requests, a rate."""


def misses(run: RunResult, original: RunResult, targets: Targets) -> dict[str, float]:
    """By how much a run misses each target, in [0, 1]; 0 where it is met."""
    measured = measures(run, original)
    return {name: max(0.0, measured[name] - target) for name, target in targets.items()}


def measures(run: RunResult, original: RunResult) -> dict[str, float]:
    """Everything that a target may name, less is better: the drop of reasoning, and each set's rate."""
    rates = {**run.asr, **run.over_refusal}
    rates.pop("mean", None)
    return rates | {REASONING: original.reasoning["mean"] - run.reasoning["mean"]}


def shortfall(run: RunResult, original: RunResult, targets: Targets) -> float:
    """All misses of a run, added up."""
    return sum(misses(run, original, targets).values())


@dataclass(frozen=True)
class Standing:
    """One method on one kind of data, over the bases and seeds of the test.

    Attributes:
        settings: what was chosen for it on the development bases.
        means, intervals: of each measure over the runs; of reasoning both are of the drop.
        worst: of each measure, the mean of the base where it is largest.
        accuracy: mean reasoning accuracy.
        shortfall, shortfall_worst: mean over the runs, and the mean of the worst base.
        reaches: whether every base meets every target, in the mean over its seeds.
        cost: time of training beside plain fine-tuning of the same paradigm and data, the median over the runs.
        loss: mean KL on held-out reasoning, where it was measured.
        failed: runs without a result, each with the reason.
        is_best: whether no other entry is at least as good in every mean, and better in one.
    """

    data: str
    method: str
    settings: Mapping[str, Any]
    runs: int
    accuracy: float
    means: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float] | None]
    worst: Mapping[str, float]
    shortfall: float
    shortfall_worst: float
    reaches: bool
    cost: float | None
    loss: float | None
    failed: Sequence[str] = ()
    is_best: bool = False


@dataclass(frozen=True)
class Contender:
    """What is known of one method on one kind of data before it is summed up."""

    data: str
    method: str
    settings: Mapping[str, Any]
    runs: Sequence[RunResult]
    costs: Sequence[float] = ()
    failed: Sequence[str] = ()


def entry_of(one: Contender, originals: Mapping[str, RunResult], targets: Targets) -> Standing | None:
    """None where no run has a result."""
    if not one.runs:
        return None
    measured = [measures(run, originals[run.base]) for run in one.runs]
    by_base: dict[str, list[dict[str, float]]] = defaultdict(list)
    missed: dict[str, list[float]] = defaultdict(list)
    for run, found in zip(one.runs, measured, strict=True):
        by_base[run.base].append(found)
        missed[run.base].append(shortfall(run, originals[run.base], targets))
    base_means = {
        base: {name: fmean(f[name] for f in found) for name in targets} for base, found in by_base.items()
    }
    losses = [run.loss.kl for run in one.runs if run.loss is not None and run.loss.kl is not None]
    return Standing(
        one.data,
        one.method,
        one.settings,
        runs=len(one.runs),
        accuracy=fmean(run.reasoning["mean"] for run in one.runs),
        means={name: fmean(found[name] for found in measured) for name in targets},
        intervals={name: mean_interval([found[name] for found in measured]) for name in targets},
        worst={name: max(found[name] for found in base_means.values()) for name in targets},
        shortfall=fmean(value for values in missed.values() for value in values),
        shortfall_worst=max(fmean(values) for values in missed.values()),
        reaches=not one.failed and all(f[n] <= t for f in base_means.values() for n, t in targets.items()),
        cost=median(one.costs) if one.costs else None,
        loss=fmean(losses) if losses else None,
        failed=one.failed,
    )


def ranked(entries: Iterable[Standing]) -> list[Standing]:
    """By the shortfall of the worst base, then by the mean; those on the Pareto front of the means are marked."""
    entries = list(entries)
    found = [replace(one, is_best=not any(_dominates(other, one) for other in entries)) for one in entries]
    return sorted(found, key=lambda one: (one.shortfall_worst, one.shortfall, one.data, one.method))


def _dominates(one: Standing, other: Standing) -> bool:
    """Entries with failed runs are beaten by nothing that they have, and beat nothing."""
    if one.failed:
        return False
    pairs = [(one.means[name], other.means[name]) for name in one.means]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


# What is written


@dataclass(frozen=True)
class Leaderboard:
    """All entries, and what is said of them.

    Attributes:
        name: the recipe's.
        rule: how settings were chosen, in words.
        chosen_on, tested_on: bases and seeds, in words.
        without_result: methods that have no entry, with the reason.
        comparisons: pairs of kinds of data, run by run, of the plain method.
        prediction: what the reasoning loss says of accuracy, over all runs of the test.
    """

    name: str
    rule: str
    chosen_on: str
    tested_on: str
    targets: Targets
    entries: Sequence[Standing]
    original_accuracy: float
    without_result: Mapping[str, str] = field(default_factory=dict)
    comparisons: Sequence["DataComparison"] = ()
    prediction: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"targets": dict(self.targets)}


@dataclass(frozen=True)
class DataComparison:
    """Mean differences of one kind of data to another, paired over all methods, bases and seeds of one paradigm."""

    paradigm: str
    data: str
    beside: str
    pairs: int
    means: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float] | None]


def compare_data(
    contenders: Sequence[Contender], originals: Mapping[str, RunResult], targets: Targets
) -> list[DataComparison]:
    """Every kind of data against every later one, by the plain method of each paradigm, run by run."""
    found = []
    for paradigm in dict.fromkeys(one.method for one in contenders if "+" not in one.method):
        kinds = {one.data: one for one in contenders if one.method == paradigm and one.runs}
        names = list(kinds)
        for place, data in enumerate(names):
            for beside in names[place + 1 :]:
                a, b = (
                    {(r.base, r.seed): measures(r, originals[r.base]) for r in kinds[name].runs}
                    for name in (beside, data)
                )
                shared = [key for key in a if key in b]
                differences = {name: [a[key][name] - b[key][name] for key in shared] for name in targets}
                if shared:
                    found.append(
                        DataComparison(
                            paradigm,
                            beside,
                            data,
                            len(shared),
                            {name: fmean(values) for name, values in differences.items()},
                            {name: mean_interval(values) for name, values in differences.items()},
                        )
                    )
    return found


def write_leaderboard(board: Leaderboard, folder: Path) -> None:
    """`bench.json`, `bench.md`, `bench.html` (sortable, one file), `bench.png` and `.svg`."""
    from rpsa.report.drawing import write_figure

    svg = write_figure(front_figure(board), folder, "bench")
    atomic_write(folder / "bench.json", stable_json(board.to_json()))
    atomic_write(folder / "bench.md", board_markdown(board))
    atomic_write(folder / "bench.html", page(board, svg))


def board_table(board: Leaderboard) -> Table:
    """An entry a row; methods on the Pareto front are bold, notes are 95% intervals."""
    requests = [name for name in board.targets if name != REASONING]
    return Table(
        [
            *("Data", "Method", "Reasoning ↑", "Drop ↓", *(f"{name} ↓" for name in requests)),
            *("Shortfall ↓", "Worst base ↓", "Cost", "Settings"),
        ],
        [
            [
                Entry(one.data),
                Entry(one.method, one.is_best, _failed(one)),
                Entry(percent(one.accuracy)),
                *(_points(one.means[name], one.intervals[name]) for name in (REASONING, *requests)),
                Entry(percent(one.shortfall)),
                Entry(percent(one.shortfall_worst)),
                Entry(NONE if one.cost is None else f"{one.cost:.2f}×"),
                Entry(", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in one.settings.items())),
            ]
            for one in board.entries
        ],
        minor=frozenset({"Reasoning ↑", "Worst base ↓", "Cost", "Settings"}),
    )


def data_table(board: Leaderboard) -> Table:
    """A comparison of two kinds of data a row: changes in points."""
    return Table(
        ["From, to", "Method", *board.targets],
        [
            [
                Entry(f"{one.beside} → {one.data}"),
                Entry(one.paradigm),
                *(_points(one.means[name], one.intervals[name], "+") for name in board.targets),
            ]
            for one in board.comparisons
        ],
    )


def _failed(one: Standing) -> str:
    return f"{len(one.failed)} of {one.runs + len(one.failed)} failed" if one.failed else ""


def _points(mean: float, interval: tuple[float, float] | None, sign: str = "") -> Entry:
    # + 0.0: what rounds to zero has no sign
    said = [f"{round(100 * value, 1) + 0.0:{sign}.1f}" for value in (mean, *(interval or ()))]
    return Entry(said[0], note=" to ".join(said[1:]))


def board_markdown(board: Leaderboard) -> str:
    """The table, the kinds of data, and what else the page says."""
    parts = [markdown(board_table(board)).strip()]
    if board.comparisons:
        parts += [
            markdown(data_table(board)).strip(),
            "Change in points with its 95% interval, paired by base and seed; below 0 is better.",
        ]
    if board.prediction:
        parts.append(board.prediction)
    parts += [markdown_text(f"No result: {name}: {why}") for name, why in board.without_result.items()]
    return "\n\n".join(parts) + "\n"


def page(board: Leaderboard, svg: bytes) -> str:
    """One HTML file that needs no network."""
    return render(
        "rpsa.report",
        "bench.html",
        board=board,
        table=board_table(board),
        comparisons=data_table(board) if board.comparisons else None,
        sorts_by=_sorts_by,
        figure=base64.b64encode(svg).decode(),
        targets={name: f"{100 * value:g}" for name, value in board.targets.items()},
    )


def _sorts_by(text: str) -> str:
    """A number where the text is one, for the page's script."""
    try:
        return repr(float(text.rstrip("×")))
    except ValueError:
        return text


def front_figure(board: Leaderboard) -> Any:
    """Reasoning against each set of requests; hollow marks are not on the front, colours tell the data."""
    from matplotlib.lines import Line2D

    from rpsa.report.drawing import BLUE, GREEN, GREY, ORANGE, literal, new_panels, set_title, style_of

    requests = [name for name in board.targets if name != REASONING]
    kinds = list(dict.fromkeys(one.data for one in sorted(board.entries, key=lambda one: one.data)))
    colours = dict(zip(kinds, (BLUE, GREEN, ORANGE, GREY) * len(kinds), strict=False))
    columns_ = min(2, len(requests))
    figure, panels = new_panels(-(-len(requests) // columns_), columns_, 2.9)
    places = [axes for row in panels for axes in row]
    for axes, name in zip(places, requests, strict=False):
        set_title(axes, name)
        axes.axvline(-100 * board.targets[REASONING], color=GREY, linewidth=0.7, linestyle="--")
        axes.axhline(100 * board.targets[name], color=GREY, linewidth=0.7, linestyle="--")
        for one in board.entries:
            colour = colours[one.data]
            axes.plot(
                -100 * one.means[REASONING],
                100 * one.means[name],
                linestyle="none",
                marker=style_of(one.method).marker,
                markersize=7,
                markerfacecolor=colour if one.is_best else "white",
                markeredgecolor=colour,
                alpha=0.9,
                clip_on=False,
            )
        axes.set_xscale("symlog", linthresh=1)  # a point near the target is as wide as ten far from it
        axes.set_yscale("symlog", linthresh=5)
        axes.set_ylim(bottom=0, top=100)
        axes.set_yticks([0, 5, 10, 50, 100], ["0", "5", "10", "50", "100"])
        axes.set_xticks([-100, -10, -1, 0, 1], ["−100", "−10", "−1", "0", "1"])
        axes.set_xlim(left=-100, right=3)
        axes.set_xlabel("Reasoning against the original (points)")
        axes.set_ylabel("Rate (%)  ← better")
    for axes in places[len(requests) :]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], linestyle="none", marker="o", color=colours[kind], label=literal(kind))
        for kind in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure
