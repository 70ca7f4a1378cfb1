"""Threshold (section 3.2): tau_k as an exact order statistic over all non-zero Fisher values, without sorting.

Sorting billions of values takes their memory again and minutes, and shards cannot be sorted apart; a value that is only
nearly the quantile would freeze another number of elements than k says. But bit patterns of non-negative fp32 numbers,
read as integers, are ordered like the numbers. So two histograms (of the upper, then of the lower 16 bits) find any
order statistic exactly, in little memory, and over shards as well: histograms of shards are summed. The first one is
the same whatever rank is asked for, and is kept, as a dynamic k asks again and again.

On a CPU a histogram costs many times what a comparison does. There a sorted sample, which is kept as well, brackets
the value; counts prove that it lies inside, and among the one percent of all values that do it is selected.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpsa.errors import RPSAError
from rpsa.settings import CONSTANT_RATIO
from rpsa.sharding import gather_objects, sum_over_shards

Values = np.ndarray[Any, np.dtype[np.float32]]

_BINS = 1 << 16
_LOWER = _BINS - 1
_MAGNITUDE = 0x7FFFFFFF  # without the sign of -0.0
_SMALLEST = 2.0**-149  # of the positive fp32 numbers
_SAMPLED = 1 << 18
CPU_BLOCK = 1 << 16
DEVICE_BLOCK = 1 << 23


def threshold_rank(n: int, k: float) -> int:
    """Rank (from 1, ascending) of tau_k among n non-zero values: n - floor(k n), clamped to [1, n].

    k is read as the decimal that was written, so that 0.7 of 10 elements is 7 and not 6.
    """
    if not CONSTANT_RATIO.admits(k):
        raise RPSAError(f"frozen ratio {k!r} is not between 0 and 1")
    return max(1, n - int(Fraction(repr(float(k))) * n))


class Ranking:
    """The order statistics of the non-zero values of several tensors.

    Args:
        scores: non-negative fp32 or bf16 tensors, this rank's shards; kept, not copied.
        sharded: whether other ranks have other shards; all of them must then do the same.
        device: where to count; a block of a tensor at a time is brought there. By default each stays where it is.
    """

    def __init__(
        self, scores: Iterable[Tensor], *, sharded: bool = False, device: torch.device | None = None
    ) -> None:
        self._scores = [score.detach().reshape(-1) for score in scores]
        self._sharded = sharded
        self._device = device or next((score.device for score in self._scores), torch.device("cpu"))
        self._nonzero_here = _count_nonzero(self._blocks())
        [self.nonzero] = self._over_ranks(self._nonzero_here)

    def value(self, rank: int) -> float:
        """The `rank`-th smallest (from 1) of the non-zero values."""
        return self._by_bracket(rank) if self._device.type == "cpu" else self._by_histograms(rank)

    def _by_histograms(self, rank: int) -> float:
        # the bin of upper bits in which the running count reaches the rank; in it, the same for the lower bits
        prefix = int(np.searchsorted(self._upper, rank))
        below = int(self._upper[prefix - 1]) if prefix else 0
        lower = self._histogram(lambda bits: _lower(bits, prefix))[:_BINS].cumsum(0)
        # the search stays on the device, which is waited for once: for the value
        bits = torch.searchsorted(lower, rank - below) | (prefix << 16)
        return bits.to(torch.int32).view(torch.float32).item()

    @cached_property
    def _upper(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """How many non-zero values there are up to the end of each bin of upper bits."""
        return self._histogram(lambda bits: bits >> 16)[:_BINS].cumsum(0).cpu().numpy()

    def _histogram(self, bin_of: Callable[[Tensor], Tensor]) -> Tensor:
        """int64 counts of all ranks' non-zero values: 65,536 bins, and as many behind for what is in none."""
        counts = torch.zeros(2 * _BINS, dtype=torch.int64, device=self._device)
        for block in self._blocks():
            bits = block.float().view(torch.int32) & _MAGNITUDE
            counts.scatter_add_(0, bin_of(bits).long(), bits.ne(0).long())
        return sum_over_shards(counts, sharded=self._sharded)

    def _blocks(self) -> Iterator[Tensor]:
        for score in self._scores:
            for start, stop in blocks(score.numel(), self._device):
                yield score[start:stop].to(self._device)

    def _over_ranks(self, *counts: int) -> list[int]:
        return sum_over_shards(torch.tensor(counts), sharded=True).tolist() if self._sharded else list(counts)

    def _joined(self, values: Values) -> Values:
        return np.concatenate(gather_objects(values)) if self._sharded else values

    # The bracket

    def _by_bracket(self, rank: int) -> float:
        zeros = sum(score.numel() for score in self._scores) - self._nonzero_here
        # A bracket that misses the value is seen by its counts, and everything is taken instead: always exact.
        for low, high in (self._bracket(rank), (_SMALLEST, math.inf)):
            below, inside = -zeros, []
            for block in self._blocks():
                values = block.float().numpy()  # comparisons are several times as fast as torch's
                below += int(np.count_nonzero(values < low))
                inside.append(values[(values >= low) & (values <= high)])
            below, between = self._over_ranks(below, sum(map(len, inside)))
            if below < rank <= below + between:
                break
        within = self._joined(np.concatenate(inside))
        within.partition(rank - below - 1)
        return float(within[rank - below - 1])

    def _bracket(self, rank: int) -> tuple[float, float]:
        """What the `rank`-th value lies between but for a chance of some millionths."""
        sample, share = self._sample, rank / self.nonzero
        place = share * len(sample)
        # five standard deviations of how many sampled values lie below a quantile (binomial)
        margin = 5 * math.sqrt(len(sample) * share * (1 - share)) + 5
        low, high = math.floor(place - margin), math.ceil(place + margin)
        return (
            float(sample[low]) if low >= 0 else _SMALLEST,
            float(sample[high]) if high < len(sample) else math.inf,
        )

    @cached_property
    def _sample(self) -> Values:
        """Some non-zero values of all ranks, ascending; none where there are too few to be worth it."""
        [total] = self._over_ranks(sum(score.numel() for score in self._scores))
        share = _SAMPLED / total if total > 4 * _SAMPLED else 0.0
        generator = torch.Generator().manual_seed(0)
        drawn = [
            score[torch.randint(len(score), (math.ceil(share * len(score)),), generator=generator)].float()
            for score in self._scores
            if share and len(score)
        ]
        here = torch.cat(drawn).numpy() if drawn else np.empty(0, np.float32)
        return np.sort(self._joined(here[here > 0]))


def _count_nonzero(blocks: Iterable[Tensor]) -> int:
    counts = [
        np.count_nonzero(block.float().numpy() != 0)
        if block.device.type == "cpu"
        else torch.count_nonzero(block)
        for block in blocks
    ]
    return int(sum(counts))  # the device is waited for once


def _lower(bits: Tensor, prefix: int) -> Tensor:
    """The lower 16 bits; of what has another prefix, behind the bins of those that have it."""
    others = bits.bitwise_xor(prefix << 16).bitwise_right_shift_(16).ne(0)
    return bits.bitwise_and(_LOWER).add_(others, alpha=_BINS)


def order_statistic(scores: Iterable[Tensor], rank: int, *, sharded: bool = False) -> float:
    """The `rank`-th smallest (from 1) of the non-zero values of non-negative fp32 or bf16 tensors."""
    return Ranking(scores, sharded=sharded).value(rank)


def blocks(elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """[start, stop) of the parts in which a flat tensor is worked on; every start is a multiple of 8.

    On a CPU a part and what is made of it stay in the second-level cache; elsewhere few kernels count more, and
    what a part needs beside it.
    """
    size = CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
    for start in range(0, elements, size):
        yield start, min(start + size, elements)
