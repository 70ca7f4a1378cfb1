"""Two models on the same problems: how far apart, whether that is chance, and how small a difference one could see."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rpsa.errors import RPSAError
from rpsa.evaluation.statistics.bootstrap import draw, percentile_interval
from rpsa.evaluation.statistics.intervals import NORMAL, UPPER, Estimate
from rpsa.evaluation.statistics.samples import Benchmarks, Weighting


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
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**discordant))


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
