"""What statistics are made from: the scores of each sample of each problem of each benchmark, or bare counts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
