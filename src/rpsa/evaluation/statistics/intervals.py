"""An estimate, its standard error and its 95% interval."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

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
