"""Counting what would make a GPU wait for the host, on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount")


class Waits(TorchDispatchMode):
    """Counts what would make a GPU's queue run dry: values read on the host, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        is_boolean = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        self.count += is_boolean or name in _READS
        return func(*args, **(kwargs or {}))
