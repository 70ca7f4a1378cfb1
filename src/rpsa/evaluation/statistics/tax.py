"""The Safety Tax Rate of section 4.2.2."""

import math
from collections.abc import Sequence

from rpsa.errors import RPSAError


def safety_tax_rate(
    *,
    reasoning_before: Sequence[float],
    reasoning_after: Sequence[float],
    attack_before: Sequence[float],
    attack_after: Sequence[float],
) -> float:
    """STR = Delta R / Delta S: the mean drop in reasoning for each unit of mean reduction in attack success.

    Each list holds one mean per benchmark, in the same order before and after, all on one scale (fractions or
    percent). Lower is better; negative where reasoning rose. NaN where attack success did not fall: nothing was
    bought, so there is no price (`safety_tax` says so in words). Lists that are empty or do not match raise
    `RPSAError`.
    """
    drop = _mean_difference("reasoning", reasoning_before, reasoning_after)
    gain = _mean_difference("attack", attack_before, attack_after)
    return drop / gain if gain > 0 else math.nan


def safety_tax(
    *,
    reasoning_before: Sequence[float],
    reasoning_after: Sequence[float],
    attack_before: Sequence[float],
    attack_after: Sequence[float],
) -> tuple[float | None, str | None]:
    """`safety_tax_rate` for reports: (value, None), or (None, why there is no value)."""
    value = safety_tax_rate(
        reasoning_before=reasoning_before,
        reasoning_after=reasoning_after,
        attack_before=attack_before,
        attack_after=attack_after,
    )
    if math.isnan(value):
        return None, "attack success did not fall, so there is no safety gain to divide by"
    return value, None


def _mean_difference(what: str, before: Sequence[float], after: Sequence[float]) -> float:
    if not before or len(before) != len(after):
        raise RPSAError(
            f"{what}_before has {len(before)} benchmarks and {what}_after {len(after)}: give one mean each"
        )
    return math.fsum(b - a for b, a in zip(before, after, strict=True)) / len(before)
