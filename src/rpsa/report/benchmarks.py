"""Each benchmark by itself: its figure with its 95% interval, and the rates that qualify it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rpsa.evaluation.benchmarks import Kind
from rpsa.evaluation.statistics import mean_interval
from rpsa.report.summaries import RunResult, Summary
from rpsa.report.tables import (
    UNRELIABLE,
    Entry,
    Table,
    interval_note,
    label,
    main_table,
    markdown,
    marked,
    missing_lines,
    percent,
)
from rpsa.text import markdown_text

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


def table_markdown(summaries: Sequence[Summary], missing: Mapping[str, str] | None = None) -> str:
    """The content of `table.md`: the main table with what it lacks, and each benchmark."""
    lacking = "".join(f"- {markdown_text(line)}\n" for line in missing_lines(missing))
    return (
        markdown(main_table(summaries))
        + (f"\n{lacking}" if lacking else "")
        + "\nRates in percent, means over bases and seeds; reasoning problems that were refused are counted as wrong. "
        f"STR: mean drop in reasoning over mean drop in ASR, lower is better. {interval_note(summaries)} Bold: best of "
        f"its group.{unreliable_note(summaries)}\n\n" + markdown(benchmark_table(summaries))
    )


def unreliable_note(summaries: Sequence[Summary]) -> str:
    """What the mark beside a rate means, where there is one."""
    marked = any(s.unreliable(kind) for s in summaries for kind in _MARKS)
    return f" {UNRELIABLE}: most of the responses have no answer that can be read." if marked else ""


def _columns(summaries: Sequence[Summary]) -> list[tuple[Kind, str]]:
    first = summaries[0].runs[0]
    kinds: dict[Kind, Any] = {
        "reasoning": first.reasoning,
        "attack": first.asr,
        "over_refusal": first.over_refusal,
    }
    return [(kind, name) for kind, rates in kinds.items() for name in rates if name != "mean"]


def _figure(runs: Sequence[RunResult], kind: Kind, name: str) -> Entry:
    values = [_rates(run, kind)[name] for run in runs]
    interval: tuple[float, float] | None = mean_interval(values)
    if len(runs) == 1 and (found := runs[0].sets.get(kind, {}).get(name)):
        interval = found.interval
    note = ""
    if interval is not None:
        low, high = (min(1.0, max(0.0, end)) for end in interval)
        note = f"{percent(low)} to {percent(high)}"
    unreliable = next((reason for run in runs if (reason := run.unreliable(kind, name))), None)
    return Entry(marked(percent(sum(values) / len(values)), unreliable), note=note)


def _rates(run: RunResult, kind: str) -> dict[str, float]:
    return dict({"reasoning": run.reasoning, "attack": run.asr, "over_refusal": run.over_refusal}[kind])
