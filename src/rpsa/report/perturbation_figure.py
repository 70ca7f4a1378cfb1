"""Fig. 3 of the paper: accuracy of the untouched model and of each perturbation, by benchmark."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rpsa.analysis.perturbation import ORIGINAL
from rpsa.analysis.perturbation_summary import Effect
from rpsa.report.drawing import BLUE, GREEN, GREY, ORANGE, literal

_COLOURS = {
    ORIGINAL: GREY,
    "fisher": ORANGE,
    "random": BLUE,
    "random_per_tensor": "#7fb2e5",
    "random_nonzero": "#1b1f24",
    "magnitude": GREEN,
    "inverse": "#b5459a",
}
_NAMES = {
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
            label=_NAMES[effect.selection],
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
