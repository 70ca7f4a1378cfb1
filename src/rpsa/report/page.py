"""`index.html`: the whole report in one file that needs no network.

The STR of a single run: how sure one may be of it, over the problems that were asked.

An 8B model is aligned once for each method, so that there are no runs to take an interval over. The stored samples
still say what other problems of the same kinds would have given; another training seed they know nothing of.

The part of the page where responses can be read side by side: three selects and a few lines of script.

Responses come from models and may hold anything. They reach the page as JSON in a script element that they cannot
end, and are only ever set as text.
"""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpsa.errors import RPSAError
from rpsa.evaluation.scores import read_samples
from rpsa.evaluation.statistics import Problems, safety_tax_difference, safety_tax_interval
from rpsa.report.benchmarks import benchmark_table, rates_table, unreliable_note
from rpsa.report.summaries import RunResult, Summary, no_comparison, plain_method
from rpsa.report.tables import Shown, Table, interval_note, main_table, missing_lines
from rpsa.report.warnings import audit_line, warnings
from rpsa.templates import render

REPLICATES = 2_000

Scores = dict[tuple[str, str], dict[str, list[float]]]
"""By kind and set: the scores of each item's samples."""


def with_problem_intervals(summaries: Sequence[Summary]) -> list[Summary]:
    """The summaries; those of one run get their intervals from the samples of that run and of the untouched model.

    No interval, but a reason, where the safety gain may be chance, where no score of a problem changed (of which a
    bootstrap would make an interval of no width), and where a set has one problem.
    """
    single = [s for s in summaries if not s.is_original and len(s.runs) == 1]
    bases = {s.runs[0].base for s in single}
    originals = {run.base: run for s in summaries if s.is_original for run in s.runs if run.base in bases}
    runs = [*originals.values(), *(s.runs[0] for s in single)]
    scores: dict[Path | None, Scores] = {run.samples: _scores(run.samples) for run in runs if run.samples}

    def with_intervals(summary: Summary) -> Summary:
        if summary.is_original or len(summary.runs) > 1 or summary.runs[0].base not in originals:
            return summary
        run, plain = summary.runs[0], plain_method(summary, summaries)
        original = originals[run.base]
        if no_comparison(original, run):
            return summary
        before, after = scores.get(original.samples), scores.get(run.samples)
        if before is None or after is None:
            return summary
        is_beside = plain and plain.runs[0].base == run.base and not no_comparison(original, plain.runs[0])
        beside = scores.get(plain.runs[0].samples) if plain and is_beside else None
        try:
            interval, reason = _interval(before, after)
            difference = _difference(before, beside, after) if beside else None
        except RPSAError as error:
            return replace(summary, no_interval=str(error))
        return replace(
            summary,
            tax_interval=interval,
            no_interval=reason,
            difference=difference,
            interval_over="problems",
        )

    return [with_intervals(summary) for summary in summaries]


def _scores(path: Path) -> Scores:
    found: Scores = defaultdict(lambda: defaultdict(list))
    for sample in read_samples(path):
        if sample.score is not None:
            found[sample.kind, sample.set][sample.item].append(sample.score)
    return found


def _interval(before: Scores, after: Scores) -> tuple[tuple[float, float] | None, str | None]:
    reasoning, attack = _matched("reasoning", before, after), _matched("attack", before, after)
    if reasoning[0] == reasoning[1]:
        return None, "not one reasoning problem got another score"
    found = safety_tax_interval(
        reasoning_before=reasoning[0],
        reasoning_after=reasoning[1],
        attack_before=attack[0],
        attack_after=attack[1],
        replicates=REPLICATES,
    )
    return found.interval, found.reason


def _difference(before: Scores, plain: Scores, other: Scores) -> tuple[float, float] | None:
    reasoning, attack = _matched("reasoning", before, plain, other), _matched("attack", before, plain, other)
    return safety_tax_difference(
        reasoning_before=reasoning[0],
        reasoning_plain=reasoning[1],
        reasoning_other=reasoning[2],
        attack_before=attack[0],
        attack_plain=attack[1],
        attack_other=attack[2],
        replicates=REPLICATES,
    ).interval


def _matched(kind: str, *models: Scores) -> list[dict[str, Problems]]:
    """For each model its benchmarks, with the items that all models have a score for, in one order."""
    common = {
        key: [item for item in items if all(item in model.get(key, {}) for model in models)]
        for key, items in models[0].items()
        if key[0] == kind
    }
    return [
        {key[1]: [model[key][item] for item in items] for key, items in common.items()} for model in models
    ]


_LONG = 20  # rows
_MANY = 8  # lines of provenance


def render_page(
    summaries: Sequence[Summary],
    results: Sequence[RunResult],
    figures: Sequence[Shown],
    provenance: Mapping[str, Any],
    responses: str | None = None,
    claims: Table | None = None,
    missing: Mapping[str, str] | None = None,
) -> str:
    """The report as HTML (`templates/page.html.jinja`).

    `responses` is what `chosen_responses` chose, `claims` the verdicts, `missing` the runs without a result.
    """
    return render(
        "rpsa.report",
        "page.html",
        title=str(provenance.get("name", "rpsa")),
        main=main_table(summaries),
        interval_note=interval_note(summaries),
        unreliable_note=unreliable_note(summaries),
        warnings=[*missing_lines(missing), *warnings(summaries)],
        audit=audit_line(results),
        claims=claims,
        figures=[_figure(one) for one in figures],
        benchmarks=benchmark_table(summaries),
        shares=rates_table(summaries),
        responses=responses,
        provenance={str(key): _fact(value) for key, value in provenance.items()},
        long=_LONG,
        many=_MANY,
    )


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    source: str
    is_broad: bool


@dataclass(frozen=True)
class _Fact:
    """Something of a study's provenance: lines, or where it is nested, JSON."""

    lines: Sequence[str] = ()
    json: str = ""


def _figure(of: Shown) -> _Figure:
    source = f"data:image/svg+xml;base64,{base64.b64encode(of.svg).decode()}"
    width = re.search(rb'width="([\d.]+)pt"', of.svg)
    return _Figure(of.title, of.caption, source, bool(width and float(width[1]) > 400))


def _fact(value: Any) -> _Fact:
    if isinstance(value, Mapping):
        if any(isinstance(item, Mapping | list | tuple) for item in value.values()):
            return _Fact(json=json.dumps(value, indent=2))
        return _Fact([f"{key}: {item}" for key, item in value.items()])
    if isinstance(value, list | tuple):
        return _Fact([", ".join(str(item) for item in value)])
    return _Fact([value if isinstance(value, str) else json.dumps(value)])
