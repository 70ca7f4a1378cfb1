"""Models as a recipe names them: located, identified, loaded, and with a LoRA adapter that always starts the same."""

import logging
import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from rpsa.artifacts import (
    METADATA,
    atomic_write,
    package_versions,
    read_json,
    reading,
    sha256_of,
    stable_json,
)
from rpsa.chat import thought_format
from rpsa.checkpoints import load_pretrained
from rpsa.errors import RPSAError
from rpsa.parameters import keep_four_bits
from rpsa.recipe.loading import parse_yaml
from rpsa.recipe.problems import did_you_mean, validation_problems
from rpsa.recipe.schema import Cell
from rpsa.recipe.sections import Model
from rpsa.thought import ThoughtFormat
from rpsa.tiny import tiny_model_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Where in a Fisher's folder the adapter is that it was measured on."""

Backend = Literal["auto", "transformers", "vllm"]
"""What a recipe may ask for."""

_HASHED_WHOLE = 64 << 20


def location(name: str) -> str:
    """The folder or hub id behind a model's name in a recipe (`tiny:0` is shipped)."""
    return str(tiny_model_dir(int(name.removeprefix("tiny:")))) if name.startswith("tiny:") else name


def identity(name: str, model: Model) -> dict[str, Any]:
    """What tells one model from another in a stage's inputs.

    Files over 64 MiB count by size and time of change, others by content; a hub id by its revision.
    """
    folder = Path(location(name))
    kernels = _kernels_identity(model)
    if not folder.is_dir():
        return {"name": name, "revision": model.revision, **kernels}
    files = {path: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return {
        "name": name,
        "files": {
            path.name: _content(path, stat.st_size, stat.st_mtime_ns)
            if stat.st_size <= _HASHED_WHOLE
            else [stat.st_size, stat.st_mtime_ns]
            for path, stat in files.items()
        },
        **kernels,
    }


def _kernels_identity(model: Model) -> dict[str, Any]:
    """No key where there is nothing to tell, as before there was a choice."""
    found: dict[str, Any] = {}
    if model.attn_implementation:
        found["attn_implementation"] = model.attn_implementation
    if model.quantization:
        found |= {"quantization": model.quantization, **package_versions(["bitsandbytes"])}
    return found


def is_trained_in_4_bits(adapter: Path) -> bool:
    """Whether the metadata in an adapter's folder, if ours trained it, say that its base was in 4 bits."""
    path = adapter / METADATA
    content = read_json(path) if path.is_file() else None
    of_base = content.get("base_model") if isinstance(content, dict) else None
    return isinstance(of_base, dict) and of_base.get("quantization") == "4bit"


def generating_backend(model: Model, asked: Backend) -> Backend:
    """4-bit weights are those of bitsandbytes under transformers: vLLM would quantise merged ones, which are others.

    Raises:
        RPSAError: vLLM is asked for.
    """
    if model.quantization is None:
        return asked
    if asked == "vllm":
        raise RPSAError(
            "model.quantization: vLLM would not run the weights that were trained; set backend: transformers"
        )
    return "transformers"


@cache
def _content(path: Path, size: int, changed: int) -> str:
    """Of a file as it was when it had this size and time: a study asks for it again for each of its tasks."""
    return sha256_of(path)


def load_model(name: str, model: Model, dtype: str | None = None) -> "PreTrainedModel":
    """On the GPU if there is one, unless FSDP will put it there shard by shard. `dtype` overrides the recipe's.

    Raises:
        RPSAError: there is no such model, it cannot be read, its checkpoint is not whole, or a package is missing that
            `attn_implementation` or `quantization` needs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_kernels(model)
    settings = attention(model)
    if model.quantization:
        settings |= four_bits(dtype or model.dtype)
    loaded: PreTrainedModel = load_pretrained(
        AutoModelForCausalLM,
        location(name),
        f"model {name}",
        revision=model.revision,
        dtype=dtype or model.dtype,
        trust_remote_code=model.trust_remote_code,
        **settings,
    )
    if model.quantization:
        keep_four_bits(loaded)
        return loaded
    return loaded.to("cuda") if torch.cuda.is_available() and not will_be_sharded() else loaded


def attention(model: Model) -> dict[str, Any]:
    """The argument of `from_pretrained` that chooses it, if the recipe does."""
    return {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}


def four_bits(dtype: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`: NF4 with double quantisation (QLoRA), computed in `dtype`."""
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        ),
        "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    }


def check_kernels(model: Model) -> None:
    """Raise RPSAError if a package is missing that `attn_implementation` or `quantization` needs."""
    from importlib.util import find_spec

    if model.quantization and find_spec("bitsandbytes") is None:
        raise RPSAError("model.quantization: bitsandbytes is not installed (pip install 'rpsa[qlora]')")
    if model.quantization and will_be_sharded():
        raise RPSAError(
            "model.quantization: 4-bit weights are not sharded (FSDP2) here; use one process or DDP"
        )
    name = model.attn_implementation
    if name is None:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    installed = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
    }
    if name in installed and not installed[name]():
        raise RPSAError(
            f"model.attn_implementation: {name} needs the package flash-attn and a GPU; take sdpa or eager"
        )
    if "/" in name:
        if find_spec("kernels") is None:
            raise RPSAError(
                f"model.attn_implementation: {name} needs the package kernels; take sdpa or eager"
            )
    elif name not in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
        valid = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
        raise RPSAError(f"model.attn_implementation: {name!r} is unknown{did_you_mean(name, valid)}")


def will_be_sharded() -> bool:
    """Whether `accelerate launch` has set FSDP up."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def free_memory() -> None:
    """Hand a model's memory back before another is loaded, here or in another process of the same GPU."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def vllm_engine(model: Model, own: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a recipe's model, the recipe's own last.

    Left to itself vLLM takes float16 for the float32 weights that a full fine-tuning saves, and bfloat16 for
    the base, and the two would differ by that too.
    """
    dtype = generation_dtype(model, on_gpu=True)
    known = {"revision": model.revision, "trust_remote_code": model.trust_remote_code, "dtype": dtype}
    return {key: value for key, value in known.items() if value} | dict(own)


def load_tokenizer(name: str, model: Model) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    with reading(f"model {name}: its tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location(name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    return tokenizer


def said_model(thought: str, **settings: Any) -> Model:
    """A recipe's section `model` for a command without a recipe; `thought` is what `--thought` says, in YAML.

    Raises:
        RPSAError: it says nothing that the section could hold.
    """
    try:
        return Model.model_validate({**settings, "thought": parse_yaml(thought, "--thought")})
    except ValidationError as error:
        raise RPSAError(
            f"--thought: {validation_problems(error, Model)[0].removeprefix('thought: ')}"
        ) from None


def thought_of(tokenizer: "PreTrainedTokenizerBase", model: Model) -> ThoughtFormat:
    """How a recipe's model sets its thoughts apart: as the recipe says, or as the chat template does.

    Raises:
        RPSAError: there is no chat template, or it contradicts the recipe.
    """
    said = model.thought
    if isinstance(said, str):
        return thought_format(tokenizer, said)
    return thought_format(tokenizer, ThoughtFormat(said.open, said.close, system=said.system))


def generation_dtype(model: Model, *, on_gpu: bool) -> str:
    """Of the weights while they generate, with any backend."""
    return model.generation_dtype or ("bfloat16" if on_gpu else model.dtype)


def training_dtype(cell_train: Mapping[str, Any], paradigm: str, model: Model) -> str:
    """fp32 master weights; under LoRA the frozen base is bf16 if training is."""
    if "dtype" in model.model_fields_set:
        return model.dtype
    return "bfloat16" if paradigm == "lora" and cell_train.get("bf16") else "float32"


def alignment_dtype(cell: Cell, model: Model) -> str:
    """As `training_dtype`, but compact training, with its fp32 masters, leaves weights as the checkpoint has them."""
    is_compact = cell.align is not None and cell.align.compact
    if (
        is_compact
        and cell.paradigm != "lora"
        and cell.train.get("bf16")
        and "dtype" not in model.model_fields_set
    ):
        return "auto"
    return training_dtype(cell.train, cell.paradigm, model)


def add_adapter(model: "PreTrainedModel", cell: Cell) -> Any:
    """A fresh LoRA adapter, whose random start depends on the cell's seed alone."""
    return fresh_adapter(model, cell.lora, cell.seed)


def fresh_adapter(model: "PreTrainedModel", lora: Mapping[str, Any], seed: int) -> Any:
    """The model with an adapter as fields of PEFT's LoraConfig say; its random start depends on the seed alone."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with reading("lora", "PEFT refuses it"):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def settle_adapter(folder: Path) -> None:
    """Give an adapter's config one order: PEFT writes sets, in another order in each process."""
    path = folder / "adapter_config.json"
    if path.is_file():
        content = read_json(path)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(content.get(name), list):
                content[name].sort()
        atomic_write(path, stable_json(content))


def sharded(model: Any) -> Any:
    """The model as FSDP2 spreads it over the ranks, where `accelerate launch` has set that up; else as it is."""
    import torch
    from accelerate import Accelerator

    from rpsa.sharding import world_size

    if world_size() == 1:
        return model
    accelerator = Accelerator()
    if accelerator.distributed_type.name != "FSDP":
        return model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # accelerate shards a model only together with an optimizer
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained))
    return model


def check_model(name: str, model: Model) -> None:
    """Look at a model's config and at the names and shapes in its files; no weight is loaded.

    Raises:
        RPSAError: `load_model` would raise it.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    check_kernels(model)
    for path in sorted(Path(location(name)).glob("*.safetensors")):
        with reading(str(path)), safe_open(path, "pt"):
            pass
    code: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with reading(f"model {name}"):
        config = AutoConfig.from_pretrained(location(name), **code)
    if getattr(config, "quantization_config", None) or getattr(config, "auto_map", None):
        return  # their code wants the weights
    load_pretrained(
        AutoModelForCausalLM, location(name), f"model {name}", **code, **attention(model), device_map="meta"
    )


def model_config(name: str, model: Model) -> Any:
    """A model's configuration.

    Raises:
        RPSAError: there is no such model.
    """
    from transformers import AutoConfig

    with reading(f"model {name}"):
        return AutoConfig.from_pretrained(
            location(name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def empty_model(name: str, model: Model | None = None) -> "PreTrainedModel":
    """A model's modules and the shapes of its parameters, from its configuration alone.

    Raises:
        RPSAError: there is no such model, or no causal language model has its configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    described = model or Model()
    code = {"trust_remote_code": described.trust_remote_code}
    config = model_config(name, described)
    with reading(f"model {name}"), torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(config, **code)
    return empty


def quiet() -> None:
    """Silence what libraries print about themselves; warnings of ours still come."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
