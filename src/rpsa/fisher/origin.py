"""Which weights a Fisher was measured on, known by a few of them: F of one model says nothing of another.

A hash tells the same from the different. These tell also a model after some training, or in another dtype, from one
that has nothing to do with it.
"""

import base64
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rpsa.sharding import full

Origin = Literal["same", "trained", "other"]
"""The weights that were measured, in whatever dtype; a state that training may have brought them to; none of both."""

Sampled = Mapping[str, tuple[str, str]]
"""Parameter name -> dtype, and some of its values: float32 in base64."""

_VALUES = 1 << 13
_DEVIATIONS = 6.0


def sampled_weights(parameters: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Some evenly spaced values of each parameter, JSON-able; of a sharded model all ranks must ask for them.

    Some 8,000 in all, at least 4 a parameter. What is not made of numbers (quantised) or not there (meta) is left out.
    """
    each = max(4, min(256, _VALUES // max(1, len(parameters))))
    return {
        name: (str(p.dtype).removeprefix("torch."), _encoded(_values(p, each)))
        for name, p in parameters.items()
        if p.is_floating_point() and not p.is_meta
    }


def origin_of(sampled: Sampled, parameters: Mapping[str, Tensor]) -> Origin:
    """What `parameters` are to the weights of which `sampled_weights` took some.

    Trained weights are known by their correlation with what they were, or by elements that never moved: there
    always are some where frozen ones are exactly frozen. Two models have neither in common. Parameters that have
    another shape, and those that are constant (norms at their start), say nothing.
    """
    pairs = []
    for name, (dtype, text) in sampled.items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.is_floating_point() or parameter.is_meta:
            continue
        before = _decoded(text)
        pairs.append(
            (before, _values(parameter, len(before)), dtype == str(parameter.dtype).removeprefix("torch."))
        )
    if all(_is_same(*pair) for pair in pairs):
        return "same"
    varied = [(a, b) for a, b, _ in pairs if len(a) > 1 and a.std() > 0]
    if not varied:
        return "trained"
    before, now = (torch.cat([_standardised(pair[i]) for pair in varied]) for i in (0, 1))
    equal = torch.cat([a == b for a, b in varied]).double().mean()
    chance = min(0.5, _DEVIATIONS / len(before) ** 0.5)
    return "trained" if float((before * now).mean()) > chance or float(equal) > 0.05 else "other"


def _values(parameter: Tensor, count: int) -> Tensor:
    flat = full(parameter.detach()).flatten()
    places = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].to("cpu", torch.float32)


def _is_same(before: Tensor, now: Tensor, same_dtype: bool) -> bool:
    if len(before) != len(now):
        return True  # quantised, or laid out in another way: not to be compared
    # rounding to bfloat16 changes a value by up to 2^-9 of it
    return torch.equal(before, now) if same_dtype else torch.allclose(before, now, rtol=2**-8, atol=1e-7)


def _standardised(values: Tensor) -> Tensor:
    centred = values.double() - values.double().mean()
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 0 else centred


def _encoded(values: Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
