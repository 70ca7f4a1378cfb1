"""Layers: the peak of a deep model from two shallow ones, which is exact where all layers are alike.

What is alive while a pass is in one layer grows by the same bytes with every layer before it (what the forward pass
has kept) and behind it (the gradients that are there). So the peak in a layer at a fixed distance from the first or the
last one is linear in their number, and the layers between are never above both ends.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rpsa.plan.dry_run import LiveBytes

SHALLOW = (3, 4)
"""Layers of the models that are run: the first and the last one may be special, one between is not."""
_ENDS = 2
"""How many layers, from either end, are looked at."""


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, and what stands for it in dry runs: two shallow ones (none: itself)."""

    model: Any
    shallow: Sequence[Any] = ()

    def peak(self, peak: Callable[[Any], int]) -> int:
        """`peak(model)`: bytes, the most of one or several `LiveBytes` that it counts with."""
        if not self.shallow:
            return peak(self.model)
        return extrapolated_peak(peak, self.shallow, self._layers)

    def size(self, size: Callable[[Any], int]) -> int:
        """`size(model)`: bytes that grow with every layer by the same."""
        if not self.shallow:
            return size(self.model)
        low, high = map(size, self.shallow)
        return low + (high - low) * (self._layers - SHALLOW[0]) // (SHALLOW[1] - SHALLOW[0])

    @property
    def _layers(self) -> int:
        stack = layers_of(self.model)
        assert stack is not None
        return len(stack)


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The stack of a model's layers: its longest list of modules."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len, default=None)


def are_alike(model: nn.Module) -> bool:
    """Whether a model is deeper than the shallow ones, and its layers have the same modules of the same shapes."""
    layers = layers_of(model)
    if layers is None or len(layers) <= max(SHALLOW):
        return False
    if len(set(getattr(_text_config(model.config), "layer_types", None) or [""])) > 1:
        return False
    return len({_structure(layer) for layer in layers}) == 1


def _structure(layer: nn.Module) -> tuple[Any, ...]:
    modules = tuple(type(module) for module in layer.modules())
    return (*modules, *((name, p.shape, p.requires_grad) for name, p in layer.named_parameters()))


def with_layers(config: Any, layers: int) -> Any:
    """A config with so many layers."""
    shallow = copy.deepcopy(config)
    text = _text_config(shallow)
    text.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:layers])
    return shallow


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def extrapolated_peak(peak: Callable[[Any], int], shallow: Sequence[Any], layers: int) -> int:
    """`peak` of a model with so many layers, from models with `SHALLOW` of them.

    Args:
        peak: the most of one or several `LiveBytes` that it counts with, in bytes.
    """
    n, m = SHALLOW
    peaks: list[int] = []
    for low, high in zip(*(_segments(peak, model) for model in shallow), strict=True):
        for (kind, layer, times), least in low.items():
            # as far from the first layer in both models, or from the last
            near = [layer] if layer < _ENDS else []
            near += [layer + m - n] if n - layer <= _ENDS else []
            peaks += [least + (high[kind, other, times] - least) * (layers - n) // (m - n) for other in near]
    return max(peaks)


def _segments(peak: Callable[[Any], int], model: Any) -> list[dict[tuple[str, int, int], int]]:
    stack = layers_of(model)
    assert stack is not None
    watched: list[LiveBytes] = []

    def hook(number: int) -> Callable[..., None]:
        def after(module: nn.Module, given: Any, output: Any) -> None:
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            watched[-1].mark("forward", number)
            if hidden.requires_grad:
                hidden.register_hook(lambda _: watched[-1].mark("backward", number))  # type: ignore[no-untyped-call]

        return after

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(stack)]
    LiveBytes.watched = watched
    try:
        peak(model)
    finally:
        LiveBytes.watched = None
        for handle in handles:
            handle.remove()
    for live in watched:
        live.mark("end", 0)
    return [live.segments for live in watched]
