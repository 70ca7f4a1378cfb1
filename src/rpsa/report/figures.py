"""Figures of a report: Fig. 4 of the paper, the course of c and k, and everything against the learning rate.

Drawn with matplotlib's Agg canvas, narrow enough to be read on a phone.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.ticker as ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rpsa.report.results import RunResult, Summary

BLUE, GREEN, ORANGE, GREY = "#2563ab", "#2e8540", "#d9660a", "#5f6368"
_COLOURS = {"original": BLUE, "fft": GREEN, "lora": ORANGE}
_VARIANTS = {
    "": "^",
    "rpsa": "*",
    "constant": "D",
    "random": "X",
    "random_per_tensor": "P",
    "noise_k": "v",
    "gradient_only": "p",
    "raw_moments": "h",
    "sigma4": "d",
    "magnitude": "<",
    "inverse": ">",
}
_LINES = [("#1b1f24", "-"), ("#0f7bab", "--"), ("#b5459a", "-."), ("#8a8d00", ":")]
_WIDTH = 4.8
_MANY = 4  # lines in one panel that can still be told apart


@dataclass(frozen=True)
class Style:
    """Colour tells the paradigm, shape the variant; LoRA is hollow, so that neither needs colour."""

    colour: str
    marker: str
    hollow: bool

    @property
    def face(self) -> str:
        return "white" if self.hollow else self.colour

    @property
    def line(self) -> str:
        return {"D": "--", "X": ":"}.get(self.marker, "-")

    def size(self, scale: float = 1.0) -> float:
        return scale * (13 if self.marker == "*" else 8.5 if self.marker != "D" else 7)


def style_of(method: str) -> Style:
    paradigm, _, variant = method.partition("+")
    if paradigm == "original":
        return Style(BLUE, "o", False)
    return Style(_COLOURS.get(paradigm, GREY), _VARIANTS.get(variant, "s"), paradigm == "lora")


def scatter(summaries: Sequence[Summary]) -> Figure:
    """Fig. 4: mean reasoning accuracy against mean ASR, inverted, so that the upper right corner is best.

    Large marks are means, small ones the single runs. On a grid of learning rates a thin line joins a method's means
    in the order of the rates, and there is a panel for each safety set.
    """
    sets = _safety_sets(summaries)
    figure, panels = _panels(1, len(sets), 3.7)
    for axes, safety in zip(panels[0], sets, strict=True):
        shown = [s for s in summaries if s.is_original or s.safety == safety]
        on_a_grid = _has_grid(shown)
        for summary in () if on_a_grid else shown:
            style = style_of(summary.method)
            for run in summary.runs:
                _mark(axes, style, run.reasoning["mean"], run.asr["mean"], 0.55, alpha=0.5)
        for method in _methods(shown):
            means = sorted((s for s in shown if s.method == method), key=lambda s: s.lr or 0)
            style = style_of(method)
            xs, ys = [100 * s.reasoning["mean"] for s in means], [100 * s.asr["mean"] for s in means]
            axes.plot(xs, ys, "-", color=style.colour, linewidth=0.8, alpha=0.6, zorder=2)
            for summary in means:
                _mark(
                    axes, style, summary.reasoning["mean"], summary.asr["mean"], 0.75 if on_a_grid else 1.15
                )
        axes.set_xlabel("Reasoning accuracy (%)  → better")
        axes.set_ylabel("Attack success rate (%)  → better upwards")
        highest = max(100 * run.asr["mean"] for s in shown for run in s.runs)
        axes.set_ylim(highest + max(4, 0.08 * highest), -max(4, 0.08 * highest))
        axes.margins(x=0.08)
        if len(sets) > 1:
            _title(axes, safety or "")
    _legend(figure, _methods(summaries), lines=False)
    return figure


def trajectories(results: Sequence[RunResult]) -> Figure | None:
    """c (Eq. 6) and k (Eq. 7) over the steps of every run with a dynamic k; None where there is no such run."""
    dynamic = [result for result in results if result.trajectory and result.trajectory["step"]]
    if not dynamic:
        return None
    methods = list(dict.fromkeys(result.method for result in dynamic))
    figure, panels = _panels(2 * len(methods), 1, 1.55)
    for index, method in enumerate(methods):
        top, bottom = panels[2 * index][0], panels[2 * index + 1][0]
        runs = [result for result in dynamic if result.method == method]
        _draw_trajectories(top, runs, "k", method)
        _draw_trajectories(bottom, runs, "c", method)
        spread = "" if len(runs) <= _MANY else f" ({len(runs)} runs: median, 10-90%)"
        _title(top, f"{method}: frozen ratio k{spread}")
        _title(bottom, f"{method}: conflict c of the two gradients")
        top.set_ylim(-0.07, 1.07)
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
    if not _has_grid(summaries):
        return None
    sets = _safety_sets(summaries)
    rows: list[tuple[str, Callable[[RunResult | Summary], float | None]]] = [
        ("Safety Tax Rate ↓", lambda of: of.tax),
        ("ASR (%) ↓", lambda of: 100 * of.asr["mean"]),
        *(
            (f"Over-refusal,\n{name} (%) ↓", lambda of, name=name: 100 * of.over_refusal[name])
            for name in list(summaries[0].over_refusal)[:1]
        ),
        ("Reasoning (%) ↑", lambda of: 100 * of.reasoning["mean"]),
    ]
    figure, panels = _panels(len(rows), len(sets), 1.75, sharey="row")
    originals = [s for s in summaries if s.is_original]
    for row, (label, read) in enumerate(rows):
        for column, safety in enumerate(sets):
            axes = panels[row][column]
            for method in _methods([s for s in summaries if not s.is_original]):
                _draw_curve(
                    axes, [s for s in summaries if (s.method, s.safety) == (method, safety)], method, read
                )
            for original in originals:
                if (value := read(original)) is not None:
                    axes.axhline(value, color=BLUE, linewidth=1, linestyle="--", zorder=1)
            if row == 0:
                # A run whose ASR hardly fell has an STR without bounds: the means set the scale.
                taxes = [s.tax for s in summaries if s.tax is not None]
                axes.set_ylim(min(-0.05, *taxes) - 0.05, max(0.2, *taxes) * 1.1)
            _log_rates(axes, [s.lr for s in summaries if s.lr is not None])
            if column == 0:
                axes.set_ylabel(label)
            if row == 0:
                _title(axes, safety or "")
            if row == len(rows) - 1:
                axes.set_xlabel("Learning rate")
    _legend(figure, _methods(summaries), lines=True)
    return figure


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def to_svg(figure: Figure) -> bytes:
    """SVG without a date, so that equal results give equal files."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "rpsa"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10)


def _panels(rows: int, columns: int, height: float, sharey: Any = False) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(
        figsize=(_WIDTH if columns == 1 else 3.6 * columns, 0.6 + height * rows), layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for axes in grid.flat:
        axes.grid(True, color="#e3e5e8", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5, length=3)
        axes.xaxis.label.set_fontsize(9.5)
        axes.yaxis.label.set_fontsize(9.5)
    return figure, [list(row) for row in grid]


def _mark(axes: Axes, style: Style, reasoning: float, asr: float, scale: float, alpha: float = 1.0) -> None:
    axes.plot(
        100 * reasoning,
        100 * asr,
        linestyle="none",
        clip_on=False,
        zorder=3 if alpha < 1 else 4,
        **_marker(style, scale, alpha),
    )


def _marker(style: Style, scale: float, alpha: float = 1.0) -> dict[str, Any]:
    return {
        "marker": style.marker,
        "markersize": style.size(scale),
        "markerfacecolor": style.face,
        "markeredgecolor": style.colour if style.hollow else "white",
        "markeredgewidth": 1.5 * scale if style.hollow else 0.7 * scale,
        "alpha": alpha,
    }


def _legend(figure: Figure, methods: Sequence[str], lines: bool) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=style_of(method).colour,
            linestyle=("--" if method == "original" else style_of(method).line) if lines else "none",
            label=method,
            **(_marker(style_of(method), 0.9) if not (lines and method == "original") else {}),
        )
        for method in methods
    ]
    columns = min(len(handles), 3 if figure.get_figwidth() < 6 else 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _draw_trajectories(axes: Axes, runs: Sequence[RunResult], what: str, method: str) -> None:
    colour = style_of(method).colour
    if len(runs) > _MANY:
        steps, low, median, high = _quantiles([run.trajectory for run in runs if run.trajectory], what)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, median, color=colour, linewidth=1.6)
    else:
        for index, run in enumerate(runs):
            assert run.trajectory is not None
            axes.plot(
                run.trajectory["step"],
                run.trajectory[what],
                drawstyle="steps-post" if what == "k" else "default",
                color=_LINES[index % len(_LINES)][0],
                linestyle=_LINES[index % len(_LINES)][1],
                linewidth=1.3,
                label=f"{run.base}, seed {run.seed}",
            )
    axes.axhline(0.5, color=GREY, linewidth=0.7, linestyle=(0, (1, 3)), zorder=1)


def _quantiles(series: Sequence[Any], what: str) -> tuple[list[float], ...]:
    """The steps that any run measured, and over the runs there the 10%, 50% and 90% quantiles."""
    values: dict[float, list[float]] = {}
    for one in series:
        for step, value in zip(one["step"], one[what], strict=True):
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
        if mean is not None:
            points.append((summary.lr, mean, min(values, default=mean), max(values, default=mean)))
    if points:
        rates, means, low, high = zip(*points, strict=True)
        axes.fill_between(rates, low, high, color=style.colour, alpha=0.08, linewidth=0)
        axes.plot(
            rates, means, color=style.colour, linestyle=style.line, linewidth=1.3, **_marker(style, 0.7)
        )


def _log_rates(axes: Axes, rates: Sequence[float]) -> None:
    axes.set_xscale("log")
    shown = sorted(set(rates))
    axes.set_xticks([rate for rate in shown if f"{rate:.0e}"[0] in "135"] or shown)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-")))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _methods(summaries: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(summary.method for summary in summaries))


def _safety_sets(summaries: Sequence[Summary]) -> list[str | None]:
    return list(dict.fromkeys(s.safety for s in summaries if not s.is_original)) or [None]


def _has_grid(summaries: Sequence[Summary]) -> bool:
    """Whether some method ran at several learning rates."""
    rates: dict[str, set[float]] = {}
    for summary in summaries:
        if summary.lr is not None:
            rates.setdefault(summary.method, set()).add(summary.lr)
    return any(len(found) > 1 for found in rates.values())
