"""`frozen_moments: raw`: Adam's second moment keeps seeing the gradients of frozen elements.

With a masked gradient `exp_avg_sq` decays while an element is frozen, and an element that thaws after 500
steps jumps at up to four times the learning rate.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rpsa.errors import RPSAError
from rpsa.freezing.exact import FrozenMask
from rpsa.sharding import is_sharded, local, sum_over_shards


class RawSecondMoments:
    def __init__(self, parameters: Mapping[str, nn.Parameter], frozen: FrozenMask) -> None:
        self.parameters, self.frozen = parameters, frozen
        self.sharded = is_sharded(parameters)
        self.raw: dict[str, Tensor] = {}
        self.norm = torch.zeros(())
        self.rescale = torch.ones(())

    def check(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Adam):
            raise RPSAError(
                f"frozen_moments: raw needs Adam or AdamW, not {type(optimizer).__name__}; use zero"
            )

    def keep(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Remember the frozen elements' gradients, before they are masked."""
        self.raw = {n: local(g)[self.frozen(n)] for n, g in gradients.items() if g is not None}
        self.norm = self._norm([local(g)[~self.frozen(n)] for n, g in gradients.items() if g is not None])

    def before_step(self) -> None:
        """Clipping and unscaling changed the trained elements' gradients since; the frozen ones' follow."""
        if self.raw:
            gradients = [local(p.grad) for p in self.parameters.values() if p.grad is not None]
            self.rescale = torch.where(self.norm > 0, self._norm(gradients) / self.norm, 1.0)

    def after_step(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for name, parameter in self.parameters.items():
                if name in self.raw and any(parameter is p for p in group["params"]):
                    second = local(optimizer.state[parameter]["exp_avg_sq"])
                    missing = (self.raw[name] * self.rescale).square() * (1 - group["betas"][1])
                    second[self.frozen(name)] += missing.to(second.dtype)
        self.raw = {}

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        squares = torch.stack([t.float().square().sum() for t in tensors]).sum()
        return sum_over_shards(squares, sharded=self.sharded).sqrt()
