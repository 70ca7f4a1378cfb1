"""Sweeps as figures (Fig. 5 and 7): the safety tax, reasoning and attack success at each value of a setting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rpsa.report.drawing import GREY, literal, style_of
from rpsa.report.summaries import RunResult, Summary, summarise

_ORIGINAL = "original"


@dataclass(frozen=True)
class SweepPoint:
    """One method at one value. Rates are fractions in [0, 1].

    Attributes:
        value: as the axis shows it; values stand in order of appearance, one as far from the next as any other.
        reasoning, asr: means over the benchmarks.
        tax: STR, with its 95% interval; None for the untouched model, and where STR is undefined.
        over_refusal: None where nothing measures it.
        column: the panels of equal `column` stand below each other, and it is their title.
    """

    value: str
    method: str
    reasoning: float
    asr: float
    tax: float | None
    tax_interval: tuple[float, float] | None
    over_refusal: float | None
    column: str = ""


def sweep_figure(title: str, points: Sequence[SweepPoint]) -> Figure:
    """STR with its intervals, and below it mean reasoning, ASR and over-refusal, a line and a mark for each method.

    `title` names what is swept, under the axis.
    """
    rows: list[tuple[str, Callable[[SweepPoint], float | None]]] = [
        ("Safety Tax Rate ↓", lambda of: of.tax),
        ("Reasoning (%) ↑", lambda of: 100 * of.reasoning),
        ("ASR (%) ↓", lambda of: 100 * of.asr),
    ]
    if any(point.over_refusal is not None for point in points):
        rows.append(
            (
                "Over-refusal (%) ↓",
                lambda of: None if of.over_refusal is None else 100 * of.over_refusal,
            )
        )
    columns = list(dict.fromkeys(point.column for point in points))
    values = list(dict.fromkeys(point.value for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    shifts = _shifts(methods)
    width = max(4.8 if len(columns) == 1 else 3.0, 1.0 + 0.55 * len(values)) * len(columns)
    figure = Figure(figsize=(min(width, 16), 1.2 + 1.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for level, (label, read) in enumerate(rows):
        grid[level][0].set_ylabel(label, fontsize=9.5)
        for axes, column in zip(grid[level], columns, strict=True):
            _dress(axes, values)
            for method, shift in shifts.items():
                own = {
                    values.index(point.value) + shift: point
                    for point in points
                    if (point.method, point.column) == (method, column)
                }
                _draw(axes, method, {place: read(point) for place, point in own.items()})
                if level == 0:
                    _draw_intervals(axes, method, {place: point.tax_interval for place, point in own.items()})
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(literal(column), fontsize=10)
        axes.axhline(0, color=GREY, linewidth=0.7, zorder=1)
    _scale_tax(grid[0][0], points)
    for axes in grid[-1]:
        axes.set_xlabel(literal(title), fontsize=9.5)
    figure.legend(
        handles=[_handle(method) for method in methods],
        loc="outside lower center",
        ncols=len(methods) if len(methods) <= 3 else 2 if width < 6 else 4,
        frameon=False,
        fontsize=9,
    )
    return figure


def _shifts(methods: Sequence[str]) -> dict[str, float]:
    """How far beside a value each method stands, so that intervals do not cover each other."""
    aligned = [method for method in methods if method != _ORIGINAL]
    step = min(0.14, 0.7 / max(1, len(aligned)))
    beside = {method: step * (index - (len(aligned) - 1) / 2) for index, method in enumerate(aligned)}
    return {method: beside.get(method, 0.0) for method in methods}


def _dress(axes: Axes, values: Sequence[str]) -> None:
    axes.grid(True, axis="y", color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, length=3)
    axes.set_xticks(range(len(values)), [literal(value).replace("+", "\n") for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.margins(y=0.15)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw(axes: Axes, method: str, heights: Mapping[float, float | None]) -> None:
    known = {place: height for place, height in heights.items() if height is not None}
    if known:
        axes.plot(list(known), list(known.values()), **_line(method))


def _draw_intervals(axes: Axes, method: str, intervals: Mapping[float, tuple[float, float] | None]) -> None:
    for place, interval in intervals.items():
        if interval is not None:
            axes.plot([place] * 2, interval, color=style_of(method).colour, linewidth=1.1)


def _line(method: str) -> dict[str, Any]:
    style = style_of(method)
    return {
        "color": style.colour,
        "linestyle": "--" if method == _ORIGINAL else style.line,
        "linewidth": 1.0,
        "marker": style.marker,
        "markersize": style.size(0.45 if method == _ORIGINAL else 0.75),
        "markerfacecolor": style.face,
        "markeredgecolor": style.colour if style.hollow else "white",
        "markeredgewidth": 1.1 if style.hollow else 0.5,
        "zorder": 3,
    }


def _handle(method: str) -> Line2D:
    return Line2D([], [], label=literal(method), **_line(method))


def _scale_tax(axes: Axes, points: Sequence[SweepPoint]) -> None:
    """The values set the scale: where attack success hardly fell, an interval has no useful end."""
    taxes = [point.tax for point in points if point.tax is not None] or [0.0]
    low, high = min(0.0, *taxes), max(0.0, *taxes)
    room = max(0.05, 0.6 * (high - low))
    axes.set_ylim(low - room, high + room)


# What a list of modules is called in the paper.
_MODULES = {
    frozenset({"gate_proj", "up_proj", "down_proj"}): "MLP",
    frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}): "Attention",
    frozenset({"gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}): "both",
}


Points = list[tuple[dict[str, str], list[Summary]]]
"""Of a sweep: the swept settings as an axis shows them, and a summary of each method there."""


def sweep_figures(results: Sequence[RunResult]) -> dict[str, Figure]:
    """A figure for each sweep by its name: the first setting along the axis, the others as columns."""
    return {name: _figure(points) for name, points in sweep_points(results).items()}


def sweep_points(results: Sequence[RunResult]) -> dict[str, Points]:
    """By the names of the sweeps that have a result."""
    names = dict.fromkeys(result.sweep for result in results if result.sweep is not None)
    return {name: _points([r for r in results if r.sweep == name], results) for name in names}


def _points(swept: Sequence[RunResult], results: Sequence[RunResult]) -> Points:
    keys = max((list(result.point) for result in swept), key=len)
    points = dict.fromkeys(tuple(shown(r.point.get(key)) for key in keys) for r in swept)
    settings = [dict(zip(keys, values, strict=True)) for values in points]
    return [(point, _summaries(swept, results, point)) for point in settings]


def _figure(points: Points) -> Figure:
    marks = [
        point_of(summary, values[0], ", ".join(values[1:]))
        for point, summaries in points
        for values in (list(point.values()),)
        for summary in summaries
    ]
    return sweep_figure(next(iter(points[0][0])), marks)


def _summaries(
    swept: Sequence[RunResult], results: Sequence[RunResult], point: Mapping[str, str]
) -> list[Summary]:
    """Of the methods at one point, against the untouched models."""
    there = [
        replace(result, sweep=None)  # a summary is of a matrix
        for result in swept
        if all(shown(result.point.get(key)) == value for key, value in point.items())
    ]
    originals = [r for r in results if r.is_original and r.sweep is None]
    return [summary for summary in summarise([*originals, *there]) if not summary.is_original]


def point_of(summary: Summary, value: str, column: str = "") -> SweepPoint:
    """A method's means at one value; of over-refusal the set that is refused most."""
    return SweepPoint(
        value=value,
        method=summary.method,
        reasoning=summary.reasoning["mean"],
        asr=summary.asr["mean"],
        tax=summary.tax,
        tax_interval=summary.tax_interval,
        over_refusal=max(summary.over_refusal.values(), default=None),
        column=column,
    )


def shown(value: Any) -> str:
    """A swept value as an axis shows it."""
    if isinstance(value, list):
        return _MODULES.get(frozenset(value), "+".join(map(str, value)))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
