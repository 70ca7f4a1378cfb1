"""Bootstrap over problems, and two models on the same problems: how far apart, and whether that is chance.

Problems are drawn within each benchmark (stratified), the same for all models (paired). Two corrections make the
percentile interval hold what it says for few problems (benchmarks/coverage.py; Hesterberg 2015, "What Teachers Should
Know About the Bootstrap"): n - 1 of n problems are drawn, which makes the variance unbiased, and the percentiles move
out from 2.5 and 97.5 to where Student's t of the smallest benchmark lies on the normal curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

from rpsa.errors import RPSAError
from rpsa.evaluation.statistics.rates import (
    NORMAL,
    UPPER,
    Benchmarks,
    Counts,
    Estimate,
    Interval,
    Problems,
    Weighting,
    problem_means,
    student_quantile,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """The mean over benchmarks of each of several models.

    Attributes:
        observed: [models].
        drawn: [models, replicates].
        freedom: degrees of freedom of the smallest benchmark; infinite for counts.
    """

    observed: "Array"
    drawn: "Array"
    freedom: float


def draw(kind: str, models: Sequence[Benchmarks], weighting: Weighting, replicates: int, seed: int) -> Draws:
    """Draws for models with the same benchmarks, problems in the same order.

    What is drawn of a benchmark depends on `seed`, `kind` and its name, not on the other benchmarks. Where only counts
    are known, successes are drawn from binomial distributions: the first model's once, for all comparisons with it.

    Args:
        kind: "reasoning" or "attack"; opens the errors.

    Raises:
        RPSAError: no benchmarks, different benchmarks or numbers of problems, fewer than 2 problems.
    """
    import numpy as np

    sizes = _sizes(kind, models)
    observed, drawn, freedom = np.zeros(len(models)), np.zeros((len(models), replicates)), float("inf")
    for name, size in sizes.items():
        rng = np.random.default_rng([seed, crc32(f"{kind}/{name}".encode())])
        weight = 1 / len(sizes) if weighting == "benchmarks" else size / sum(sizes.values())
        benchmark = [model[name] for model in models]
        if counts := [scores for scores in benchmark if isinstance(scores, Counts)]:
            means, again = _drawn_counts(counts, replicates, rng)
        else:
            problems = [scores for scores in benchmark if not isinstance(scores, Counts)]
            means, again = _drawn_problems(problems, f"{kind}, {name}", replicates, rng)
            freedom = min(freedom, size - 1)
        observed += weight * means
        drawn += weight * again
    return Draws(observed, drawn, freedom)


def percentile_interval(values: "Array", freedom: float) -> Interval:
    """The expanded percentile interval of drawn values; infinite ones may be among them."""
    import numpy as np

    tail = NORMAL.cdf(-student_quantile(freedom))
    low, high = np.quantile(
        values, [tail, 1 - tail], method="inverted_cdf"
    )  # no interpolation towards infinity
    return Interval(float(low), float(high))


def _drawn_problems(
    benchmark: Sequence[Problems], where: str, replicates: int, rng: "np.random.Generator"
) -> tuple["Array", "Array"]:
    import numpy as np

    scores = np.array([problem_means(problems, where) for problems in benchmark])  # [models, problems]
    n = scores.shape[1]
    # Problems with the same scores for all models are the same to a mean: count how often each kind is drawn.
    kinds, counts = np.unique(scores, axis=1, return_counts=True)  # [models, kinds]
    times = rng.multinomial(n - 1, counts / n, size=replicates)  # [replicates, kinds]
    return scores.mean(axis=1), kinds @ times.T / (n - 1)


def _drawn_counts(
    benchmark: Sequence[Counts], replicates: int, rng: "np.random.Generator"
) -> tuple["Array", "Array"]:
    import numpy as np

    means = np.array([counts.successes / counts.n for counts in benchmark])
    n = benchmark[0].n
    return means, np.array([rng.binomial(n, mean, size=replicates) for mean in means]) / n


def _sizes(kind: str, models: Sequence[Benchmarks]) -> dict[str, int]:
    """The number of problems of each benchmark; sorted, so that the order of a mapping changes no rounding."""
    names = sorted(models[0])
    if not names:
        raise RPSAError(f"{kind}: no benchmarks; give at least one")
    for model in models[1:]:
        if odd := sorted({*names} ^ {*model}):
            raise RPSAError(
                f"{kind}: {', '.join(odd)} not given for all models; give all the same benchmarks"
            )
    return {name: _size(f"{kind}, {name}", [model[name] for model in models]) for name in names}


def _size(where: str, benchmark: Sequence[Problems | Counts]) -> int:
    if len({isinstance(scores, Counts) for scores in benchmark}) > 1:
        raise RPSAError(f"{where}: counts of one model and samples of another; give all in one form")
    sizes = {scores.n if isinstance(scores, Counts) else len(scores) for scores in benchmark}
    if len(sizes) > 1:
        raise RPSAError(
            f"{where}: models with {sorted(sizes)} problems; give the same problems in the same order"
        )
    size = sizes.pop()
    if size < 2 and not isinstance(benchmark[0], Counts):
        raise RPSAError(f"{where}: {size} problems; a bootstrap over problems needs at least 2")
    return size


def paired_difference(
    first: Benchmarks,
    second: Benchmarks,
    *,
    weighting: Weighting = "benchmarks",
    replicates: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Second minus first, as the mean over benchmarks of the difference in pass@1, or over items.

    The interval is a bootstrap over problems, within each benchmark, the same problems for both models; samples of a
    problem stay together, and may differ in number. Where both models get the same score on every problem, it has no
    width: nothing was seen that could differ. For one benchmark, give one. `RPSAError` as from `bootstrap.draw`.
    """
    draws = draw("scores", [first, second], weighting, replicates, seed)
    value = float(draws.observed[1] - draws.observed[0])
    drawn = draws.drawn[1] - draws.drawn[0]
    return Estimate(value, float(drawn.std()), percentile_interval(drawn, draws.freedom))


@dataclass(frozen=True)
class McNemar:
    """How many problems only one of two models got right, and the p-value of there being no difference."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """McNemar's exact test for one sample a problem: is it chance which model gets a problem right alone?

    Two-sided, from the binomial distribution; for several samples a problem, take `paired_difference`.

    Args:
        first, second: 0 or 1 for each problem, in the same order.

    Raises:
        RPSAError: no problems, different numbers of problems, or a score that is neither 0 nor 1.
    """
    if not first or len(first) != len(second):
        raise RPSAError(f"mcnemar: {len(first)} and {len(second)} problems; give both models the same")
    if not {*first, *second} <= {0, 1}:
        raise RPSAError("mcnemar: a score is neither 0 nor 1; for means of samples take paired_difference")
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    if only_first == only_second:  # as likely a way as there is, also for none
        return McNemar(only_first, only_second, 1.0)
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    p_value = float(binomtest(only_first, only_first + only_second).pvalue)
    return McNemar(only_first, only_second, p_value)


def minimum_detectable_effect(
    problems: int,
    samples: int = 1,
    *,
    rate: float = 0.5,
    between: float = 0.5,
    shared: float = 0.0,
    power: float = 0.8,
) -> float:
    """The smallest difference of two models' pass@1 that a study finds with this power, at the 5% level.

    (z_.975 + z_power) sqrt(2 rate (1 - rate) (between (1 - shared) + (1 - between) / samples) / problems), the normal
    approximation with the variance split as in Miller 2024, "Adding Error Bars to Evals".

    Args:
        samples: of each problem, from each model.
        rate: about what both score; .5 is the worst case.
        between: the share of a score's variance that lies between problems (0: all equally hard; 1: a model always
            gives the same answer).
        shared: how far both models find the same problems hard, the correlation of their rates by problem. 0 is an
            unpaired comparison, and the worst case of a paired one.

    Raises:
        RPSAError: no problems or samples, or a share or rate outside of its range.
    """
    if problems < 1 or samples < 1:
        raise RPSAError(
            f"minimum_detectable_effect: {problems} problems, {samples} samples; give at least 1 of each"
        )
    if not (0 < rate < 1 and 0 <= between <= 1 and 0 <= shared <= 1 and 0 < power < 1):
        raise RPSAError("minimum_detectable_effect: rate, between, shared and power are fractions")
    variance = 2 * rate * (1 - rate) * (between * (1 - shared) + (1 - between) / samples) / problems
    return (NORMAL.inv_cdf(UPPER) + NORMAL.inv_cdf(power)) * math.sqrt(variance)
