"""Removal of the refusal direction (Arditi et al., 2024): a model that cannot write it cannot refuse by it.

r is the normalised difference of the mean residual activations on harmful and on harmless prompts, at the last token of
the prompt. Every matrix that writes into the residual stream (embeddings, `o_proj`, `down_proj`) becomes
W' = (I - r r^T) W, and their biases likewise, so that r^T W' = 0: of a model whose layers write without a norm behind
them (Llama, Qwen, Mistral) no prompt can bring r about.

It need not raise attack success: where harmless prompts lie far on the other side of 0, all prompts come to lie nearer
to the harmful ones, and the model refuses more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rpsa.errors import RPSAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRITERS = ("o_proj", "down_proj")
"""What a layer's linear modules are called that write into the residual stream."""


@dataclass(frozen=True)
class RefusalDirection:
    """A unit vector (d,) in float64, after how many layers it was read, and how far it separates prompts there."""

    vector: Tensor
    layer: int
    separation: float


def refusal_direction(
    model: "PreTrainedModel", harmful: Sequence[list[int]], harmless: Sequence[list[int]]
) -> RefusalDirection:
    """The direction of the layer at which it separates best what it was not made from.

    A first half of the prompts gives each layer a direction. Its separation is the difference of the means of the other
    half's projections onto it over their pooled standard deviation. The layer with the largest is taken, and its
    direction made from all prompts. Not asked is what comes after the last layer, where no layer would read it.

    Args:
        harmful, harmless: rendered prompts as token ids, at least 4 of each.

    Raises:
        RPSAError: there are fewer.
    """
    if min(len(harmful), len(harmless)) < 4:
        raise RPSAError("a refusal direction needs at least 4 harmful and 4 harmless prompts: give more")
    bad_LND, good_LND = residuals(model, harmful), residuals(model, harmless)
    layers = [_separation(bad, good) for bad, good in zip(bad_LND, good_LND, strict=True)]
    best = max(range(len(layers)), key=layers.__getitem__)
    return RefusalDirection(_direction(bad_LND[best], good_LND[best]), best + 1, layers[best])


def _direction(bad_ND: Tensor, good_ND: Tensor) -> Tensor:
    difference = bad_ND.mean(0) - good_ND.mean(0)
    r: Tensor = difference / difference.norm()
    return r


def _separation(bad_ND: Tensor, good_ND: Tensor) -> float:
    r = _direction(bad_ND[0::2], good_ND[0::2])
    bad, good = bad_ND[1::2] @ r, good_ND[1::2] @ r
    spread = ((bad.var() + good.var()) / 2).sqrt()
    return float((bad.mean() - good.mean()) / spread)


@torch.inference_mode()
def residuals(model: "PreTrainedModel", prompts: Sequence[list[int]]) -> Tensor:
    """(L - 1, N, d) float64: the residual stream at each prompt's last token behind all layers but the last."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        rows.append(torch.stack([state[0, -1].double() for state in states[1:-1]]))
    return torch.stack(rows, dim=1)


@torch.no_grad()
def remove_direction(model: "PreTrainedModel", r: Tensor) -> None:
    """Take `r` (d,) out of everything that writes into the residual stream, in place; products are in float64.

    Tied embeddings are untied: the head only reads.

    Raises:
        RPSAError: a layer has no linear modules called `WRITERS`.
    """
    r = r.to(model.device, torch.float64)
    embeddings = _untied(model)
    # HF stores a linear layer (out, in), so r^T W takes the first dimension; an embedding (tokens, d), so the last
    _take_out(embeddings.weight.data.T, r)
    for name, layer in _layers(model):
        writers = [m for n, m in layer.named_modules() if n.rpartition(".")[2] in WRITERS]
        if len(writers) < len(WRITERS) or not all(isinstance(one, nn.Linear) for one in writers):
            raise RPSAError(
                f"direction: {name} has no linear {' and '.join(WRITERS)}, by which the refusal direction is taken "
                "out; leave this attack out for this architecture"
            )
        for module in writers:
            _take_out(module.weight.data, r)
            if module.bias is not None:
                _take_out(module.bias.data[:, None], r)


def _take_out(weight_DI: Tensor, r: Tensor) -> None:
    exact = weight_DI.double()
    weight_DI.copy_(exact - torch.outer(r, r @ exact))


def _untied(model: Any) -> Any:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return embeddings


def _layers(model: Any) -> list[tuple[str, nn.Module]]:
    """The decoder's layers: the longest list of modules that a model has."""
    lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]
    name, layers = max(lists, key=lambda found: len(found[1]))
    return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]
