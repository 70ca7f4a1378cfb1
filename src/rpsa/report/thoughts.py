"""Thoughts and answers: how often each is unsafe, the STR by either verdict, and how many responses are broken.

A figure of several sets is their mean, in which each counts alike. Its interval is over runs for three or more; that of
one run is made from the sets' own (`rpsa.evaluation.statistics.mean_of_rates`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rpsa.evaluation.benchmarks import Kind
from rpsa.evaluation.broken import BROKEN, Broken
from rpsa.evaluation.quadrants import QUADRANTS, VERDICTS, Quadrant, Share, Thoughts, Verdict
from rpsa.evaluation.statistics import mean_interval, mean_of_rates
from rpsa.report.summaries import RunResult, Summary, by_verdict, summarise, with_problem_intervals
from rpsa.report.tables import NONE, Entry, Noted, Table, label, percent

Bounded = tuple[float, tuple[float, float] | None]
"""A mean, and its 95% interval where there is one."""

QUADRANT_HEADINGS: Mapping[Quadrant, str] = {
    "both_safe": "Both safe",
    "thought_unsafe": "Thought alone unsafe",
    "answer_unsafe": "Answer alone unsafe",
    "both_unsafe": "Both unsafe",
}
STR_BY = "STR by "
"""How the headings of columns with the STR by a verdict begin."""
_KINDS: Mapping[Kind, str] = {"reasoning": "Reasoning", "attack": "Attacks", "over_refusal": "Benign"}
NOTE = (
    "Of the responses to attacks, in percent, means over sets: how many have an unsafe answer or thought, and the four "
    "pairs of verdicts, with 95% intervals. STR by another verdict: the drop in reasoning per drop in that attack "
    "success rate."
)
BROKEN_NOTE = (
    "Responses that loop, have no end, are empty or make no sense, in percent, means over sets, with the 95% interval; "
    "and of all sets the share of each. A broken model is not a safe one."
)


@dataclass(frozen=True)
class Apart:
    """One summary's thoughts and answers.

    `shares` and `asr` are rates in [0, 1]; `tax` is the STR by each verdict with its interval, where there is one.
    `without`: responses, of `responses`, that lack a verdict.
    """

    summary: Summary
    responses: int
    without: int
    shares: Mapping[Quadrant, Bounded]
    asr: Mapping[Verdict, Bounded]
    tax: Mapping[Verdict, Bounded] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.summary.method,
            "lr": self.summary.lr,
            "safety": self.summary.safety,
            "responses": self.responses,
            "without_both_verdicts": self.without,
            "quadrants": {name: _json(found) for name, found in self.shares.items()},
            "asr": {name: _json(found) for name, found in self.asr.items()},
            "str": {name: _json(found) for name, found in self.tax.items()},
        }


def thoughts_apart(summaries: Sequence[Summary]) -> list[Apart]:
    """Of each summary of whose runs all attacks have responses with both verdicts."""
    taxes: dict[Verdict, dict[tuple[object, ...], Bounded]] = {}
    runs = [run for summary in summaries for run in summary.runs]
    for verdict in VERDICTS:
        found = with_problem_intervals(summarise(by_verdict(runs, verdict)))
        taxes[verdict] = {_key(s): (s.tax, s.tax_interval) for s in found if s.tax is not None}
    return [
        _apart(summary, {name: tax[_key(summary)] for name, tax in taxes.items() if _key(summary) in tax})
        for summary in summaries
        if all(run.thoughts for run in summary.runs)
    ]


def _key(summary: Summary) -> tuple[object, ...]:
    return summary.method, summary.lr, summary.safety


def _apart(summary: Summary, tax: Mapping[Verdict, Bounded]) -> Apart:
    sets = [list(run.thoughts.values()) for run in summary.runs if run.thoughts]

    def mean(read: Any) -> Bounded:
        return mean_of_sets([[read(found) for found in of_run] for of_run in sets])

    every: list[Thoughts] = [found for of_run in sets for found in of_run]
    return Apart(
        summary,
        sum(found.responses + found.without for found in every),
        sum(found.without for found in every),
        {name: mean(lambda of, name=name: of.shares[name]) for name in QUADRANTS},
        {name: mean(lambda of, name=name: of.asr[name]) for name in VERDICTS},
        tax,
    )


def mean_of_sets(runs: Sequence[Sequence[Share]]) -> Bounded:
    """The mean over runs of the mean over sets: runs[run][set]; of two runs there is no interval."""
    means = [math.fsum(share.rate for share in sets) / len(sets) for sets in runs]
    mean = math.fsum(means) / len(means)
    if len(runs) > 1:
        interval = mean_interval(means)
        return mean, interval and (max(0.0, interval[0]), min(1.0, interval[1]))
    [sets] = runs
    return mean_of_rates([(share.rate, share.interval) for share in sets])


def thoughts_table(found: Sequence[Apart]) -> Table | None:
    """A row for each summary; None where nothing is known of thoughts."""
    if not found:
        return None
    summaries = [one.summary for one in found]
    verdicts = [name for name in VERDICTS if any(name in one.tax for one in found)]
    header = [
        *("Method", "ASR, answers ↓", "ASR, thoughts ↓", *QUADRANT_HEADINGS.values()),
        *(f"{STR_BY}{name}" for name in verdicts),
    ]
    rows = [
        [
            Entry(label(one.summary, summaries)),
            *(_percent(one.asr[name]) for name in ("answer", "thought")),
            *(_percent(one.shares[name]) for name in QUADRANT_HEADINGS),
            *(_tax(one.tax.get(name)) for name in verdicts),
        ]
        for one in found
    ]
    return Table(header, rows)


def noted_tables(summaries: Sequence[Summary], apart: Sequence[Apart]) -> list[Noted]:
    """Thoughts and answers, and broken responses, as far as there is something to show."""
    tables = []
    if (table := thoughts_table(apart)) is not None:
        without, responses = sum(one.without for one in apart), sum(one.responses for one in apart)
        left_out = f"{without:,} of {responses:,} responses lack a verdict and are left out."
        tables.append(Noted("Thoughts and answers", table, f"{NOTE} {left_out}"))
    if (table := broken_table(summaries)) is not None:
        tables.append(Noted("Broken responses", table, BROKEN_NOTE))
    return tables


def broken_rates(runs: Sequence[RunResult], kind: Kind | None = None) -> Bounded | None:
    """The mean share of broken responses, of one kind of set or of all; None where some set does not say."""
    found = [
        [one.broken for of, sets in run.sets.items() if kind in (None, of) for one in sets.values()]
        for run in runs
    ]
    known = [[one.share for one in of_run if one] for of_run in found]
    if any(len(a) < len(b) or not b for a, b in zip(known, found, strict=True)):
        return None
    return mean_of_sets(known)


def broken_parts(runs: Sequence[RunResult]) -> dict[Broken, float]:
    """The mean share of each class over all sets of all runs that say."""
    known = [one.broken for run in runs for sets in run.sets.values() for one in sets.values() if one.broken]
    return {name: math.fsum(one.parts[name] for one in known) / len(known) for name in BROKEN}


def broken_json(runs: Sequence[RunResult]) -> dict[str, Any] | None:
    found = broken_rates(runs)
    if found is None:
        return None
    kinds = {kind: broken_rates(runs, kind) for kind in _KINDS}
    return {
        **_json(found),
        "parts": dict(broken_parts(runs)),
        "by_kind": {kind: _json(of_kind) for kind, of_kind in kinds.items() if of_kind},
    }


def broken_table(summaries: Sequence[Summary]) -> Table | None:
    """A row for each summary of which it is known; None where no response of any is broken."""
    known = [summary for summary in summaries if broken_rates(summary.runs)]
    if not any(sum(broken_parts(summary.runs).values()) for summary in known):
        return None
    kinds = [kind for kind in _KINDS if any(broken_rates(s.runs, kind) for s in known)]
    rows = [
        [
            Entry(label(summary, known)),
            *(_percent(broken_rates(summary.runs, kind)) for kind in kinds),
            *(Entry(percent(share)) for share in broken_parts(summary.runs).values()),
        ]
        for summary in known
    ]
    return Table(["Method", *(_KINDS[kind] for kind in kinds), *(name.title() for name in BROKEN)], rows)


def _percent(found: Bounded | None) -> Entry:
    if found is None:
        return Entry(NONE)
    value, interval = found
    return Entry(percent(value), note=f"{percent(interval[0])} to {percent(interval[1])}" if interval else "")


def _tax(found: Bounded | None) -> Entry:
    if found is None:
        return Entry(NONE)
    value, interval = found
    return Entry(f"{value:.2f}", note=f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "")


def _json(found: Bounded) -> dict[str, Any]:
    return {"mean": found[0], "ci95": list(found[1]) if found[1] else None}
