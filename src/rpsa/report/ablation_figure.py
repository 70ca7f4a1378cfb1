"""Fig. 6: masks and other controls side by side, each with its 95% interval."""

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rpsa.evaluation.statistics import mean_interval
from rpsa.report.drawing import literal, style_of
from rpsa.report.results import RunResult, Summary

_PANELS = ("STR ↓", "Reasoning (%) ↑", "ASR (%) ↓")


def ablation(summaries: Sequence[Summary]) -> Figure | None:
    """STR, reasoning and ASR of every method, means over runs with intervals; None for fewer than three methods.

    Small marks are single runs. A summary for each method, at one learning rate on one safety set.
    """
    shown = [s for s in summaries if not s.is_original]
    methods = [s.method for s in shown]
    if len(shown) < 3 or len(set(methods)) < len(methods):
        return None
    figure = Figure(figsize=(7.2, 1.1 + 0.3 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    original = next((s for s in summaries if s.is_original), None)
    for axes, title in zip(panels, _PANELS, strict=True):
        axes.set_title(title, fontsize=10)
        axes.grid(True, axis="x", color="#e3e5e8", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8.5, length=3)
        axes.tick_params(axis="y", length=0)
        for place, summary in enumerate(shown):
            _row(axes, place, summary, title)
        if original is not None and not title.startswith("STR"):
            rates = original.reasoning if title.startswith("Reasoning") else original.asr
            axes.axvline(100 * rates["mean"], color="#2563ab", linewidth=1, linestyle="--")
    panels[0].axvline(0, color="#5f6368", linewidth=0.8)
    panels[0].set_yticks(range(len(shown)), map(literal, methods))
    panels[0].invert_yaxis()
    return figure


def _row(axes: "object", place: int, summary: Summary, title: str) -> None:
    style = style_of(summary.method)
    values = [value for run in summary.runs if (value := _value(run, title)) is not None]
    if title.startswith("STR"):
        mean, interval = summary.tax, summary.tax_interval
    else:
        mean, interval = (sum(values) / len(values) if values else None), mean_interval(values)
    draw = axes.plot  # type: ignore[attr-defined]
    draw(values, [place] * len(values), "o", color=style.colour, markersize=3, alpha=0.35)
    if mean is None:
        return
    if interval is not None:
        draw(interval, [place, place], "-", color=style.colour, linewidth=1.6)
    face = style.face
    draw(
        mean,
        place,
        linestyle="",
        marker=style.marker,
        color=style.colour,
        markerfacecolor=face,
        markersize=style.size(0.8),
    )


def _value(run: RunResult, title: str) -> float | None:
    if title.startswith("STR"):
        return run.tax
    return 100 * (run.reasoning if title.startswith("Reasoning") else run.asr)["mean"]
