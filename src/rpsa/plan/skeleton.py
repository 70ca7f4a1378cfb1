"""A recipe's models without their weights: built from a config, of fake tensors that have a size and no storage."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpsa.errors import RPSAError
from rpsa.pipeline.models import location
from rpsa.recipe.sections import Model


def load_config(name: str, model: Model) -> Any:
    """The `transformers` config of a model in a recipe.

    Raises:
        RPSAError: it is neither here nor to be had, or is broken.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            location(name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if Path(location(name)).is_dir():
            said = str(error).strip().partition("\n")[0]
            raise RPSAError(f"model {name}: its config cannot be loaded: {said}") from error
        raise RPSAError(
            f"model {name}: its config is not on this machine and cannot be fetched; run "
            f"`hf download {name} config.json` where there is a network, or name a folder with that file "
            f"(model.name=FOLDER)"
        ) from error


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within, every operation gives a result of the right shape and dtype, and computes nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def build_model(config: Any, dtype: str, lora: Mapping[str, Any] | None = None) -> Any:
    """A causal language model, under a LoRA adapter if `lora` has LoraConfig fields. Call it in `fake_tensors`.

    `dtype` is a torch dtype's name, or "auto" for the checkpoint's own.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(config, dtype))
        if lora:
            from peft import LoraConfig, get_peft_model

            try:
                model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
            except ValueError as error:
                raise RPSAError(f"lora: {str(error).strip().splitlines()[0]}") from error
    _leave_meta(model)
    return model


def torch_dtype(config: Any, dtype: str) -> torch.dtype:
    if dtype == "auto":
        return config.dtype or torch.float32
    result: torch.dtype = getattr(torch, dtype)
    return result


def _leave_meta(model: nn.Module) -> None:
    """Put CPU tensors in the place of meta ones, which autocast does not know; what was shared stays shared."""
    moved: dict[int, Tensor] = {}
    originals = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    originals.append(tensor)  # an id is unique while its tensor lives
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = moved[id(tensor)]  # type: ignore[assignment]
