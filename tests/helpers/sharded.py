"""Sharding on CPUs: a plain loop's model and batches, and accelerate's FSDP2."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from helpers.rank_runs import sequences
from rpsa.sharding import rank, world_size

STEPS = 6
GLOBAL_BATCH = 16


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module)
    return fully_shard(model)


def batches(seed: int) -> torch.Tensor:
    rows = [row for row in sequences(1000, seed) if len(row) >= 8][: STEPS * GLOBAL_BATCH]
    return torch.tensor([row[:8] for row in rows]).view(STEPS, GLOBAL_BATCH, 8)


def accumulate(model: Any, batch: torch.Tensor, accumulation: int) -> None:
    for number in range(accumulation):
        if dist.is_initialized():
            model.set_requires_gradient_sync(number == accumulation - 1)
        part = batch.chunk(accumulation * world_size())[number * world_size() + rank()]
        (model(input_ids=part, labels=part).loss / accumulation).backward()


def shard_on_cpus() -> None:
    """accelerate leaves FSDP out on a CPU without a word; everything after that decision is what runs on GPUs."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.distributed_type = DistributedType.FSDP
        if getattr(self, "fsdp_plugin", None) is None:
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                state_dict_type="SHARDED_STATE_DICT",
                cpu_ram_efficient_loading=False,
            )

    AcceleratorState.__init__ = init
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
