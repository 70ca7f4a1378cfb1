"""Figures of a report: Fig. 4 of the paper, the course of c and k, and everything against the learning rate.

Fig. 4 is safety against reasoning, on average and for each reasoning benchmark.
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.ticker as ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rpsa.report.drawing import (
    BLUE,
    GREY,
    add_legend,
    has_grid,
    literal,
    mark,
    marker_of,
    methods_of,
    new_panels,
    safety_sets,
    set_title,
    style_of,
)
from rpsa.report.summaries import RunResult, Summary

_REASONING, _ATTACK = "Reasoning accuracy (%)  → better", "Attack success rate (%)  → better upwards"


def scatter(summaries: Sequence[Summary]) -> Figure:
    """Mean reasoning accuracy against mean ASR, inverted, so that the upper right corner is best.

    Large marks are means, small ones the single runs. On a grid of learning rates a thin line joins a method's means
    in the order of the rates, and there is a panel for each safety set.
    """
    sets = safety_sets(summaries)
    figure, panels = new_panels(1, len(sets), 3.7)
    for axes, safety in zip(panels[0], sets, strict=True):
        _draw(axes, _on(safety, summaries), "mean")
        axes.set_xlabel(_REASONING)
        axes.set_ylabel(_ATTACK)
        if len(sets) > 1:
            set_title(axes, safety or "")
    add_legend(figure, methods_of(summaries), lines=False)
    return figure


def scatter_benchmarks(summaries: Sequence[Summary]) -> Figure | None:
    """A panel for each reasoning benchmark: accuracy on it against mean ASR; None where there is only one benchmark.

    Two panels beside each other; with several safety sets a column for each.
    """
    benchmarks = [name for name in summaries[0].reasoning if name != "mean"]
    if len(benchmarks) < 2:
        return None
    sets = safety_sets(summaries)
    wanted = [(benchmark, safety) for benchmark in benchmarks for safety in sets]
    columns = max(2, len(sets))
    rows = -(-len(wanted) // columns)
    figure, panels = new_panels(rows, columns, 2.3, width=2.7)
    places = [axes for row in panels for axes in row]
    for axes, (benchmark, safety) in zip(places, wanted, strict=False):
        _draw(axes, _on(safety, summaries), benchmark)
        set_title(axes, benchmark if len(sets) == 1 else f"{benchmark}, {safety}")
    for axes in places[max(0, len(wanted) - columns) : len(wanted)]:  # the last of each column
        axes.set_xlabel(_REASONING)
    for axes in places[len(wanted) :]:
        axes.set_visible(False)
    figure.supylabel(_ATTACK, fontsize=9.5)
    add_legend(figure, methods_of(summaries), lines=False)
    return figure


def _on(safety: str | None, summaries: Sequence[Summary]) -> list[Summary]:
    return [s for s in summaries if s.is_original or s.safety == safety]


def _draw(axes: Axes, shown: Sequence[Summary], benchmark: str) -> None:
    on_a_grid = has_grid(shown)
    for summary in () if on_a_grid else shown:
        for run in summary.runs:
            mark(axes, style_of(summary.method), run.reasoning[benchmark], run.asr["mean"], 0.55, alpha=0.5)
    for method in methods_of(shown):
        means = sorted((s for s in shown if s.method == method), key=lambda s: s.lr or 0)
        style = style_of(method)
        xs, ys = [100 * s.reasoning[benchmark] for s in means], [100 * s.asr["mean"] for s in means]
        axes.plot(xs, ys, "-", color=style.colour, linewidth=0.8, alpha=0.6, zorder=2)
        for summary in means:
            scale = 0.75 if on_a_grid else 1.15
            mark(axes, style, summary.reasoning[benchmark], summary.asr["mean"], scale)
    highest = max(100 * run.asr["mean"] for s in shown for run in s.runs)
    axes.set_ylim(highest + max(4, 0.08 * highest), -max(4, 0.08 * highest))
    axes.margins(x=0.08)


_LINES = [("#1b1f24", "-"), ("#0f7bab", "--"), ("#b5459a", "-."), ("#8a8d00", ":")]
_MANY = 4  # lines in one panel that can still be told apart
_LANE = 1.25


def trajectories(results: Sequence[RunResult]) -> Figure | None:
    """c (Eq. 6) and k (Eq. 7) over the steps of every run with a dynamic k; None where there is no such run."""
    dynamic = [result for result in results if result.trajectory and result.trajectory["step"]]
    if not dynamic:
        return None
    methods = list(dict.fromkeys(result.method for result in dynamic))
    figure, panels = new_panels(2 * len(methods), 1, 1.9)
    for index, method in enumerate(methods):
        top, bottom = panels[2 * index][0], panels[2 * index + 1][0]
        runs = [result for result in dynamic if result.method == method]
        if len(runs) > _MANY:
            _draw_spread(top, runs, "k", method)
            _draw_spread(bottom, runs, "c", method)
        else:
            _draw_lanes(top, runs)
            _draw_conflicts(bottom, runs)
        spread = "" if len(runs) <= _MANY else f" ({len(runs)} runs: median, 10-90%)"
        set_title(top, f"{method}: frozen ratio k{spread}")
        set_title(bottom, f"{method}: conflict c of the two gradients")
        top.set_ylabel("k")
        bottom.set_ylabel("c")
        bottom.set_xlabel("Optimizer step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def learning_rates(summaries: Sequence[Summary]) -> Figure | None:
    """STR, ASR, over-refusal and reasoning against the learning rate; None without a grid.

    A column for each safety set. Lines are means, bands the smallest and largest value over bases and seeds.
    """
    if not has_grid(summaries):
        return None
    sets = safety_sets(summaries)
    rows: list[tuple[str, Callable[[RunResult | Summary], float | None]]] = [
        ("Safety Tax Rate ↓", lambda of: of.tax),
        ("ASR (%) ↓", lambda of: 100 * of.asr["mean"]),
        *(
            (f"Over-refusal,\n{literal(name)} (%) ↓", lambda of, name=name: 100 * of.over_refusal[name])
            for name in summaries[0].over_refusal
        ),
        ("Reasoning (%) ↑", lambda of: 100 * of.reasoning["mean"]),
    ]
    figure, panels = new_panels(len(rows), len(sets), 1.75, sharey="row")
    originals = [s for s in summaries if s.is_original]
    for row, (label, read) in enumerate(rows):
        for column, safety in enumerate(sets):
            axes = panels[row][column]
            for method in methods_of([s for s in summaries if not s.is_original]):
                _draw_curve(
                    axes, [s for s in summaries if (s.method, s.safety) == (method, safety)], method, read
                )
            for original in originals:
                if (value := read(original)) is not None:
                    axes.axhline(value, color=BLUE, linewidth=1, linestyle="--", zorder=1)
            if row == 0:
                # A run whose ASR hardly fell has an STR without bounds: the means set the scale.
                taxes = [s.tax for s in summaries if s.tax is not None]
                axes.set_ylim(min([-0.05, *taxes]) - 0.05, max([0.2, *taxes]) * 1.1)
            _log_rates(axes, [s.lr for s in summaries if s.lr is not None])
            if column == 0:
                axes.set_ylabel(label)
            if row == 0:
                set_title(axes, safety or "")
            if row == len(rows) - 1:
                axes.set_xlabel("Learning rate")
    add_legend(figure, methods_of(summaries), lines=True)
    return figure


def _draw_spread(axes: Axes, runs: Sequence[RunResult], what: str, method: str) -> None:
    colour = style_of(method).colour
    steps, low, median, high = _quantiles([run.trajectory for run in runs if run.trajectory], what)
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, median, color=colour, linewidth=1.6)
    if what == "k":
        axes.set_ylim(-0.07, 1.07)
    _half_way(axes, 0.5)


def _draw_lanes(axes: Axes, runs: Sequence[RunResult]) -> None:
    """k of each run in a lane of its own, the first on top: as steps over each other they cannot be told apart."""
    floors = [_LANE * place for place in reversed(range(len(runs)))]
    for run, floor, (colour, line) in zip(runs, floors, _LINES, strict=False):
        steps, k = _series(run, "k")
        axes.fill_between(steps, floor, floor + k, step="post", color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            steps,
            floor + k,
            drawstyle="steps-post",
            color=colour,
            linestyle=line,
            linewidth=1.3,
            label=literal(f"{run.base}, seed {run.seed}"),
        )
        _half_way(axes, floor + 0.5)
    axes.set_yticks([floor + k for floor in floors for k in (0, 1)], ["0", "1"] * len(floors))
    axes.set_ylim(-0.07, floors[0] + 1.07)


def _draw_conflicts(axes: Axes, runs: Sequence[RunResult]) -> None:
    for run, (colour, line) in zip(runs, _LINES, strict=False):
        axes.plot(*_series(run, "c"), color=colour, linestyle=line, linewidth=1.3)
    _half_way(axes, 0.5)


def _series(run: RunResult, what: str) -> tuple[Any, Any]:
    """Steps and values; None, where c was not finite, is NaN."""
    found = run.trajectory
    assert found is not None
    return np.array(found["step"], dtype=float), np.array(found[what], dtype=float)


def _half_way(axes: Axes, height: float) -> None:
    axes.axhline(height, color=GREY, linewidth=0.7, linestyle=(0, (1, 3)), zorder=1)


def _quantiles(series: Sequence[Any], what: str) -> tuple[list[float], ...]:
    """The steps that any run measured, and over the runs there the 10%, 50% and 90% quantiles."""
    values: dict[float, list[float]] = {}
    for one in series:
        for step, value in zip(one["step"], one[what], strict=True):
            if value is not None:
                values.setdefault(step, []).append(value)
    steps = sorted(values)
    return steps, *([float(np.quantile(values[step], q)) for step in steps] for q in (0.1, 0.5, 0.9))


def _draw_curve(
    axes: Axes, summaries: Sequence[Summary], method: str, read: Callable[[RunResult | Summary], float | None]
) -> None:
    style = style_of(method)
    points = []
    for summary in sorted(summaries, key=lambda s: s.lr or 0):
        mean = read(summary)
        values = [value for run in summary.runs if (value := read(run)) is not None]
        if mean is not None and summary.lr is not None:
            points.append((summary.lr, mean, min(values, default=mean), max(values, default=mean)))
    if points:
        rates, means, low, high = zip(*points, strict=True)
        axes.fill_between(rates, low, high, color=style.colour, alpha=0.08, linewidth=0)
        axes.plot(
            rates, means, color=style.colour, linestyle=style.line, linewidth=1.3, **marker_of(style, 0.7)
        )


def _log_rates(axes: Axes, rates: Sequence[float]) -> None:
    axes.set_xscale("log")
    shown = sorted(set(rates))
    axes.set_xticks([rate for rate in shown if f"{rate:.0e}"[0] in "135"] or shown)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-")))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
