"""Tables of a report: Table 1 of the paper with over-refusal beside it, each benchmark by itself, and for LaTeX.

`main_table` and the benchmarks' are shown by the page, in Markdown (`table.md`) and on the console; `table.tex` is a
table for a manuscript.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rpsa.evaluation.benchmarks import BENCHMARKS, Kind
from rpsa.evaluation.original import LossName
from rpsa.evaluation.statistics import mean_interval
from rpsa.recipe.methods import VARIANTS
from rpsa.report.prediction import Prediction
from rpsa.report.summaries import LOSSES, RunResult, Summary, summarise
from rpsa.templates import render
from rpsa.text import markdown_text

NONE = "–"
UNRELIABLE = "(!)"
"""Beside a rate that does not stand alone: most of the responses behind it have no answer that can be read."""


@dataclass(frozen=True)
class Entry:
    """One cell of a table; `best` of its group is shown bold, `note` small below the figure."""

    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Entry]]
    minor: frozenset[str] = frozenset()  # columns that a narrow page leaves out


@dataclass(frozen=True)
class Noted:
    """A table with its title, and what it says."""

    title: str
    table: Table
    note: str


_MINOR = frozenset({"LR", "Runs", "Refused reasoning ↓", "95% interval"})

PERPLEXITY_NOTE = (
    "Perplexity: of the responses under the model before training. A low one: they are not foreign to it."
)

Reader = Callable[[Summary], float | None]


@dataclass(frozen=True)
class _Rated:
    """A column that has a better side: how to read it, the sign that makes larger better, and the sets behind it."""

    read: Reader
    sign: int
    kind: Kind
    name: str = "mean"

    def entry(self, summary: Summary, group: Sequence[Summary]) -> Entry:
        """What does not stand alone is marked, and is never the best."""

        def reliable(one: Summary) -> float | None:
            return None if one.unreliable(self.kind, self.name) else self.read(one)

        best = is_best(reliable(summary), [reliable(one) for one in group], self.sign)
        return Entry(marked(percent(self.read(summary)), summary.unreliable(self.kind, self.name)), best)


def _rated(summaries: Sequence[Summary]) -> dict[str, _Rated]:
    columns = {
        "Reasoning ↑": _Rated(lambda s: s.reasoning["mean"], 1, "reasoning"),
        "Refused reasoning ↓": _Rated(lambda s: s.refused, -1, "reasoning"),
        "ASR ↓": _Rated(lambda s: s.asr["mean"], -1, "attack"),
    }
    for name in summaries[0].over_refusal:
        columns[f"Refused {name} ↓"] = _Rated(
            lambda s, name=name: s.over_refusal[name],  # type: ignore[misc]
            -1,
            "over_refusal",
            name,
        )
    return columns


def main_table(summaries: Sequence[Summary]) -> Table:
    """A row for each summary: rates in percent, STR with its 95% interval, the best of each group marked."""
    rated = _rated(summaries)
    several_sets = len({s.safety for s in summaries if s.safety}) > 1
    header = [
        "Method",
        "LR",
        *(["Safety data"] if several_sets else []),
        "Runs",
        *rated,
        "STR ↓",
        "95% interval",
    ]
    rows = []
    for summary in summaries:
        group = [s for s in summaries if group_of(s) == group_of(summary)]
        row = [Entry(summary.method), Entry(NONE if summary.lr is None else f"{summary.lr:g}")]
        row += [Entry(summary.safety or NONE)] if several_sets else []
        row.append(Entry(str(len(summary.runs))))
        row += [column.entry(summary, group) for column in rated.values()]
        row.append(Entry(_tax(summary), is_best(summary.tax, [s.tax for s in group], -1)))
        row.append(
            Entry(f"{interval[0]:.2f} to {interval[1]:.2f}" if (interval := summary.tax_interval) else NONE)
        )
        rows.append(row)
    on_a_grid = len({s.lr for s in summaries}) > 3
    return Table(header, rows, _MINOR - ({"LR"} if on_a_grid else set()))


def safety_data_table(results: Sequence[RunResult]) -> Table | None:
    """What was trained on, means over runs: how much, how much of it refuses, how foreign it was; None if not known.

    A row for each safety data set and base.
    """
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for run in results:
        if run.safety is not None and run.perplexity is not None:
            groups.setdefault((run.safety, run.base), []).append(run)
    if not groups:
        return None
    rows = [
        [
            Entry(safety),
            Entry(base),
            Entry(_mean_of([run.examples for run in runs], ",.0f")),
            Entry(percent(_known_mean([run.refusing for run in runs]))),
            Entry(_mean_of([run.perplexity for run in runs], ".3f")),
        ]
        for (safety, base), runs in groups.items()
    ]
    return Table(["Safety data", "Base", "Examples", "Refusing", "Perplexity"], rows)


def _mean_of(values: Sequence[float | None], form: str) -> str:
    mean = _known_mean(values)
    return NONE if mean is None else format(mean, form)


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def missing_lines(missing: Mapping[str, str] | None) -> list[str]:
    """A line for each run that a study lacks."""
    return [f"Without a result: {name}: {why}" for name, why in (missing or {}).items()]


def markdown(table: Table) -> str:
    header = map(markdown_text, table.header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(table.header) - 1)]
    for row in table.rows:
        lines.append("| " + " | ".join(map(_markdown, row)) + " |")
    return "\n".join(lines) + "\n"


def _markdown(entry: Entry) -> str:
    text = markdown_text(entry.text)
    text = f"**{text}**" if entry.best else text
    return f"{text} ({markdown_text(entry.note)})" if entry.note else text


def interval_note(summaries: Sequence[Summary]) -> str:
    """What the intervals of the STR are over."""
    over = {s.interval_over for s in summaries if s.tax_interval}
    if over == {"problems"}:
        return "The interval of the STR is over problems, not over runs: what other problems of the kind would give."
    if over == {"problems", "runs"}:
        return "The interval of the STR is over runs, or where a method has one run over problems."
    return "The interval of the STR is over runs."


def group_of(summary: Summary) -> tuple[object, ...]:
    return summary.paradigm, summary.lr, summary.safety


def label(summary: Summary, summaries: Sequence[Summary]) -> str:
    """The method, with learning rate and safety set where it alone does not tell one summary from another."""
    if sum(s.method == summary.method for s in summaries) == 1:
        return summary.method
    return " ".join((summary.method, *setting_of(summary)))


def setting_of(summary: Summary) -> list[str]:
    """Learning rate and safety set, as far as there are any."""
    rate = None if summary.lr is None else f"{summary.lr:g}"
    return [part for part in (rate, summary.safety) if part]


def is_best(value: float | None, of: Sequence[float | None], sign: int) -> bool:
    known = [v for v in of if v is not None]
    return (
        value is not None
        and len(of) > 1
        and len(set(known)) > 1
        and sign * value == max(sign * v for v in known)
    )


def marked(text: str, unreliable: str | None) -> str:
    return f"{text} {UNRELIABLE}" if unreliable else text


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _tax(summary: Summary) -> str:
    if summary.tax is None:
        return NONE if summary.is_original else "undefined"
    return f"{summary.tax:.2f}"


_MARKS: dict[Kind, str] = {"reasoning": "{} ↑", "attack": "ASR {} ↓", "over_refusal": "Refused {} ↓"}
_HEADINGS = {
    "refused": "Refused",
    "partial": "Partly refused",
    "unparsed": "No answer found",
    "empty": "Empty",
    "truncated": "Thought unfinished",
    "length": "Out of tokens",
    "unjudged": "Not judged",
}


def benchmark_table(summaries: Sequence[Summary]) -> Table:
    """Accuracy on each reasoning set, attack success and over-refusal on each of theirs, in percent.

    The interval of one run is that of its evaluation, over problems; of three runs or more it is over runs.
    """
    columns = _columns(summaries)
    rows = [
        [Entry(label(s, summaries)), *(_figure(s.runs, kind, name) for kind, name in columns)]
        for s in summaries
    ]
    return Table(["Method", *(_MARKS[kind].format(name) for kind, name in columns)], rows)


_LOSS_HEADINGS = {"nll": "Reasoning loss, NLL ↓", "kl": "KL ↓"}
LOSS_NOTE = (
    "In nats per response token, on held-out responses of the untouched model: their negative log-likelihood, and the "
    "divergence KL(untouched || model). With the 95% interval: over responses for one run, over runs for three or more."
)


def loss_table(summaries: Sequence[Summary]) -> Table | None:
    """The reasoning loss of each summary that has one; None where none has."""
    rows = [
        [Entry(label(s, summaries)), *(_loss(s, name) for name in LOSSES)] for s in summaries if s.loss("nll")
    ]
    return Table(["Method", *(_LOSS_HEADINGS[name] for name in LOSSES)], rows) if rows else None


def _loss(summary: Summary, name: LossName) -> Entry:
    found = summary.loss(name)
    if found is None:
        return Entry(NONE)
    mean, interval = found
    low, high = interval or (None, None)
    note = "" if low is None or high is None else f"{nats(max(low, 0.0))} to {nats(high)}"
    return Entry(nats(mean), note=note)


def nats(value: float) -> str:
    """Three digits; float32 logits say nothing of what is below a millionth."""
    return f"{value:.3g}" if value == 0 or value >= 1e-6 else "<1e-06"


def rates_table(summaries: Sequence[Summary]) -> Table:
    """For each method and set, mean shares of responses in percent; only rates that something has."""
    shares = {
        (index, kind, name): {
            rate: sum(run.sets[kind][name].rates[rate] for run in summary.runs) / len(summary.runs)
            for rate in _HEADINGS
            if rate in found.rates
        }
        for index, summary in enumerate(summaries)
        for kind in _MARKS
        for name, found in summary.runs[0].sets.get(kind, {}).items()
    }
    rates = [rate for rate in _HEADINGS if any(rate in found for found in shares.values())]
    rows = [
        [
            Entry(label(summaries[index], summaries)),
            Entry(name),
            *(Entry(percent(found.get(rate))) for rate in rates),
        ]
        for (index, _, name), found in shares.items()
    ]
    return Table(["Method", "Set", *(_HEADINGS[rate] for rate in rates)], rows)


def table_markdown(
    summaries: Sequence[Summary],
    missing: Mapping[str, str] | None = None,
    prediction: Prediction | None = None,
    more: Sequence[Noted] = (),
) -> str:
    """The content of `table.md`: the main table with what it lacks, each benchmark, more, and the reasoning loss."""
    lacking = "".join(f"- {markdown_text(line)}\n" for line in missing_lines(missing))
    return (
        markdown(main_table(summaries))
        + (f"\n{lacking}" if lacking else "")
        + "\nRates in percent, means over bases and seeds; reasoning problems that were refused are counted as wrong. "
        f"STR: mean drop in reasoning over mean drop in ASR, lower is better. {interval_note(summaries)} Bold: best of "
        f"its group.{unreliable_note(summaries)}\n\n"
        + markdown(benchmark_table(summaries))
        + "".join(f"\n{markdown(one.table)}\n{one.title}. {one.note}\n" for one in more)
        + (f"\n{markdown(losses)}\n{LOSS_NOTE}\n" if (losses := loss_table(summaries)) else "")
        + (f"\n{prediction.sentence}\n" if prediction else "")
    )


def unreliable_note(summaries: Sequence[Summary]) -> str:
    """What the mark beside a rate means, where there is one."""
    marked = any(s.unreliable(kind) for s in summaries for kind in _MARKS)
    return f" {UNRELIABLE}: most of the responses have no answer that can be read." if marked else ""


def _columns(summaries: Sequence[Summary]) -> list[tuple[Kind, str]]:
    return [(kind, name) for kind in _MARKS for name in summaries[0].runs[0].rates(kind) if name != "mean"]


def _figure(runs: Sequence[RunResult], kind: Kind, name: str) -> Entry:
    values = [run.rates(kind)[name] for run in runs]
    interval: tuple[float, float] | None = mean_interval(values)
    if len(runs) == 1 and (found := runs[0].sets.get(kind, {}).get(name)):
        interval = found.interval
    note = ""
    if interval is not None:
        low, high = (min(1.0, max(0.0, end)) for end in interval)
        note = f"{percent(low)} to {percent(high)}"
    unreliable = next((reason for run in runs if (reason := run.unreliable(kind, name))), None)
    return Entry(marked(percent(sum(values) / len(values)), unreliable), note=note)


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
