"""Subjects of an evaluation: a folder, a hub id, an adapter, a shipped base, or a server."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import read_json, sha256_of
from rpsa.checkpoints import load_adapter
from rpsa.errors import RPSAError
from rpsa.evaluation.run import Subject
from rpsa.generation import Generator
from rpsa.generation.backends import BackendConfig, choose_backend, has_gpu, make_generator
from rpsa.models import (
    free_memory,
    generation_dtype,
    identity,
    load_model,
    load_tokenizer,
    location,
    thought_of,
    vllm_engine,
)
from rpsa.provenance import RESPONSES, sources, versions
from rpsa.recipe.problems import source_problem
from rpsa.recipe.sections import Evaluate, Model
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_subject(name: str, model: Model, settings: Evaluate) -> Subject:
    """A model or an adapter by its folder, hub id or shipped name."""
    base = adapter_base(name)
    key = sha256_of([identity(one, model) for one in (name, base) if one])
    return make_subject(key, base or name, name if base else None, model, settings)


def make_subject(key: str, base: str, adapter: str | None, model: Model, settings: Evaluate) -> Subject:
    tokenizer = load_tokenizer(_tokenizer_home(base, adapter), model)
    thought = thought_of(tokenizer, model)
    engine = vllm_engine(model, settings.engine)
    config = BackendConfig(settings.backend, settings.batch_size, engine)
    backend = choose_backend(config)
    dtype = generation_dtype(model, on_gpu=has_gpu())
    made_by = [
        key,
        backend,
        engine if backend == "vllm" else dtype,
        versions(RESPONSES),
        sources(RESPONSES),
        thought.to_json(),
    ]

    def generator() -> Generator:
        if adapter and backend == "vllm":
            return _merged_for_vllm(config, base, adapter, model, tokenizer, thought)
        return make_generator(
            config,
            location(base),
            tokenizer,
            lambda _: loaded_to_generate(base, adapter, model, dtype),
            thought,
        )

    return Subject(sha256_of(made_by), tokenizer, generator, thought)


def _tokenizer_home(base: str, adapter: str | None) -> str:
    """PEFT saves an adapter without its tokenizer."""
    if adapter and (Path(location(adapter)) / "tokenizer_config.json").is_file():
        return adapter
    return base


def loaded_to_generate(base: str, adapter: str | None, model: Model, dtype: str) -> "PreTrainedModel":
    """The model that an evaluation asks, an adapter merged; `dtype` is `generation_dtype`'s."""
    import torch

    if adapter is None:
        return load_model(base, model, dtype)
    merged = _merged(base, adapter, model)
    return merged if dtype == "auto" else merged.to(getattr(torch, dtype))


def _merged(base: str, adapter: str, model: Model) -> "PreTrainedModel":
    """Added up in the recipe's own dtype: in bf16 a small update of the weights would be rounded away."""
    with_adapter = load_adapter(load_model(base, model), location(adapter), f"adapter {adapter}")
    merged: PreTrainedModel = with_adapter.merge_and_unload()
    return merged


def _merged_for_vllm(
    config: BackendConfig,
    base: str,
    adapter: str,
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    thought: ThoughtFormat,
) -> Generator:
    """vLLM reads folders: the merged weights are on disk while the engine loads them."""
    with TemporaryDirectory() as folder:
        _merged(base, adapter, model).save_pretrained(folder)
        free_memory()
        tokenizer.save_pretrained(folder)
        return make_generator(config, folder, tokenizer, _no_model, thought)


def server_subject(url: str, served: str, tokenizer: str, model: Model) -> Subject:
    """A model behind an OpenAI-compatible server, by the name that the server gives it."""
    from rpsa.generation.server import ServerConfig

    loaded = load_tokenizer(tokenizer, model)
    thought = thought_of(loaded, model)
    config = BackendConfig("server", server=ServerConfig(url, served))

    def generator() -> Generator:
        return make_generator(config, served, loaded, _no_model, thought)

    return Subject(f"{served} at {url}", loaded, generator, thought)


def adapter_base(name: str) -> str | None:
    """The base model that a LoRA adapter's folder names; None for anything else.

    Raises:
        RPSAError: it is an adapter's folder, and names none.
    """
    config = Path(location(name)) / "adapter_config.json"
    if not config.is_file():
        return None
    content = read_json(config)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not base:
        raise RPSAError(f"{config} names no base model: write it there as base_model_name_or_path")
    if problem := source_problem("model", str(base)):
        raise RPSAError(f"{config}: the adapter's base: {problem}")
    return str(base)


def _no_model(name: str) -> Any:
    raise RPSAError(f"{name}: a server's model is not loaded here")
