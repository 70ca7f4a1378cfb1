"""Split-half overlap: how well two halves of the samples agree on which parameters matter."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

SAMPLED_ELEMENTS = 1 << 20
RATIOS = (0.01, 0.1, 0.5, 0.6)


def sampled_elements(sizes: Sequence[int], seed: int, limit: int = SAMPLED_ELEMENTS) -> list[Tensor | None]:
    """Which elements of each parameter the split-half overlap looks at.

    A seeded uniform sample of at most `limit` elements over all parameters, as sorted flat int64 indices into
    each; None stands for a whole parameter, and all are whole where there are no more than `limit` elements.
    """
    total = sum(sizes)
    if total <= limit:
        return [None] * len(sizes)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.unique(torch.randint(total, (limit,), generator=generator))
    starts = torch.tensor([0, *sizes]).cumsum(0)
    bounds = torch.searchsorted(drawn, starts).tolist()
    return [
        drawn[low:high] - start
        for low, high, start in zip(bounds[:-1], bounds[1:], starts.tolist(), strict=False)
    ]


def split_half_overlap(
    first: Tensor, second: Tensor, ratios: Sequence[float] = RATIOS
) -> dict[str, float | None]:
    """The share of the top floor(k n) elements that two halves have in common, for each k.

    `first` and `second` are the same elements' scores, 1-D float32 on the CPU, each from one half of the samples;
    n counts those that are non-zero in either half. An element that is zero in a half is never among that half's
    top, and ties with the last of the top are. None where a half is all zeros or floor(k n) = 0. Chance is k.
    """
    n = int(torch.count_nonzero(first.maximum(second)))
    counts = [int(Fraction(repr(k)) * n) for k in ratios]
    if not bool(first.any()) or not bool(second.any()):
        counts = [0] * len(counts)
    thresholds = zip(*(_thresholds(half, counts) for half in (first, second)), strict=True)
    result: dict[str, float | None] = {}
    for k, count, (low_first, low_second) in zip(ratios, counts, thresholds, strict=True):
        is_first = (first >= low_first) & (first > 0)
        is_second = (second >= low_second) & (second > 0)
        total = max(count, int(is_first.sum()), int(is_second.sum()))
        result[repr(k)] = int((is_first & is_second).sum()) / total if count else None
    return result


def _thresholds(scores: Tensor, counts: Sequence[int]) -> list[float]:
    """The `count`-th largest of `scores`, for each count (infinity for a count of 0)."""
    if max(counts) == 0:
        return [math.inf] * len(counts)
    values = scores.numpy()
    places = [len(values) - count for count in counts]
    # One partition for all is several times faster than a sort, or than a selection for each.
    ordered = np.partition(values, sorted({place for place in places if place < len(values)}))
    return [float(ordered[place]) if place < len(values) else math.inf for place in places]
