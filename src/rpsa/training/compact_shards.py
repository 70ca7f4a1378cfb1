"""Checkpoints of compact training under FSDP2: each rank writes its masters and their state, unknown to accelerate."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_model
from transformers.trainer import SCHEDULER_NAME

from rpsa.errors import RPSAError
from rpsa.sharding import rank, world_size


def save_shards(model: Any, optimizer: Any, scheduler: Any, folder: Path, accelerator: Any) -> None:
    """Write the model as accelerate does, and beside it this rank's part of the optimizer; all ranks' work."""
    plugin = accelerator.state.fsdp_plugin
    save_fsdp_model(plugin, accelerator, model, str(folder), adapter_only=True)
    torch.save(optimizer.state_dict(), _path(folder))
    if rank() == 0:
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_shards(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Read what `save_shards` wrote beside the model.

    Raises:
        RPSAError: another number of ranks has written it.
    """
    if not _path(folder).is_file():
        raise RPSAError(
            f"checkpoint {folder}: compact training under FSDP2 goes on with as many processes as it began with, "
            f"and {world_size()} is another number"
        )
    optimizer.load_state_dict(torch.load(_path(folder), map_location="cpu", weights_only=True))
    scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True))


def _path(folder: Path) -> Path:
    return folder / f"compact-{rank()}-of-{world_size()}.pt"
