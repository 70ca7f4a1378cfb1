r"""`table.tex`: Table 1 of the paper for a manuscript, with over-refusal beside it; needs \usepackage{booktabs}."""

from collections.abc import Callable, Sequence

from rpsa.evaluation.benchmarks import BENCHMARKS, Kind
from rpsa.report.results import RunResult, Summary, summarise
from rpsa.report.tables import group_of, is_best
from rpsa.text import printable

_METHODS = {"original": "Original", "fft": "FFT", "lora": "LoRA", "rpsa": "RPSA"}
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{
        character: f"{{{character}}}" for character in "[]"
    },  # an optional argument, at the beginning of a row
}

Reader = Callable[[Summary], float | None]


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
    kinds: list[tuple[str, str, Kind, int]] = [
        (r"Reasoning $\uparrow$", "reasoning", "reasoning", 1),
        (r"Harmfulness $\downarrow$", "asr", "attack", -1),
        (r"Over-refusal $\downarrow$", "over_refusal", "over_refusal", -1),
    ]
    columns = [
        (title, name, _reader(rates, name), sign, kind)
        for title, rates, kind, sign in kinds
        for name in getattr(first, rates)
        if name != "mean"
    ]
    lines = [
        f"\\begin{{tabular}}{{ll{'r' * (len(columns) + 1)}}}",
        r"\toprule",
        *_head(columns),
    ]
    for base, summaries in blocks.items():
        lines.append(r"\midrule")
        for index, summary in enumerate(summaries):
            cells = [escaped(base) if index == 0 else "", _method(summary, summaries)]
            for _, name, read, sign, kind in columns:
                cell = _cell(read, summary, summaries, sign, ".1f", 100)
                cells.append(f"{cell}$^!$" if summary.unreliable(kind, name) else cell)
            tax = "N/A" if summary.is_original else _cell(lambda s: s.tax, summary, summaries, -1, ".2f", 1)
            lines.append(_row([*cells, tax]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escaped(text: str) -> str:
    """Text that TeX sets as it is, on one line."""
    return "".join(_SPECIAL.get(character, character) for character in printable(text))


def _head(columns: Sequence[tuple[str, str, Reader, int, Kind]]) -> list[str]:
    titles = list(dict.fromkeys(title for title, *_ in columns))
    spans, rules, start = [], [], 3
    for title in titles:
        width = sum(column[0] == title for column in columns)
        spans.append(f"\\multicolumn{{{width}}}{{c}}{{{title}}}")
        rules.append(f"\\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    names = [
        escaped(BENCHMARKS[name].printed if name in BENCHMARKS else name.removeprefix("rpsa_"))
        for _, name, *_ in columns
    ]
    return [
        _row(["Model", "Method", *spans, r"STR $\downarrow$"]),
        "".join(rules),
        _row(["", "", *names, ""]),
    ]


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _reader(rates: str, name: str) -> Reader:
    return lambda summary: getattr(summary, rates)[name]


def _method(summary: Summary, summaries: Sequence[Summary]) -> str:
    parts = [_METHODS.get(part, escaped(part)) for part in summary.method.split("+")]
    name = " +".join(parts)
    if sum(s.method == summary.method for s in summaries) > 1:
        name += escaped(f", {summary.lr:g}, {summary.safety}")
    return name


def _cell(
    read: Reader, summary: Summary, summaries: Sequence[Summary], sign: int, form: str, scale: int
) -> str:
    value = read(summary)
    if value is None:
        return "--"
    text = f"{scale * value:{form}}".replace("-", "$-$")
    group = [read(s) for s in summaries if group_of(s) == group_of(summary)]
    return f"\\textbf{{{text}}}" if is_best(value, group, sign) else text
