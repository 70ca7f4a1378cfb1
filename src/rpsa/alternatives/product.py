"""Penalty on a LoRA adapter's update B A, as if the weight itself moved: EWC-LoRA (Zheng et al., 2026).

Only the product changes the model. A penalty on A and B apart is another one for every way to write the same product,
and weighs them by the Fisher at a start where that of A is 0.

Shapes: a base weight W is (out, in), A is (r, in), B is (out, r).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal, origin_of
from rpsa.parameters import canonical_name, trainable_parameters
from rpsa.settings import PENALTY_STRENGTH, check
from rpsa.sharding import is_sharded

_PEFT = "base_model.model."
"""What PEFT puts in front of the names of the model that it wraps."""


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one linear layer: scaling * B A. `a` and `b` are the names of A and B."""

    layer: Any
    adapter: str
    a: str
    b: str

    @property
    def A(self) -> Tensor:
        return self.layer.lora_A[self.adapter].weight  # type: ignore[no-any-return]

    @property
    def B(self) -> Tensor:
        return self.layer.lora_B[self.adapter].weight  # type: ignore[no-any-return]

    @property
    def scaling(self) -> float:
        """As PEFT works it out: from alpha, the rank, and the kind (rsLoRA)."""
        return float(self.layer.scaling[self.adapter])


def lora_updates(model: nn.Module) -> dict[str, Update]:
    """The trained update of each adapted linear layer, by its base weight's name in the model without the adapter.

    Raises:
        RPSAError: the model has no LoRA adapter, or trains anything but one A and one B of linear layers (DoRA,
            biases, embeddings, convolutions, several adapters, whole modules).
    """
    trained = trainable_parameters(model)
    found: dict[str, Update] = {}
    for path, layer in model.named_modules():
        if not isinstance(getattr(layer, "base_layer", None), nn.Linear):
            continue
        name = canonical_name(f"{path}.weight").removeprefix(_PEFT)
        for adapter in getattr(layer, "lora_A", {}):
            a, b = (canonical_name(f"{path}.lora_{which}.{adapter}.weight") for which in "AB")
            if a in trained and b in trained and name not in found and not getattr(layer, "lora_variant", {}):
                found[name] = Update(layer, adapter, a, b)
    if not any("lora_" in name for name in trained):
        raise RPSAError(
            "penalty 'product' is for a LoRA adapter on linear layers, and none is trained: use penalty 'fisher'"
        )
    known = {part for update in found.values() for part in (update.a, update.b)}
    if other := next((name for name in trained if name not in known), ""):
        raise RPSAError(
            f"penalty 'product' is for one LoRA adapter, plain and on linear layers alone, and {other!r} is trained: "
            "leave other adapters, use_dora, biases and modules_to_save out, or use penalty 'fisher'"
        )
    return found


class ProductPenalty:
    """Pulls a LoRA adapter's update back to where it started, the harder the more reasoning depends on the weight.

    Its loss is strength / 2 * sum_ij w_ij dW_ij^2, with dW = scaling * (B A - B* A*) for each adapted linear layer and
    w the Fisher of the layer's own weight, as full fine-tuning measures it, over its mean (of all adapted weights).
    Another A and B with the same product have the same loss. dW is made for one layer at a time; the Fisher of all
    adapted weights is in memory, in fp32.

        penalty = ProductPenalty(model, starting_weights(model), fisher)
        ...
        loss.backward(); penalty.add_gradients(); clip_grad_norm_(...); optimizer.step()

    Args:
        start: A* and B*, as `starting_weights` has them; kept, not copied.
        fisher: of the model without the adapter; it may score more than the adapted weights.
        strength: not negative. Too large a one for the learning rate makes training diverge.

    Raises:
        RPSAError: as `lora_updates` and `check_base`; the model is sharded; the Fisher of the adapted weights is zero
            throughout; the strength is impossible.
    """

    def __init__(
        self,
        model: nn.Module,
        start: dict[str, Tensor],
        fisher: FisherDiagonal,
        strength: float = PENALTY_STRENGTH.default,
    ) -> None:
        check(PENALTY_STRENGTH, strength, "strength")
        self.strength = strength
        self.updates = lora_updates(model)
        if is_sharded(trainable_parameters(model)):
            raise RPSAError(
                "penalty 'product' is not for sharded models (FSDP2): use DDP, or penalty 'fisher'"
            )
        check_base(fisher, model)
        self._start = start
        self._weights = self._over_mean(fisher)

    def _over_mean(self, fisher: FisherDiagonal) -> dict[str, Tensor]:
        scores = {name: fisher[name].to(update.A.device) for name, update in self.updates.items()}
        total = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
        if total == 0:
            raise RPSAError(
                "every Fisher score of the adapted weights is zero: nothing is penalised; check the labels of D_ref"
            )
        mean = total / sum(score.numel() for score in scores.values())
        return {name: score / mean for name, score in scores.items()}

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient: once a step, on the complete gradient, before clipping."""
        for update, moved, weights in self._moved():
            pull = (weights * moved).mul_(self.strength * update.scaling)
            a, b = update.A, update.B
            if a.grad is not None:
                a.grad.add_((b.to(pull).T @ pull).to(a.grad))
            if b.grad is not None:
                b.grad.add_((pull @ a.to(pull).T).to(b.grad))

    @torch.no_grad()
    def loss(self) -> float:
        """The penalty's value."""
        sums = [(weights * moved.double().square()).sum() for _, moved, weights in self._moved()]
        return self.strength / 2 * float(torch.stack(sums).sum())

    def _moved(self) -> Iterator[tuple[Update, Tensor, Tensor]]:
        """Of one layer after the other: dW and w, (out, in), in float32 (float64 for float64 adapters)."""
        for name, update in self.updates.items():
            dtype = torch.promote_types(update.A.dtype, torch.float32)
            a, b, first_a, first_b = (
                part.to(dtype) for part in (update.A, update.B, self._start[update.a], self._start[update.b])
            )
            moved = b @ a
            if bool(first_b.any()):
                moved -= first_b @ first_a
            yield update, moved.mul_(update.scaling), self._weights[name]


def check_base(fisher: FisherDiagonal, model: nn.Module) -> None:
    """Raise RPSAError unless `fisher` was measured on the weights that `model` adapts: names, shapes, values."""
    bases: dict[str, Tensor] = {}
    for name, update in lora_updates(model).items():
        shape = (update.layer.out_features, update.layer.in_features)
        if name not in fisher:
            raise RPSAError(
                f"penalty 'product' needs the Fisher of the model without its adapter, and this one has no scores of "
                f"{name!r}: measure it on the whole model, with a scope that has all adapted weights, and leave tied "
                "weights without an adapter"
            )
        if fisher.scores[name].shape != shape:
            raise RPSAError(
                f"this Fisher does not fit the model: {name!r} has scores of shape {tuple(fisher.scores[name].shape)}, "
                f"the weight is {shape}"
            )
        bases[name] = update.layer.base_layer.weight
    manifest: Mapping[str, Any] = fisher.manifest
    if not manifest.get("any_weights") and origin_of(manifest.get("weights", {}), bases) != "same":
        raise RPSAError(
            "this Fisher was measured on other weights than the adapter's base: estimate it on these, or say that you "
            "mean it: fisher.for_any_weights()"
        )
