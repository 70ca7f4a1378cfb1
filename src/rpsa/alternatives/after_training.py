"""After training: of a model that was fine-tuned without any care, go back part of the way."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.parameters import trainable_parameters
from rpsa.settings import INTERPOLATION, check
from rpsa.sharding import local, on_any_rank, shard_like


def starting_weights(model: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """A copy of the trainable parameters as they are now, by name; of a sharded model, of this rank's shards.

    Args:
        device: where it is kept; by default where the parameters are.
    """
    return {
        name: local(parameter.detach()).to(device or parameter.device, copy=True)
        for name, parameter in trainable_parameters(model).items()
    }


@torch.no_grad()
def interpolate(model: nn.Module, start: Mapping[str, Tensor], weight: float) -> None:
    """theta <- theta* + weight (theta - theta*), in place (WiSE-FT: Wortsman et al., 2022).

    A LoRA adapter's A stays as it is trained: where B starts at 0, it is the update B A that is scaled.

    Args:
        start: theta*, from `starting_weights`.
        weight: 0 is the model before training, 1 the trained one.

    Raises:
        RPSAError: the weight is not between 0 and 1; and as `check_start`.
    """
    check(INTERPOLATION, weight, "weight")
    check_start(start)
    for name, parameter in trainable_parameters(model).items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            weights = local(parameter)
            weights.copy_(torch.lerp(start[name].to(weights), weights, weight))


def check_start(start: Mapping[str, Tensor]) -> None:
    """Raise RPSAError if a LoRA adapter does not start at B = 0; of a sharded model all ranks must ask."""
    if on_any_rank(any(bool(weights.any()) for name, weights in start.items() if "lora_B" in name)):
        raise RPSAError(
            "interpolation scales a LoRA adapter's update B A, and this one does not start at B = 0: leave "
            "init_lora_weights and fisher.warmup_steps at their defaults"
        )


@torch.no_grad()
def restore(model: nn.Module, start: Mapping[str, Tensor], fisher: FisherDiagonal, ratio: float) -> None:
    """Put the elements that `fisher.mask(ratio)` freezes back to their starting values, in place.

    What freezing would have kept, of a training that did not know of it.

    Args:
        start: from `starting_weights`.
        ratio: k, the share of the elements with non-zero Fisher.

    Raises:
        RPSAError: the Fisher is another model's.
    """
    fisher.check_related(model)
    parameters = trainable_parameters(model)
    for name, trainable in fisher.mask(ratio).items():
        weights = local(parameters[name])
        keep = shard_like(trainable, parameters[name])
        weights.copy_(torch.where(keep, weights, start[name].to(weights)))
