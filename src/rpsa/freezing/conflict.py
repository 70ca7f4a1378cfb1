"""Conflict (Eq. 6): the share of parameters whose reasoning and safety gradients point in opposite directions.

c needs only the signs of g_R, so two bits an element are kept from the reasoning pass to the end of the safety pass,
and not a second gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rpsa.freezing.bits import BitMask
from rpsa.sharding import local


@dataclass(frozen=True)
class Signs:
    """Where a gradient is above and where it is below 0: two bits an element."""

    positive: BitMask
    negative: BitMask

    @classmethod
    def of(cls, gradient: Tensor) -> "Signs":
        return cls(*BitMask.signs(local(gradient).detach()))

    def within(self, support: BitMask) -> "Signs":
        """Neither above nor below where `support` is not set."""
        return Signs(self.positive & support, self.negative & support)

    def opposed(self, other: "Signs") -> Tensor:
        """How many elements have opposite signs: an int64 scalar on the gradients' device."""
        return ((self.positive & other.negative) | (self.negative & other.positive)).counts().sum()


def signs(gradients: Mapping[str, Tensor | None], support: Mapping[str, BitMask]) -> dict[str, Signs]:
    """The signs of this rank's gradient shards, where F > 0: nowhere else does Eq. 6 look.

    Args:
        support: where F > 0.
    """
    return {
        name: Signs.of(gradient).within(support[name])
        for name, gradient in gradients.items()
        if gradient is not None
    }


def opposed(reasoning_signs: Mapping[str, Signs], safety_gradients: Mapping[str, Tensor | None]) -> Tensor:
    """|{j : F_j > 0, g_R,j g_S,j < 0}| of this rank's shards, the numerator of Eq. 6: an int64 scalar.

    Signs are compared, not products, which can underflow to 0. c is this, summed over ranks, over the number of
    elements with F > 0.

    Args:
        reasoning_signs: from `signs`.
        safety_gradients: unmasked and accumulated, of the same parameters.
    """
    counts = [
        reasoning.opposed(Signs.of(gradient))
        for name, reasoning in reasoning_signs.items()
        if (gradient := safety_gradients[name]) is not None
    ]
    here = [count.to(counts[0].device) for count in counts]
    return torch.stack(here).sum() if here else torch.zeros((), dtype=torch.int64)
