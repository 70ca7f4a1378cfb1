"""The STR of a single run: how sure one may be of it, over the problems that were asked.

An 8B model is aligned once for each method, so that there are no runs to take an interval over. The stored samples
still say what other problems of the same kinds would have given; another training seed they know nothing of.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rpsa.errors import RPSAError
from rpsa.evaluation.samples import read_samples
from rpsa.evaluation.statistics import Problems, safety_tax_difference, safety_tax_interval
from rpsa.report.results import Summary, no_comparison, plain_method

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
