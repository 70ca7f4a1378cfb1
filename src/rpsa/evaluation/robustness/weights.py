"""Attacks on weights that need no data: pruning, quantisation, and merging back towards the base.

They act on the matrices of linear layers, but for the head, and on a LoRA model once its adapter is merged.
"""

from collections.abc import Iterator, Mapping
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from rpsa.alternatives.after_training import interpolate


def linear_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The matrices (out, in) of a model's linear layers by name; not of its head, which is no part of a layer."""
    whole: Any = model
    head = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield f"{name}.weight", module.weight


@torch.no_grad()
def prune(model: nn.Module, ratio: float) -> None:
    """Set the `floor(ratio n)` smallest magnitudes of each matrix's n elements to 0, in place (Wei et al., 2024)."""
    for _, weight in linear_weights(model):
        count = floor(ratio * weight.numel())
        smallest = weight.abs().flatten().topk(count, largest=False).indices
        weight.view(-1)[smallest] = 0


@torch.no_grad()
def quantise(model: nn.Module, bits: int, group: int | None = None) -> None:
    """Round each matrix to the nearest of `2^bits - 1` even steps about 0, in place and in its own dtype.

    What a model is served with after symmetric round-to-nearest quantisation of its weights; activations stay as they
    are.

    Args:
        group: inputs that share a scale, the last of a row may be fewer; None: all of an output channel.
    """
    for _, weight in linear_weights(model):
        for part in torch.split(weight, group or weight.shape[1], dim=1):
            part.copy_(_rounded(part, bits))


def _rounded(part_OI: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    exact = part_OI.float()
    scale = exact.abs().amax(dim=1, keepdim=True) / most
    steps = (exact / scale).round().nan_to_num(0.0)  # a group of zeros has no scale
    rounded: Tensor = (steps * scale).to(part_OI.dtype)
    return rounded


def merge(model: nn.Module, base: Mapping[str, Tensor], weight: float) -> None:
    """w <- base + weight (w - base), in place: 1 is the model as it is, 0 the base, both to the bit.

    Args:
        base: from `rpsa.alternatives.after_training.starting_weights`.
    """
    model.requires_grad_(True)  # of a merged adapter's model nothing trains
    interpolate(model, base, weight)
