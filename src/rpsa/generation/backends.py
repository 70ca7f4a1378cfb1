"""Backends: which one generates here, and how to make it."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rpsa.errors import RPSAError
from rpsa.generation import Generator
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rpsa.generation.server import ServerConfig

logger = logging.getLogger(__name__)

Backend = Literal["transformers", "vllm", "server"]


@dataclass(frozen=True)
class BackendConfig:
    """`backend` "auto": the server if one is given, else vLLM where it is installed with a GPU, else transformers.

    `batch_size` is for transformers, `engine` (arguments of `vllm.LLM`) for vLLM, `server` for a server.
    """

    backend: Literal["auto"] | Backend = "auto"
    batch_size: int = 16
    engine: Mapping[str, Any] = field(default_factory=dict)
    server: "ServerConfig | None" = None


def choose_backend(config: BackendConfig) -> Backend:
    """The backend that `config` comes to on this machine. Without vLLM installed, transformers stands in for it.

    Raises RPSAError for backend "server" without a server.
    """
    if config.backend == "auto":
        if config.server is not None:
            return "server"
        return "vllm" if _is_installed("vllm") and has_gpu() else "transformers"
    if config.backend == "server" and config.server is None:
        raise RPSAError("backend 'server' without a server: give its url and the model's name there")
    if config.backend == "vllm" and not _is_installed("vllm"):
        logger.warning(
            "vLLM is not installed (pip install 'rpsa[vllm]'): generating with transformers, slower"
        )
        return "transformers"
    return config.backend


def make_generator(
    config: BackendConfig,
    model: str,
    tokenizer: "PreTrainedTokenizerBase",
    load: Callable[[str], "PreTrainedModel"],
    thought: ThoughtFormat | None = None,
) -> Generator:
    """A generator for the model in folder (or with hub id) `model`, adapters merged.

    `load(model)` is called for the transformers backend only; `thought` is as for `ResponseDecoder`. Raises
    RPSAError as the backend does.
    """
    backend = choose_backend(config)
    if backend == "server":
        from rpsa.generation.server import ServerGenerator

        assert config.server is not None
        return ServerGenerator(config.server, tokenizer, thought)
    if backend == "vllm":
        from rpsa.generation.vllm import VLLMGenerator, data_parallel_size

        if data_parallel_size(config.engine) > 1:
            from rpsa.generation.vllm import VLLMServerGenerator

            return VLLMServerGenerator(model, tokenizer, config.engine, thought)
        return VLLMGenerator(model, tokenizer, config.engine, thought=thought)
    from rpsa.generation.transformers import TransformersGenerator

    return TransformersGenerator(load(model), tokenizer, config.batch_size, thought)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
