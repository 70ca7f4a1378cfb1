"""Projection: what of the safety gradient opposes the reasoning gradient is taken out of it at every step."""

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn

from rpsa.parameters import trainable_parameters
from rpsa.settings import PROJECTION, GradientProjection, check
from rpsa.sharding import is_sharded, local, sum_over_shards


class Projection:
    """Changes g_S where it conflicts with g_R, the gradient of the reasoning loss at the same weights.

    `agem`: where g_S . g_R < 0, g_S loses its component along g_R (A-GEM, Eq. 11: Chaudhry et al., 2019), so that
    to first order the step does not raise the reasoning loss. `signs`: g_S is set to 0 wherever its sign is not
    that of g_R, the elements that Eq. 6 counts.

        projection = Projection(model, "agem")
        for batch in batches:
            reasoning_loss(model).backward(); projection.capture_reference()
            safety_loss(model, batch).backward(); projection.project_gradients()
            clip_grad_norm_(...); optimizer.step()

    Only gradients change: weight decay and momentum still act everywhere.
    """

    def __init__(self, model: nn.Module, kind: GradientProjection) -> None:
        # a setting may be None or nullspace, this class not
        check(replace(PROJECTION, optional=False, choices=get_args(GradientProjection)), kind)
        self.kind = kind
        self.cosine = 0.0
        """Between g_S and g_R, when they were last compared."""
        self._parameters = trainable_parameters(model)
        self._sharded = is_sharded(self._parameters)
        self._reference: dict[str, Tensor] = {}

    @torch.no_grad()
    def capture_reference(self) -> None:
        """Take the gradients that are there now as g_R, and set them to None."""
        self._reference = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                # a copy: DDP may keep gradients as views of its buckets, which the next pass fills anew
                self._reference[name] = local(parameter.grad).clone()
                parameter.grad = None

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Change the gradients in place: once a step, on the complete g_S, before clipping. g_R is given up."""
        pairs = [
            (local(parameter.grad), self._reference[name])
            for name, parameter in self._parameters.items()
            if parameter.grad is not None and name in self._reference
        ]
        self._reference = {}
        product, safety, reasoning = self._products(pairs)
        self.cosine = product / (safety * reasoning) ** 0.5 if safety > 0 and reasoning > 0 else 0.0
        for gradient, reference in pairs:
            if self.kind == "signs":
                gradient.masked_fill_(gradient.sign() == -reference.sign(), 0)
            elif product < 0:
                gradient.sub_(reference, alpha=product / reasoning)

    def _products(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        """g_S . g_R, |g_S|^2, |g_R|^2 over all ranks; in float64, as many small products are summed."""
        sums = torch.zeros(3, dtype=torch.float64)
        for gradient, reference in pairs:
            g, r = gradient.double(), reference.double()
            sums += torch.stack([(g * r).sum(), g.square().sum(), r.square().sum()]).cpu()
        product, safety, reasoning = sum_over_shards(sums, sharded=self._sharded).tolist()
        return product, safety, reasoning
