r"""`table.tex`: Table 1 of the paper for a manuscript, with over-refusal beside it; needs \usepackage{booktabs}.

The table itself is `templates/table.tex.jinja`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpsa.evaluation.benchmarks import BENCHMARKS, Kind
from rpsa.recipe.methods import VARIANTS
from rpsa.report.summaries import RunResult, Summary, summarise
from rpsa.report.tables import group_of, is_best, setting_of
from rpsa.templates import render

_METHODS = {"original": "Original", "fft": "FFT", "lora": "LoRA"}
_TITLES: dict[Kind, str] = {
    "reasoning": r"Reasoning $\uparrow$",
    "attack": r"Harmfulness $\downarrow$",
    "over_refusal": r"Over-refusal $\downarrow$",
}


@dataclass(frozen=True)
class _Column:
    kind: Kind
    name: str

    def read(self, summary: Summary) -> float:
        return 100 * summary.rates(self.kind)[self.name]


@dataclass(frozen=True)
class _Number:
    text: str
    best: bool
    unreliable: bool = False


@dataclass(frozen=True)
class _Row:
    method: Sequence[str]
    setting: str
    rates: Sequence[_Number]
    tax: _Number


def latex_table(results: Sequence[RunResult]) -> str:
    """A block for each base model, means over its seeds; bold: the best of a method and what is built on it.

    Rates in percent, with one digit; STR with two. An STR that is undefined is a dash. An exclamation mark:
    most of the responses have no answer that can be read.
    """
    by_base = {
        base: summarise([r for r in results if r.base == base])
        for base in dict.fromkeys(r.base for r in results)
    }
    blocks = {base: summaries for base, summaries in by_base.items() if summaries}
    first = next(iter(blocks.values()))[0]
    columns = [_Column(kind, name) for kind in _TITLES for name in first.rates(kind) if name != "mean"]
    return render(
        "rpsa.report",
        "table.tex",
        groups=[(_TITLES[kind], width) for kind, width in Counter(of.kind for of in columns).items()],
        columns=[_heading(of.name) for of in columns],
        blocks={base: [_row(s, summaries, columns) for s in summaries] for base, summaries in blocks.items()},
    )


def _row(summary: Summary, summaries: Sequence[Summary], columns: Sequence[_Column]) -> _Row:
    group = [s for s in summaries if group_of(s) == group_of(summary)]

    def figure(
        read: Callable[[Summary], float | None], sign: int, form: str, unreliable: object = None
    ) -> _Number:
        value = read(summary)
        if value is None:
            return _Number("--", best=False)
        text = format(value, form).replace("-", "$-$")
        return _Number(text, is_best(value, [read(s) for s in group], sign), bool(unreliable))

    several = sum(s.method == summary.method for s in summaries) > 1
    return _Row(
        method=[_name(part) for part in summary.method.split("+")],
        setting="".join(f", {part}" for part in setting_of(summary)) if several else "",
        rates=[
            figure(of.read, 1 if of.kind == "reasoning" else -1, ".1f", summary.unreliable(of.kind, of.name))
            for of in columns
        ],
        tax=_Number("N/A", best=False) if summary.is_original else figure(lambda s: s.tax, -1, ".2f"),
    )


def _heading(name: str) -> str:
    return BENCHMARKS[name].printed if name in BENCHMARKS else name.removeprefix("rpsa_")


def _name(part: str) -> str:
    """Of a paradigm or of a method that recipes know by name."""
    variant = VARIANTS.get(part)
    return (variant and variant.latex) or _METHODS.get(part, part)
