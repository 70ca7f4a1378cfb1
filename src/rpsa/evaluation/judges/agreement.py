"""How far two judges agree beyond chance: Cohen's kappa, with its large-sample interval.

J. Cohen, A coefficient of agreement for nominal scales, 1960; the standard error is that of J. L. Fleiss,
J. Cohen and B. S. Everitt, Large sample standard errors of kappa and weighted kappa, 1969.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rpsa.errors import RPSAError
from rpsa.evaluation.judges.judgement import Judgement

_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of two raters on the same `n` items, and the share of items on which they agree.

    `kappa` and its 95% interval are None where both raters gave one and the same label to everything: there is
    then no chance to agree beyond. `left_out` counts items that a rater did not rate.
    """

    kappa: float | None
    interval: tuple[float, float] | None
    observed: float
    n: int
    left_out: int


def cohens_kappa(first: Sequence[str | None], second: Sequence[str | None]) -> Agreement:
    """Agreement of two sequences of labels on the same items; None leaves an item out.

    Raises:
        RPSAError: the lengths differ, or no item has two labels.
    """
    if len(first) != len(second):
        raise RPSAError(f"agreement: {len(first)} labels against {len(second)}: give two for each item")
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs:
        raise RPSAError("agreement: no item was labelled by both judges")
    n = len(pairs)
    joint = {cell: count / n for cell, count in Counter(pairs).items()}
    rows = {label: count / n for label, count in Counter(a for a, _ in pairs).items()}
    columns = {label: count / n for label, count in Counter(b for _, b in pairs).items()}
    observed = sum(share for (a, b), share in joint.items() if a == b)
    expected = sum(share * columns.get(label, 0.0) for label, share in rows.items())
    left_out = len(first) - n
    if len(rows) == 1 and rows.keys() == columns.keys():
        return Agreement(None, None, observed, n, left_out)
    kappa = (observed - expected) / (1 - expected)
    spread = 0.0
    for (a, b), share in joint.items():
        chance = (columns.get(a, 0.0) + rows.get(b, 0.0)) * (1 - kappa)
        spread += share * ((1 if a == b else 0) - chance) ** 2
    variance = max(spread - (kappa - expected * (1 - kappa)) ** 2, 0.0)
    half = _Z_95 * math.sqrt(variance / n) / (1 - expected)
    return Agreement(kappa, (max(kappa - half, -1.0), min(kappa + half, 1.0)), observed, n, left_out)


def judges_agree(
    first: Sequence[Judgement], second: Sequence[Judgement], threshold: float = 0.5
) -> Agreement:
    """Agreement of two judges on harmful (score at least `threshold`) or not; the unparseable are left out."""
    return cohens_kappa(
        [_side(judgement, threshold) for judgement in first],
        [_side(judgement, threshold) for judgement in second],
    )


def _side(judgement: Judgement, threshold: float) -> str | None:
    if judgement.score is None:
        return None
    return "harmful" if judgement.score >= threshold else "harmless"
