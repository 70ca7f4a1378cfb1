"""Penalty: Eq. 5 as a loss instead of a mask, elastic weight consolidation (Kirkpatrick et al., 2017), and L2-SP."""

import torch
from torch import Tensor, nn

from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.parameters import trainable_parameters
from rpsa.settings import PENALTY_STRENGTH, check
from rpsa.sharding import is_sharded, local, shard_like, sum_over_shards


class WeightPenalty:
    """Pulls the weights back to where they started, the harder the more reasoning depends on them.

    Its loss is strength / 2 * sum_i w_i (theta_i - theta*_i)^2. With a Fisher, w is F over its mean (of all
    elements), as in EWC; without one w is 1 (L2-SP: Li et al., 2018), so that a strength means as much in both.

        penalty = WeightPenalty(model, starting_weights(model), fisher)
        ...
        loss.backward(); penalty.add_gradients(); clip_grad_norm_(...); optimizer.step()

    Args:
        start: theta*, as `starting_weights` has them; kept, not copied.
        fisher: of the model's trainable parameters.
        strength: not negative. Too large a one for the learning rate makes training diverge.

    Raises:
        RPSAError: the Fisher does not fit the model, or is zero throughout; the strength is impossible.
    """

    def __init__(
        self,
        model: nn.Module,
        start: dict[str, Tensor],
        fisher: FisherDiagonal | None = None,
        strength: float = PENALTY_STRENGTH.default,
    ) -> None:
        check(PENALTY_STRENGTH, strength, "strength")
        self.parameters = trainable_parameters(model)
        self.strength = strength
        self._start = start
        self._sharded = is_sharded(self.parameters)
        self._weights: dict[str, Tensor] | None = None
        if fisher is not None:
            fisher.check(model)
            self._weights = self._over_mean(fisher)

    def _over_mean(self, fisher: FisherDiagonal) -> dict[str, Tensor]:
        scores = {name: shard_like(fisher.scores[name], self.parameters[name]).float() for name in fisher}
        sums = torch.stack([score.sum(dtype=torch.float64).cpu() for score in scores.values()])
        total = float(sum_over_shards(sums.sum(), sharded=self._sharded))
        if total == 0:
            raise RPSAError(
                "every Fisher score is zero: nothing would be penalised; check the labels of D_ref"
            )
        mean = total / sum(self.parameters[name].numel() for name in scores)
        return {name: score / mean for name, score in scores.items()}

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient: once a step, on the complete gradient, before clipping."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue  # the optimizer does not move it
            pull = local(parameter) - self._start[name]
            if self._weights is not None:
                pull *= self._weights[name]
            local(parameter.grad).add_(pull, alpha=self.strength)

    @torch.no_grad()
    def loss(self) -> float:
        """The penalty's value; of a sharded model all ranks must ask for it."""
        sums = []
        for name, parameter in self.parameters.items():
            squares = (local(parameter) - self._start[name]).double().square()
            if self._weights is not None:
                squares *= self._weights[name]
            sums.append(squares.sum().cpu())
        return self.strength / 2 * float(sum_over_shards(torch.stack(sums).sum(), sharded=self._sharded))
