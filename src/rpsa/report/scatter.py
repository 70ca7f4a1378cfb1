"""Fig. 4 of the paper: safety against reasoning, on average and for each reasoning benchmark."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rpsa.report.drawing import (
    add_legend,
    has_grid,
    mark,
    methods_of,
    new_panels,
    safety_sets,
    set_title,
    style_of,
)
from rpsa.report.results import Summary

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
    for axes in places[len(wanted) :]:
        axes.set_visible(False)
    figure.supxlabel(_REASONING, fontsize=9.5)
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
