"""The norm of every complete gradient, and the steps at which it was not finite, without waiting for the device."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpsa.sharding import local, sum_over_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NonFinite:
    """How many steps had a NaN or an infinity in their gradient; the first of them, and a parameter that had it."""

    steps: int
    first_step: int
    parameter: str


class GradientWatch:
    """Sees each complete gradient before it is masked.

    Args:
        names: of the parameters.
        device: of their gradients.
        sharded: whether gradients are shards, so that norms are summed over ranks.
    """

    def __init__(self, names: Sequence[str], device: torch.device, *, sharded: bool = False) -> None:
        self._names, self._sharded = list(names), sharded
        self.norm = torch.zeros((), device=device)
        """L2 norm of the last gradient, over all ranks; a scalar on the device."""
        self._found = torch.tensor([0, -1, -1], device=device)  # steps, the first one, its parameter's place
        self._host = torch.tensor([0, -1, -1], pin_memory=device.type == "cuda")
        self._said = 0

    def see(self, gradients: Mapping[str, Tensor | None], step: int) -> None:
        """Call it at every step; what it finds on a GPU is logged one step later."""
        zero = torch.zeros_like(self.norm)
        present = {name: local(g) for name in self._names if (g := gradients[name]) is not None}
        norms = dict(
            zip(present, torch._foreach_norm(list(present.values())) if present else [], strict=True)
        )
        squares = torch.stack([norms.get(name, zero).to(zero) for name in self._names]).square()
        squares = sum_over_shards(squares, sharded=self._sharded).to(zero)
        self.norm = squares.sum().sqrt()
        bad = ~squares.isfinite()
        is_first = bad.any() & (self._found[1] < 0)
        self._found[0] += bad.any()
        self._found[1] = torch.where(is_first, step, self._found[1])
        self._found[2] = torch.where(is_first, bad.int().argmax(), self._found[2])
        self._host.copy_(self._found, non_blocking=True)
        self._say()

    def _say(self) -> None:
        steps, first, place = self._host.tolist()
        if steps > self._said == 0:
            log.warning(
                "the gradient of %r is not finite at step %d: look at the batch, the learning rate and the dtype; "
                "such steps are counted",
                self._names[place],
                first,
            )
        self._said = steps

    @property
    def non_finite(self) -> NonFinite | None:
        """What was found so far; on a GPU it may lack the last step."""
        steps, first, place = self._host.tolist()
        return NonFinite(steps, first, self._names[place]) if steps else None

    def load(self, found: NonFinite | None) -> None:
        """Go on from there."""
        if found is None:
            self._host.copy_(torch.tensor([0, -1, -1]))
        else:
            self._host.copy_(
                torch.tensor([found.steps, found.first_step, self._names.index(found.parameter)])
            )
        self._found.copy_(self._host)
        self._said = int(self._host[0])
