"""Sharding: parameters over several ranks, as DDP and FSDP2 spread them; other ways are refused before any work.

Under FSDP2 a parameter is a DTensor, of which each rank has a shard. Everything that `fisher` and `freezing` do element
by element is done on the local shard; everything global (the threshold, the conflict, the number of frozen elements) is
a count, and counts are summed over ranks.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rpsa.errors import RPSAError


def is_dtensor(tensor: Any) -> bool:
    # importing the module takes a second, and a program that has a DTensor has imported it
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Whether `parameters` (by name) are spread over the ranks as FSDP2 does it.

    Raises:
        RPSAError: only some of them are, or in another way (tensor parallel, HSDP), so that summed counts
            would be wrong.
    """
    sharded = [name for name, parameter in parameters.items() if is_dtensor(parameter)]
    if sharded and len(sharded) < len(parameters):
        whole = next(name for name in parameters if name not in sharded)
        raise RPSAError(
            f"{sharded[0]!r} is sharded and {whole!r} is not: wrap the whole model with fully_shard"
        )
    for name in sharded:
        mesh, placements = parameters[name].device_mesh, parameters[name].placements  # type: ignore[attr-defined]
        if mesh.ndim != 1 or mesh.size() != world_size() or not placements[0].is_shard():
            raise RPSAError(
                f"{name!r} is laid out as {placements} on a mesh of {tuple(mesh.shape)}: only FSDP2 over all "
                "ranks is supported; use fully_shard on one mesh, without tensor, pipeline or hybrid parallelism"
            )
    return bool(sharded)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing storage; a plain tensor is its own shard."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; all ranks must ask for it where it is sharded."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, on the device of `parameter`.

    A sharded tensor must have the layout of `parameter`.
    """
    if not is_dtensor(parameter):
        return full(tensor).to(parameter.device)
    if is_dtensor(tensor):
        return local(tensor)
    dim, start, length = shard_range(parameter)
    # a copy, as a view would keep the whole tensor alive
    return tensor.narrow(dim, start, length).to(parameter.device, copy=True).contiguous()


def shard_range(parameter: Tensor) -> tuple[int, int, int]:
    """Where this rank's shard lies in a sharded parameter: dimension, start, length."""
    mesh, (placement,) = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    dim = placement.dim % parameter.ndim
    size = parameter.shape[dim]
    most = -(-size // mesh.size())  # as torch.chunk does: the last ranks may have less, or nothing
    start = min(size, most * mesh.get_local_rank())
    return dim, start, min(most, size - start)


def reduce_to_shard(part: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of the sum over ranks of `part`, which has the full shape of a sharded parameter."""
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    summed = DTensor.from_local(part, mesh, [Partial()], run_check=False)
    return summed.redistribute(placements=parameter.placements).to_local()


def as_sharded(shard: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which `shard` is this rank's part, laid out as `parameter` is."""
    if not is_dtensor(parameter):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def sum_over_shards(counts: Tensor, *, sharded: bool) -> Tensor:
    """Counts or sums over all ranks' shards; unsharded, they are complete as they are."""
    return all_reduce(counts) if sharded else counts


# Ranks


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(tensor: Tensor, operation: str = "SUM") -> Tensor:
    """Over all ranks, on a device that their backend serves; the result may be on another device."""
    if world_size() > 1:
        if tensor.device.type == "cpu" and "cpu:" not in dist.get_backend_config():
            tensor = tensor.to("cuda")
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


# Wrapped models


def without_ddp(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, whose hooks would average gradients over ranks."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def unsharded_type(module: nn.Module) -> type[nn.Module]:
    """A module's class; `fully_shard` puts a subclass of its own in its place."""
    bases = type(module).__bases__
    is_fsdp = bases[0].__module__.startswith("torch.distributed.fsdp")
    return bases[1] if is_fsdp and len(bases) > 1 else type(module)


def reshard(model: nn.Module) -> None:
    """Give up what FSDP2 gathered for a forward pass that no backward pass follows."""
    for module in model.modules():
        if type(module).__bases__[0].__module__.startswith("torch.distributed.fsdp"):
            module.reshard()  # type: ignore[operator]


def on_any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    return bool(all_reduce(torch.tensor(int(flag)), "MAX"))


_PARALLEL = "use DDP or FSDP2 (recipes/accelerate)"
_REFUSED = {
    "DEEPSPEED": "DeepSpeed is not supported: it steps inside backward and hides gradients",
    "MEGATRON_LM": "Megatron-LM is not supported: it shards in ways of its own",
}
_DIMENSIONS = {"TP": "tensor", "PP": "pipeline", "CP": "context", "SP": "sequence", "DP_REPLICATE": "hybrid"}


def refuse_engines(environment: Mapping[str, str]) -> None:
    """Raise RPSAError for an engine that `accelerate launch` has set up and exact freezing would not survive.

    Args:
        environment: what `accelerate launch` gives its processes: `os.environ` in one of them.
    """
    for name, message in _REFUSED.items():
        if _is_set(environment, f"ACCELERATE_USE_{name}"):
            raise RPSAError(f"{message}; {_PARALLEL}")
    if _is_set(environment, "ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION") != "2":
        raise RPSAError("FSDP1 is not supported: it flattens parameters; set fsdp_version: 2")
    for dimension, word in _DIMENSIONS.items():
        if int(environment.get(f"PARALLELISM_CONFIG_{dimension}_SIZE") or 1) > 1:
            raise RPSAError(
                f"{word} parallelism is not supported: it is untested with exact freezing; {_PARALLEL}"
            )


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1")


def refuse_accelerator(accelerator: Any, gpus: int) -> None:
    """Raise RPSAError for hardware and wrappers that exact freezing was never tried on.

    Args:
        accelerator: an `accelerate.Accelerator`.
        gpus: how many of them this one process would use.
    """
    engine = accelerator.distributed_type.name
    if engine not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        raise RPSAError(f"{engine} is not supported; {_PARALLEL}")
    if gpus > 1:
        raise RPSAError(
            f"one process would spread the model over {gpus} GPUs with DataParallel, which is not supported; "
            "start it with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0"
        )


def refuse_model(model: Any, *, has_adapter: bool) -> None:
    """Raise RPSAError if quantised weights themselves would be trained, or tensor parallel ones."""
    if getattr(model, "tp_size", None) not in (None, 1):
        raise RPSAError(f"tensor parallel models are not supported; {_PARALLEL}")
    if getattr(model, "is_quantized", False) and not has_adapter:
        raise RPSAError(
            "quantised base weights cannot be fine-tuned in full: train a LoRA adapter on them (QLoRA), "
            "or load the model in float32"
        )
