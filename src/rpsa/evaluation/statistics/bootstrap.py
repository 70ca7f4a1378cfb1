"""The bootstrap over problems: several models scored again and again on the same drawn problems.

Problems are drawn within each benchmark (stratified), the same for all models (paired). Two corrections make the
percentile interval hold what it says for few problems (benchmarks/coverage.py; Hesterberg 2015, "What Teachers Should
Know About the Bootstrap"): n - 1 of n problems are drawn, which makes the variance unbiased, and the percentiles move
out from 2.5 and 97.5 to where Student's t of the smallest benchmark lies on the normal curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

from rpsa.errors import RPSAError
from rpsa.evaluation.statistics.intervals import NORMAL, Interval, student_quantile
from rpsa.evaluation.statistics.samples import Benchmarks, Counts, Problems, Weighting, problem_means

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
