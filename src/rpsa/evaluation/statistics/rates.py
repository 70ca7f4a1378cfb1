"""pass@1 and the attack success rate of one model on one benchmark: means over problems, not over samples."""

import math

from rpsa.errors import RPSAError
from rpsa.evaluation.statistics.intervals import NORMAL, UPPER, Estimate, Interval, student_quantile
from rpsa.evaluation.statistics.samples import Problems, problem_means


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


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's score interval of a binomial proportion (Wilson 1927)."""
    if not 0 <= successes <= n or n == 0:
        raise RPSAError(f"wilson_interval: {successes} of {n} is no proportion")
    return wilson_limits(successes / n, n, NORMAL.inv_cdf(UPPER))


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
    """The limits of `wilson_interval` for any share p and number n, at the normal quantile z."""
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return Interval(
        max(min(centre - half, p), 0.0), min(max(centre + half, p), 1.0)
    )  # rounding at p = 0 and 1
