"""Figures of the paper: where the Fisher lies (Fig. 1 and 2), perturbations (Fig. 3), masks and controls (Fig. 6)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rpsa.analysis.anatomy import Anatomy, Tally, is_layer_matrix
from rpsa.analysis.perturbation import ORIGINAL, Effect
from rpsa.analysis.structure import Role
from rpsa.evaluation.statistics import mean_interval
from rpsa.report.drawing import BLUE, GREEN, GREY, ORANGE, literal, style_of
from rpsa.report.summaries import RunResult, Summary

_KINDS = {"attention": BLUE, "mlp": ORANGE, "embedding": GREEN, "head": GREEN}
_KIND_NAMES = {"attention": "Attention", "mlp": "MLP"}
_WIDTH = 6.0
_ROW = 0.21  # inches


def layer_map(of: Anatomy, title: str) -> Figure:
    """Fig. 1: the mean Fisher of each matrix in each layer, on a logarithmic scale, and of each layer as a whole."""
    rows = _rows(of)
    layers = list(of.layers())
    values = np.full((len(rows), len(layers)), np.nan)
    for (layer, row), tally in of.by(
        lambda role: (role.layer, _row_of(role)) if role.layer is not None else None
    ).items():
        values[rows.index(row), layers.index(layer)] = tally.mean
    figure = Figure(figsize=(_WIDTH, 2.2 + _ROW * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[max(3, _ROW * len(rows) / 0.42), 3])
    _heat_map(upper, values, rows, figure)
    upper.set_title(literal(f"{title}: mean Fisher"), fontsize=10)
    lower.plot(range(len(layers)), [t.mean for t in of.layers().values()], "o-", color=BLUE, markersize=4)
    lower.set_yscale("log")
    lower.set_ylabel("Whole layer", fontsize=9.5)
    lower.set_xlabel("Layer", fontsize=9.5)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.xaxis.set_major_formatter(lambda x, _: str(layers[int(x)]) if 0 <= x < len(layers) else "")
    lower.grid(True, color="#e3e5e8", linewidth=0.7)
    lower.spines[["top", "right"]].set_visible(False)
    lower.tick_params(which="both", labelsize=8.5, length=3)
    return figure


def module_bars(of: Anatomy, title: str) -> Figure:
    """Fig. 2: the mean Fisher of each matrix over all layers, and of attention's and the MLP's matrices."""
    matrices = of.matrices() | of.by(
        lambda role: role.module if role.kind in ("embedding", "head") and role.is_matrix else None
    )
    kinds = {role.module: role.kind for role in of.roles.values()}
    figure = Figure(figsize=(_WIDTH, 1.1 + _ROW * max(len(matrices), 5)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    blocks = of.blocks()
    _bars(left, list(matrices), list(matrices.values()), [kinds[name] for name in matrices])
    _bars(right, [_KIND_NAMES[kind] for kind in blocks], list(blocks.values()), list(blocks))
    right.set_ylim(left.get_ylim())  # bars of one thickness
    left.set_title(literal(f"{title}: mean Fisher by matrix"), fontsize=10)
    right.set_title("of all matrices", fontsize=10)
    return figure


def _rows(of: Anatomy) -> list[str]:
    """Matrices, attention's first, then what a layer has besides."""
    kinds = {role.module: role.kind for role in of.roles.values()}
    order = ["attention", "mlp", "other"]
    matrices = sorted(of.matrices(), key=lambda name: order.index(kinds[name]))
    inside = {_row_of(role) for role in of.roles.values() if role.layer is not None}
    return matrices + [row for row in ("biases", "norms", "others") if row in inside]


def _row_of(role: Role) -> str:
    if is_layer_matrix(role):
        return role.module
    if role.kind == "norm":
        return "norms"
    return "biases" if role.module.endswith("bias") else "others"


def _heat_map(axes: Axes, values: np.ndarray, rows: Sequence[str], figure: Figure) -> None:
    positive = values[values > 0]
    scale = LogNorm(positive.min(), positive.max()) if positive.size and np.ptp(positive) else None
    axes.set_facecolor("#eceef0")  # a mean of zero, or no such matrix in this layer
    image = axes.imshow(np.where(values > 0, values, np.nan), aspect="auto", cmap="viridis", norm=scale)
    axes.set_yticks(range(len(rows)), map(literal, rows), fontsize=8.5)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelbottom=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8.5, length=3)


def _bars(axes: Axes, names: Sequence[str], tallies: Sequence[Tally], kinds: Sequence[str]) -> None:
    places = range(len(names))
    axes.barh(places, [t.mean for t in tallies], color=[_KINDS.get(kind, GREY) for kind in kinds], height=0.7)
    axes.set_yticks(places, map(literal, names), fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(True, axis="x", color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8.5, length=3)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(3 if len(names) < 3 else 5))
    axes.xaxis.get_offset_text().set_fontsize(8.5)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))


_COLOURS = {
    ORIGINAL: GREY,
    "fisher": ORANGE,
    "random": BLUE,
    "random_per_tensor": "#7fb2e5",
    "random_nonzero": "#1b1f24",
    "magnitude": GREEN,
    "inverse": "#b5459a",
}
_SELECTIONS = {
    ORIGINAL: "untouched",
    "fisher": "highest Fisher",
    "random": "random",
    "random_per_tensor": "random, Fisher's count in each tensor",
    "random_nonzero": "random where F > 0",
    "magnitude": "largest weights",
    "inverse": "lowest Fisher",
}


def perturbation_bars(effects: Sequence[Effect]) -> Figure:
    """A panel for each fraction and factor, a group of bars for each benchmark, and one for their mean.

    Thin lines are 95% intervals, dots the single draws of the mean.
    """
    original = next(effect for effect in effects if effect.selection == ORIGINAL)
    panels = list(dict.fromkeys((e.fraction, e.factor) for e in effects if e is not original))
    selections = [original.selection, *dict.fromkeys(e.selection for e in effects if e is not original)]
    figure = Figure(figsize=(7.2, 0.8 + 1.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (fraction, factor) in zip(
        figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0], panels, strict=True
    ):
        shown = [
            original,
            *(e for e in effects if (e.fraction, e.factor) == (fraction, factor) and e is not original),
        ]
        _draw(axes, shown, selections)
        axes.set_title(f"{100 * fraction:g}% of all elements × {factor:g}", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw(axes: Axes, effects: Sequence[Effect], selections: Sequence[str]) -> None:
    benchmarks = list(effects[0].accuracy)
    width = 0.84 / len(selections)
    for effect in effects:
        offset = (selections.index(effect.selection) - (len(selections) - 1) / 2) * width
        places = [group + offset for group in range(len(benchmarks))]
        estimates = [effect.accuracy[name] for name in benchmarks]
        axes.bar(
            places,
            [100 * e.value for e in estimates],
            0.9 * width,
            color=_COLOURS[effect.selection],
            label=_SELECTIONS[effect.selection],
        )
        for place, one in zip(places, estimates, strict=True):
            axes.plot([place, place], [100 * one.low, 100 * one.high], color="#1b1f24", linewidth=0.9)
        if len(effect.draws) > 1:
            axes.plot(
                [places[-1]] * len(effect.draws),
                [100 * draw for draw in effect.draws],
                "o",
                color="#1b1f24",
                markersize=2.2,
            )
    if len(benchmarks) > 1:
        axes.axvline(len(benchmarks) - 1.5, color="#c9ccd1", linewidth=0.8)
    axes.set_xticks(range(len(benchmarks)), map(literal, benchmarks), fontsize=9)
    axes.set_ylim(0, 104)
    axes.set_ylabel("Accuracy (%)", fontsize=9.5)
    axes.grid(True, axis="y", color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8.5, length=3)
    axes.tick_params(axis="x", length=0)


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
