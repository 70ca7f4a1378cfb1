"""What may spread training over several processes: DDP and FSDP2; the rest is refused before any work is done."""

from collections.abc import Mapping
from typing import Any

from rpsa.errors import RPSAError

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
