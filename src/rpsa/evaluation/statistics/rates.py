"""Rates: pass@1 and attack success of a model, means over problems and not over samples; means over training runs.

All statistics are made from the scores of each sample of each problem of each benchmark (`Problems`), or from bare
counts (`Counts`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

from rpsa.errors import RPSAError

Problems = Sequence[Sequence[float]]
"""The scores of a benchmark: for each problem the scores of its samples, at least one."""


@dataclass(frozen=True)
class Counts:
    """All that a published table tells of a benchmark: how many of n problems, one sample each, were right
    (or, of n attacks, succeeded)."""

    successes: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.n or self.n == 0:
            raise RPSAError(f"{self.successes} of {self.n}: counts are between 0 and n, and n at least 1")


Benchmarks = Mapping[str, Problems | Counts]
"""One model's scores by benchmark. The order of problems is the same for all models that are compared."""

Weighting = Literal["benchmarks", "items"]
"""The mean over benchmarks (the paper's), or over all problems of all benchmarks."""


def problem_means(problems: Problems, where: str) -> list[float]:
    """The mean score of each problem; `where` names the list in errors."""
    if not problems:
        raise RPSAError(f"{where}: no problems; give at least one")
    for index, samples in enumerate(problems):
        if not samples:
            raise RPSAError(
                f"{where}: problem {index} has no samples; leave it out for all models, or sample it"
            )
    return [math.fsum(samples) / len(samples) for samples in problems]


NORMAL = NormalDist()
UPPER = 0.975  # the upper end of a two-sided 95% interval


class Interval(NamedTuple):
    """Both ends of a 95% interval, in the unit of what it is about."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error, and its 95% interval, all in one unit."""

    value: float
    standard_error: float
    interval: Interval


def student_quantile(freedom: float) -> float:
    """The two-sided 95% quantile of Student's t; `freedom` may be infinite."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(freedom, UPPER))


def rate(problems: Problems) -> Estimate:
    """pass@1, or the attack success rate: the mean over problems of each problem's mean over its samples.

    The standard error is clustered by problem: s / sqrt(n), s the standard deviation of the n problem means (NaN for
    one problem). Samples of one problem resemble each other; a standard error over all samples would be too small.

    The interval is Wilson's. With several samples a problem it is Wilson's at the effective sample size
    p (1 - p) / SE^2, which lies between the number of problems and that of samples, with Student's t of n - 1
    degrees of freedom; at p = 0 or 1 the scores do not show how alike samples are, and the number of problems
    counts. For scores between 0 and 1 rather than 0 or 1, it is wider than need be.

    Raises:
        RPSAError: no problems, a problem without samples, or a score outside [0, 1].
    """
    means = problem_means(problems, "rate")
    if not all(0 <= score <= 1 for samples in problems for score in samples):
        raise RPSAError("rate: a score is not between 0 and 1; give fractions, not percent")
    n, samples = len(means), sum(map(len, problems))
    value = math.fsum(means) / n
    squares = math.fsum((mean - value) ** 2 for mean in means)
    error = math.sqrt(squares / (n * (n - 1))) if n > 1 else math.nan
    if n == 1 or samples == n or not 0 < value < 1:
        return Estimate(value, error, wilson_limits(value, n, NORMAL.inv_cdf(UPPER)))
    most_alike = value * (1 - value) * n  # the squares, if the samples of each problem were all the same
    effective = min(n * most_alike / squares, samples) if squares else samples
    return Estimate(value, error, wilson_limits(value, max(effective, n), student_quantile(n - 1)))


def pass_at_k(problems: Problems, k: int) -> Estimate:
    """The chance that one of k samples is right: mean of 1 - C(n - c, k) / C(n, k), c of a problem's n samples right.

    The unbiased estimator of Chen et al. 2021, "Evaluating Large Language Models Trained on Code"; `rate` at k = 1,
    with a wider interval. Raises `RPSAError` where a problem has fewer than k samples, or a score is neither 0 nor 1.
    """
    problem_means(problems, "pass_at_k")
    if not {score for samples in problems for score in samples} <= {0, 1}:
        raise RPSAError("pass_at_k: a score is neither 0 nor 1; a sample is right or wrong")
    fewest = min(map(len, problems))
    if not 1 <= k <= fewest:
        raise RPSAError(f"pass_at_k: k = {k}, and a problem has {fewest} samples; take 1 <= k <= {fewest}")
    right = [(len(samples), int(sum(samples))) for samples in problems]
    return rate([[1 - math.comb(n - c, k) / math.comb(n, k)] for n, c in right])


def wilson_limits(p: float, n: float, z: float) -> Interval:
    """Wilson's score interval (Wilson 1927) of any share p of any number n, at the normal quantile z.

    `scipy.stats` has it for whole numbers alone; effective sample sizes and mean scores are none.
    """
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return Interval(
        max(min(centre - half, p), 0.0), min(max(centre + half, p), 1.0)
    )  # rounding at p = 0 and 1


def mean_interval(values: Sequence[float]) -> Interval | None:
    """95% Student t interval of the mean of independent runs; None for fewer than 3."""
    if len(values) < 3:
        return None
    mean = math.fsum(values) / len(values)
    half = _half_width(values)
    return Interval(mean - half, mean + half)


def mean_of_rates(rates: Sequence[tuple[float, tuple[float, float]]]) -> tuple[float, Interval]:
    """The mean of rates of sets that share no item, in which each counts alike, and its 95% interval.

    By MOVER (G. Y. Zou and A. Donner, Construction of confidence limits about effect measures, 2008): the distances to
    each end add up as squares, which keeps Wilson's interval of a rate of 0. Rates and intervals are in [0, 1].
    """
    mean = math.fsum(value for value, _ in rates) / len(rates)
    below = math.hypot(*(value - low for value, (low, _) in rates)) / len(rates)
    above = math.hypot(*(high - value for value, (_, high) in rates)) / len(rates)
    return mean, Interval(max(0.0, mean - below), min(1.0, mean + above))


def ratio_interval(drops: Sequence[float], gains: Sequence[float]) -> Interval | None:
    """95% interval of (mean drop) / (mean gain) over independent runs, one pair a run; None for fewer than 3.

    Student t over the residuals drop - STR x gain, divided by the mean gain (the linearised, or delta, method).
    A percentile bootstrap over 3 runs holds the truth three times in four instead of nineteen times in twenty.
    None as well where the mean gain is not positive.
    """
    count = len(drops)
    gain = math.fsum(gains)
    if count < 3 or gain <= 0:
        return None
    ratio = math.fsum(drops) / gain
    residuals = [drop - ratio * gain for drop, gain in zip(drops, gains, strict=True)]
    half = _half_width(residuals) / (gain / count)
    return Interval(ratio - half, ratio + half)


def nested_mean(scores: Sequence[Problems]) -> Estimate:
    """The mean of a benchmark over training runs, sure of both: scores[run][problem][sample].

    For what a new seed would give on new problems of the same kind. All runs answer the same problems, so runs and
    problems are crossed: with V_R, V_P and V_RP the mean squares of runs, problems and their interaction, each over
    R x P, the variance of the grand mean is (V_R - V_RP) + V_P, the first part not below 0. Half the interval is
    sqrt(t_R^2 (V_R - V_RP) + t_P^2 V_P), with Student's t of R - 1 and P - 1 degrees of freedom (after Banerjee 1960);
    with Satterthwaite's it is too short for 3 runs. Give differences to a baseline as scores to have theirs.

    Raises:
        RPSAError: fewer than 3 runs or 2 problems, or runs with different numbers of problems.
    """
    means = [problem_means(problems, f"run {run}") for run, problems in enumerate(scores)]
    runs, problems = len(means), len(means[0]) if means else 0
    if runs < 3 or problems < 2:
        raise RPSAError(
            f"nested_mean: {runs} runs of {problems} problems; give at least 3 runs of 2 problems"
        )
    if any(len(row) != problems for row in means):
        raise RPSAError(
            f"nested_mean: runs with {sorted({*map(len, means)})} problems; give all runs the same"
        )
    of_run = [math.fsum(row) / problems for row in means]
    of_problem = [math.fsum(column) / runs for column in zip(*means, strict=True)]
    mean = math.fsum(of_run) / runs
    residuals = [
        score - run - problem + mean
        for row, run in zip(means, of_run, strict=True)
        for score, problem in zip(row, of_problem, strict=True)
    ]
    interaction = math.fsum(r * r for r in residuals) / ((runs - 1) * (problems - 1) * runs * problems)
    between_runs = max(_squared_error(of_run) - interaction, 0.0)
    between_problems = _squared_error(of_problem)
    half = math.sqrt(
        student_quantile(runs - 1) ** 2 * between_runs
        + student_quantile(problems - 1) ** 2 * between_problems
    )
    error = math.sqrt(between_runs + between_problems)
    return Estimate(mean, error, Interval(mean - half, mean + half))


def _half_width(values: Sequence[float]) -> float:
    return student_quantile(len(values) - 1) * math.sqrt(_squared_error(values))


def _squared_error(values: Sequence[float]) -> float:
    """The squared standard error of the mean."""
    count = len(values)
    mean = math.fsum(values) / count
    return math.fsum((value - mean) ** 2 for value in values) / (count * (count - 1))
