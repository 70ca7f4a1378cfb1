"""What the cells of a perturbation say: accuracies, drops and differences to the Fisher cell, with intervals.

Intervals are of 95%, and cover both that the problems are a sample and that the random selections are draws. Over
problems they are Wilson's for an accuracy, and Newcombe's (1998, method 10) for a difference paired by problem;
over draws Student's t. Parts are put together by squaring and adding the distances to either limit, which is also
how benchmarks are put together for their mean.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpsa.analysis.perturbation import ORIGINAL, Outcome
from rpsa.evaluation.statistics import mean_interval
from rpsa.evaluation.statistics.rates import wilson_limits

Samples = Mapping[str, Sequence[Sequence[float]]]
"""Benchmark -> draw -> problem -> score in [0, 1]."""

_Z = 1.96


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "ci95": [self.low, self.high]}


@dataclass(frozen=True)
class Effect:
    """One selection at one fraction and factor, all draws together; each by benchmark, and "mean" over them.

    Attributes:
        draws: the mean over the benchmarks for each draw.
        where, change: of the first draw; see `Outcome`.
        drop: from the untouched model, paired by problem; None for that model itself.
        above_fisher: how much better than the Fisher cell of this fraction and factor, paired by problem; None
            without one.
    """

    selection: str
    fraction: float
    factor: float
    draws: Sequence[float]
    where: Mapping[str, int]
    change: float
    accuracy: Mapping[str, Estimate]
    drop: Mapping[str, Estimate] | None
    above_fisher: Mapping[str, Estimate] | None

    def to_json(self) -> dict[str, Any]:
        def estimates(of: Mapping[str, Estimate] | None) -> Any:
            return {name: estimate.to_json() for name, estimate in of.items()} if of else None

        return {
            "selection": self.selection,
            "fraction": self.fraction,
            "factor": self.factor,
            "draws": list(self.draws),
            "elements": dict(self.where),
            "change": self.change,
            "accuracy": estimates(self.accuracy),
            "drop": estimates(self.drop),
            "above_fisher": estimates(self.above_fisher),
        }


def effects(outcomes: Sequence[Outcome]) -> list[Effect]:
    """One effect for each selection, fraction and factor, in order of appearance."""
    groups: dict[tuple[str, float, float], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.cell.selection, outcome.cell.fraction, outcome.cell.factor].append(outcome)
    samples = {key: _samples(group) for key, group in groups.items()}
    original = next(found for key, found in samples.items() if key[0] == ORIGINAL)
    results = []
    for key, group in groups.items():
        selection, fraction, factor = key
        fisher = samples.get(("fisher", fraction, factor))
        results.append(
            Effect(
                selection,
                fraction,
                factor,
                _draw_means(samples[key]),
                group[0].where,
                group[0].change,
                accuracy(samples[key]),
                difference(original, samples[key]) if selection != ORIGINAL else None,
                difference(samples[key], fisher) if fisher and selection != "fisher" else None,
            )
        )
    return results


def accuracy(samples: Samples) -> dict[str, Estimate]:
    """The mean score over problems and draws of each benchmark, and the "mean" of these means.

    Fewer than three draws say nothing about how much draws differ: the interval is then over problems alone.
    """
    over_problems = {}
    for name, draws in samples.items():
        problems = _problem_means(draws)
        value = statistics.fmean(problems)
        over_problems[name] = Estimate(value, *wilson(value, len(problems)))
    draw_means = {name: [statistics.fmean(draw) for draw in draws] for name, draws in samples.items()}
    return _with_mean(over_problems, draw_means, (0.0, 1.0))


def difference(first: Samples, second: Samples) -> dict[str, Estimate]:
    """first - second, paired by problem; as `accuracy`. One of them may have a single draw, the other several."""
    over_problems = {
        name: newcombe(_problem_means(first[name]), _problem_means(second[name])) for name in first
    }
    draw_means = {}
    for name in first:
        a, b = ([statistics.fmean(draw) for draw in of[name]] for of in (first, second))
        count = max(len(a), len(b))
        a, b = (means * count if len(means) == 1 else means for means in (a, b))
        draw_means[name] = [x - y for x, y in zip(a, b, strict=True)]
    return _with_mean(over_problems, draw_means, (-1.0, 1.0))


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% score interval of a share of `count` problems; scores between 0 and 1 make it wider than need be."""
    return wilson_limits(share, count, _Z)


def newcombe(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of first - second over the same problems, its interval from both Wilson intervals."""
    a, b = statistics.fmean(first), statistics.fmean(second)
    (low_a, high_a), (low_b, high_b) = wilson(a, len(first)), wilson(b, len(second))
    correlation = _correlation(first, second)

    def apart(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    return Estimate(a - b, a - b - apart(a - low_a, high_b - b), a - b + apart(high_a - a, b - low_b))


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Newcombe's phi: a positive covariance is taken 1 / 2n smaller; 0 where one of the two does not vary."""
    a, b = statistics.fmean(first), statistics.fmean(second)
    scale = math.sqrt(statistics.pvariance(first) * statistics.pvariance(second))
    if scale == 0:
        return 0.0
    covariance = math.fsum((x - a) * (y - b) for x, y in zip(first, second, strict=True)) / len(first)
    return (covariance if covariance <= 0 else max(0.0, covariance - 0.5 / len(first))) / scale


def _with_mean(
    over_problems: Mapping[str, Estimate], draws: Mapping[str, Sequence[float]], bounds: tuple[float, float]
) -> dict[str, Estimate]:
    """Each benchmark with the spread of its draws, and the mean over benchmarks with that of its own."""
    count = len(over_problems)
    value = statistics.fmean(e.value for e in over_problems.values())
    mean = Estimate(
        value,
        value - math.hypot(*(e.value - e.low for e in over_problems.values())) / count,
        value + math.hypot(*(e.high - e.value for e in over_problems.values())) / count,
    )
    found = {name: _widened(e, draws[name], bounds) for name, e in over_problems.items()}
    return found | {
        "mean": _widened(mean, [statistics.fmean(one) for one in zip(*draws.values(), strict=True)], bounds)
    }


def _widened(of: Estimate, draws: Sequence[float], bounds: tuple[float, float]) -> Estimate:
    interval = mean_interval(draws)
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    return Estimate(
        of.value,
        max(bounds[0], of.value - math.hypot(of.value - of.low, half)),
        min(bounds[1], of.value + math.hypot(of.high - of.value, half)),
    )


def _problem_means(draws: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(scores) for scores in zip(*draws, strict=True)]


def _samples(group: Sequence[Outcome]) -> Samples:
    return {name: [outcome.scores[name] for outcome in group] for name in group[0].scores}


def _draw_means(samples: Samples) -> list[float]:
    return [
        statistics.fmean(statistics.fmean(scores) for scores in one)
        for one in zip(*samples.values(), strict=True)
    ]
