"""The sweeps of a recipe as figures (Fig. 5 and 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from rpsa.report.results import RunResult, Summary, summarise
from rpsa.report.sweep_figure import SweepPoint, sweep_figure

# What a list of modules is called in the paper.
_MODULES = {
    frozenset({"gate_proj", "up_proj", "down_proj"}): "MLP",
    frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}): "Attention",
    frozenset({"gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}): "both",
}


def sweep_figures(results: Sequence[RunResult]) -> dict[str, Figure]:
    """A figure for each sweep by its name: the first setting along the axis, the others as columns."""
    names = list(dict.fromkeys(result.sweep for result in results if result.sweep is not None))
    return {name: _figure([r for r in results if r.sweep == name], results) for name in names}


def _figure(swept: Sequence[RunResult], results: Sequence[RunResult]) -> Figure:
    keys = max((list(result.point) for result in swept), key=len)
    points = list(dict.fromkeys(tuple(shown(r.point.get(key)) for key in keys) for r in swept))
    marks = [
        point_of(summary, values[0], ", ".join(values[1:]))
        for values in points
        for summary in _summaries(swept, results, dict(zip(keys, values, strict=True)))
    ]
    return sweep_figure(keys[0], marks)


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
