"""Table 1 of the paper, with over-refusal beside it: as Markdown, and on the console."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpsa.evaluation.items import Kind
from rpsa.report.results import Summary
from rpsa.report.warnings import audit_line, warnings
from rpsa.text import markdown_text, printable

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


_MINOR = frozenset({"LR", "Runs", "Refused reasoning ↓", "95% interval"})

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


def render_console(
    summaries: Sequence[Summary], console: Any = None, missing: Mapping[str, str] | None = None
) -> None:
    """Print the table, what it lacks, and the warnings to a rich console (default: stdout)."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    table = main_table(summaries)
    columns = [i for i, name in enumerate(table.header) if name == "95% interval" or name not in table.minor]
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for index in columns:
        name = (
            printable(table.header[index])
            .replace("Refused ", "Refused\n")
            .replace(" ↑", "\n↑")
            .replace(" ↓", "\n↓")
        )
        shown.add_column(Text(name), justify="left" if index == 0 else "right", no_wrap=True)
    for row in table.rows:
        cells = [row[index] for index in columns]
        shown.add_row(*(Text(printable(cell.text), style="bold" if cell.best else "") for cell in cells))
    console.print(shown)
    if line := audit_line([run for summary in summaries for run in summary.runs]):
        console.print(f"\nAudit: {line}.", highlight=False, markup=False)
    for line in (*missing_lines(missing), *warnings(summaries)):
        console.print(f"• {printable(line)}", highlight=False, markup=False)


def group_of(summary: Summary) -> tuple[object, ...]:
    return summary.paradigm, summary.lr, summary.safety


def label(summary: Summary, summaries: Sequence[Summary]) -> str:
    """The method, with learning rate and safety set where it alone does not tell one summary from another."""
    if sum(s.method == summary.method for s in summaries) == 1:
        return summary.method
    return f"{summary.method} {summary.lr:g} {summary.safety or ''}".rstrip()


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
