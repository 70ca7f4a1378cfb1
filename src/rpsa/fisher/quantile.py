"""The threshold of section 3.2: an exact order statistic over all non-zero Fisher values, without sorting.

Bit patterns of non-negative fp32 numbers are ordered like the numbers, so two histograms of 65,536 bins
(upper, then lower 16 bits) find any order statistic exactly, in little memory, and over shards as well:
histograms of shards are summed.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from rpsa.errors import RPSAError
from rpsa.sharding import sum_over_shards

_BINS = 1 << 16
_CHUNK = 1 << 24


def threshold_rank(n: int, k: float) -> int:
    """Rank (from 1, ascending) of tau_k among n non-zero values: n - floor(k n), clamped to [1, n].

    k is read as the decimal that was written, so that 0.7 of 10 elements is 7 and not 6.
    """
    if not isinstance(k, Real) or not 0 <= k <= 1:
        raise RPSAError(f"frozen ratio {k!r} is not between 0 and 1")
    return max(1, n - int(Fraction(repr(float(k))) * n))


def count_nonzero(scores: Iterable[Tensor], *, sharded: bool = False) -> int:
    """How many elements have F > 0."""
    count = torch.zeros((), dtype=torch.int64)
    for score in scores:
        count += torch.count_nonzero(score).cpu()
    return int(sum_over_shards(count, sharded=sharded))


def order_statistic(scores: Iterable[Tensor], rank: int, *, sharded: bool = False) -> float:
    """The `rank`-th smallest (from 1) of the non-zero values of non-negative fp32 or bf16 tensors."""
    scores = list(scores)
    upper = sum_over_shards(_histogram(scores, None), sharded=sharded).cpu().cumsum(0)
    prefix = int(torch.searchsorted(upper, rank))
    below = int(upper[prefix - 1]) if prefix else 0
    lower = sum_over_shards(_histogram(scores, prefix), sharded=sharded).cpu().cumsum(0)
    suffix = int(torch.searchsorted(lower, rank - below))
    return torch.tensor((prefix << 16) | suffix, dtype=torch.int32).view(torch.float32).item()


def _histogram(scores: list[Tensor], prefix: int | None) -> Tensor:
    """Counts of the upper 16 bits of all non-zero values, or of the lower 16 of those that share `prefix`."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for bits in _nonzero_bits(scores):
        if prefix is None:
            digits = bits >> 16
        else:
            digits = bits[(bits >> 16) == prefix] & (_BINS - 1)
        counts += torch.bincount(digits, minlength=_BINS).cpu()
    return counts


def _nonzero_bits(scores: list[Tensor]) -> Iterator[Tensor]:
    for score in scores:
        for chunk in torch.split(score.detach().flatten(), _CHUNK):
            bits = chunk.float().view(torch.int32)
            yield bits[bits > 0]
