"""Drawing: the marks, panels, legends and files that the figures of a report have in common.

Drawn with matplotlib's Agg canvas, narrow enough to be read on a phone.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rpsa.artifacts import atomic_write
from rpsa.recipe.methods import OTHER_MARKER, PLAIN, VARIANTS, Marker
from rpsa.report.summaries import Summary
from rpsa.text import printable

BLUE, GREEN, ORANGE, GREY = "#2563ab", "#2e8540", "#d9660a", "#5f6368"
_COLOURS = {"original": BLUE, "fft": GREEN, "lora": ORANGE}
_WIDTH = 4.8


@dataclass(frozen=True)
class Style:
    """Colour tells the paradigm, shape the variant; LoRA is hollow, so that neither needs colour."""

    colour: str
    marker: Marker
    hollow: bool

    @property
    def face(self) -> str:
        return "white" if self.hollow else self.colour

    @property
    def line(self) -> str:
        return {"D": "--", "X": ":"}.get(str(self.marker), "-")

    def size(self, scale: float = 1.0) -> float:
        return scale * (13 if self.marker == "*" else 8.5 if self.marker != "D" else 7)


def literal(text: str) -> str:
    """A name as matplotlib draws it and nothing else: a dollar sign would begin a formula."""
    return printable(text).replace("$", r"\$")


def style_of(method: str) -> Style:
    paradigm, _, variant = method.partition("+")
    if paradigm == "original":
        return Style(BLUE, "o", False)
    return Style(_COLOURS.get(paradigm, GREY), _marker(variant), paradigm == "lora")


def _marker(variant: str) -> Marker:
    if not variant:
        return PLAIN.marker
    return VARIANTS[variant].marker if variant in VARIANTS else OTHER_MARKER


def new_panels(
    rows: int, columns: int, height: float, sharey: Any = False, width: float = 3.6
) -> tuple[Figure, list[list[Axes]]]:
    """Empty panels, row by row; inches of one, and more width where there is one column."""
    figure = Figure(
        figsize=(_WIDTH if columns == 1 else width * columns, 0.6 + height * rows), layout="constrained"
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


def set_title(axes: Axes, text: str) -> None:
    axes.set_title(literal(text), fontsize=10)


def mark(axes: Axes, style: Style, reasoning: float, asr: float, scale: float, alpha: float = 1.0) -> None:
    axes.plot(
        100 * reasoning,
        100 * asr,
        linestyle="none",
        clip_on=False,
        zorder=3 if alpha < 1 else 4,
        **marker_of(style, scale, alpha),
    )


def marker_of(style: Style, scale: float, alpha: float = 1.0) -> dict[str, Any]:
    return {
        "marker": style.marker,
        "markersize": style.size(scale),
        "markerfacecolor": style.face,
        "markeredgecolor": style.colour if style.hollow else "white",
        "markeredgewidth": 1.5 * scale if style.hollow else 0.7 * scale,
        "alpha": alpha,
    }


def add_legend(figure: Figure, methods: Sequence[str], lines: bool) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=style_of(method).colour,
            linestyle=("--" if method == "original" else style_of(method).line) if lines else "none",
            label=literal(method),
            **(marker_of(style_of(method), 0.9) if not (lines and method == "original") else {}),
        )
        for method in methods
    ]
    rows = -(-len(handles) // (3 if figure.get_figwidth() < 6 else 4))
    columns = -(-len(handles) // rows)
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, rows - 3))  # not at the panels' cost
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def write_figure(figure: Figure, folder: Path, name: str) -> bytes:
    """Write `name.png` and `name.svg` into `folder`; returns the SVG."""
    svg = to_svg(figure)
    atomic_write(folder / f"{name}.png", to_png(figure))
    atomic_write(folder / f"{name}.svg", svg)
    return svg


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


def methods_of(summaries: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(summary.method for summary in summaries))


def safety_sets(summaries: Sequence[Summary]) -> list[str | None]:
    return list(dict.fromkeys(s.safety for s in summaries if not s.is_original)) or [None]


def has_grid(summaries: Sequence[Summary]) -> bool:
    """Whether some method ran at several learning rates."""
    rates: dict[str, set[float]] = {}
    for summary in summaries:
        if summary.lr is not None:
            rates.setdefault(summary.method, set()).add(summary.lr)
    return any(len(found) > 1 for found in rates.values())
