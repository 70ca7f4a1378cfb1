"""Fig. 1 and 2 of the paper: the mean Fisher by layer and module, by matrix, and of attention against MLP."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rpsa.analysis.anatomy import Anatomy, Tally, is_layer_matrix
from rpsa.analysis.structure import Role
from rpsa.report.drawing import BLUE, GREEN, GREY, ORANGE, literal

_KINDS = {"attention": BLUE, "mlp": ORANGE, "embedding": GREEN, "head": GREEN}
_NAMES = {"attention": "Attention", "mlp": "MLP"}
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
    _bars(right, [_NAMES[kind] for kind in blocks], list(blocks.values()), list(blocks))
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
