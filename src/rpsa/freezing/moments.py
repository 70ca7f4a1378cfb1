"""`frozen_moments: raw`: Adam's second moment keeps seeing the gradients of frozen elements.

With a masked gradient `exp_avg_sq` decays while an element is frozen, and an element that thaws after 500
steps jumps at up to four times the learning rate.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rpsa.errors import RPSAError
from rpsa.freezing.exact import Mask
from rpsa.sharding import is_sharded, local, sum_over_shards


class RawSecondMoments:
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.sharded = is_sharded(parameters)
        self.raw: dict[str, Tensor] = {}
        self.masked: list[Tensor] = []
        self.norm = torch.zeros(())

    def check(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Adam):
            raise RPSAError(
                f"frozen_moments: raw needs Adam or AdamW, not {type(optimizer).__name__}; use zero"
            )

    def keep(self, gradients: Mapping[str, Tensor | None], mask: Mask) -> None:
        """Mask the gradients in place, and remember what was masked; what is not finite counts as 0."""
        self.masked = []
        for name, gradient in gradients.items():
            if gradient is not None:
                raw = local(gradient).clone()
                mask[name].clear_(local(gradient))
                self.raw[name] = raw.sub_(local(gradient)).nan_to_num_(0.0, 0.0, 0.0)
                self.masked.append(local(gradient))
        self.norm = self._norm()

    def add(self, optimizer: Optimizer) -> None:
        """After the step: what exp_avg_sq would have seen, had the frozen gradients been clipped like the rest."""
        clipped = self._norm()
        # a step that a gradient scaler skipped has a norm that is not finite, and adds nothing
        factor = torch.where((self.norm > 0) & clipped.isfinite(), clipped / self.norm, 0.0)
        for group in optimizer.param_groups:
            for name, parameter in self.parameters.items():
                if name in self.raw and any(parameter is p for p in group["params"]):
                    second = local(optimizer.state[parameter]["exp_avg_sq"])
                    raw = self.raw.pop(name).mul_(factor).to(second.dtype)
                    second.addcmul_(raw, raw, value=1 - group["betas"][1])
        if not self.raw:
            self.masked = []

    def _norm(self) -> Tensor:
        """Of the masked gradients, as clipping or a gradient scaler has changed them by now."""
        squares = sum((gradient.float().square().sum() for gradient in self.masked), torch.zeros(()))
        return sum_over_shards(squares, sharded=self.sharded).sqrt()
