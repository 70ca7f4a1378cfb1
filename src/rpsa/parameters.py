"""Parameters: their names and identities, shared by the Fisher and by everything that freezes."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpsa.sharding import full, without_ddp

_LEADING_WRAPPER = re.compile(r"^(module\.)+")
_INNER_WRAPPER = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

_SAMPLED_ELEMENTS = 4096


def canonical_name(name: str) -> str:
    """A parameter's name without what DDP, `torch.compile` and checkpoint wrappers put in front of it."""
    return _INNER_WRAPPER.sub("", _LEADING_WRAPPER.sub("", name))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer will see, by canonical name; a tied weight appears once."""
    return {canonical_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def fingerprint(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes and up to 4,096 evenly spaced values of each tensor.

    Values are read as float32, so a bf16 checkpoint loaded in fp32 keeps its fingerprint. Of a sharded model all
    ranks must ask for it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(dict(tensors).items()):
        values = full(tensor.detach()).flatten()
        stride = max(1, values.numel() // _SAMPLED_ELEMENTS)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values[::stride].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def elements(parameter: Tensor) -> int:
    """How many there are, also of weights of which bitsandbytes stores two in a byte."""
    is_4bit = type(parameter).__name__ == "Params4bit" and parameter.dtype in (torch.uint8, torch.bfloat16)
    return parameter.numel() * (2 * parameter.element_size() if is_4bit else 1)


def keep_four_bits(model: nn.Module) -> None:
    """Let 4-bit weights stay as they are on a CPU, too.

    bitsandbytes packs them anew where a CPU has AVX512-BF16 and the model is in evaluation mode: their scales are
    rounded to bfloat16 for good, and gradients no longer pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def module_group(name: str) -> str:
    """The role of a parameter, whatever its layer: `model.layers.3.mlp.up_proj.weight` -> `up_proj`."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in _TRIVIAL] or [name]
    if parts[-1].startswith("lora_"):
        return ".".join(parts[-2:])
    return parts[-1]


_TRIVIAL = {"weight", "bias", "default", "base_layer", "modules_to_save", "original_module"}


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Within, a PEFT model is its base. What has a gradient stays as it is, which PEFT does not care for."""
    model = without_ddp(model)
    if not hasattr(model, "peft_config"):
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
