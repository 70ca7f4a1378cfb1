"""Models of judges, from the hub or a folder, and what tells one from others."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import reading, sha256_of
from rpsa.checkpoints import load_pretrained
from rpsa.errors import RPSAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    name: str, revision: str | None, dtype: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]":
    """Model (on the GPU if there is one, in eval mode), tokenizer, and what identifies them: `id`, `revision`,
    `backend`, `dtype`, and `base` for an adapter.

    A revision is the commit that was loaded; for a folder a hash of its files' names, sizes and times.

    Raises:
        RPSAError: there is no such model, it is gated and closed to this account, or it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    called = f"judge model {name}"
    with _naming_what_is_gated(name):
        with reading(called):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            config = _without_chunks(name, revision)
        model = load_pretrained(
            AutoModelForCausalLM,
            name,
            called,
            revision=revision,
            dtype=dtype,
            **({"config": config} if config else {}),
        )
    identity: dict[str, Any] = {
        "id": name,
        "revision": _revision(name, revision),
        "backend": "transformers",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if adapters := getattr(model, "peft_config", None):
        base = next(iter(adapters.values())).base_model_name_or_path
        identity["base"] = {"id": base, "revision": _revision(base, None)}
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, identity


def check_access(name: str, revision: str | None) -> None:
    """What `load` would say of a model that is not there or closed to this account, from its tokenizer alone."""
    from transformers import AutoTokenizer

    with _naming_what_is_gated(name), reading(f"judge model {name}"):
        AutoTokenizer.from_pretrained(name, revision=revision)


@contextmanager
def _naming_what_is_gated(name: str) -> Iterator[None]:
    try:
        yield
    except RPSAError as error:
        raise RPSAError(_gated(name, str(error.__cause__)) or str(error)) from error


def _without_chunks(name: str, revision: str | None) -> Any:
    """The model's config if it needs mending: Llama Guard 4 has no attention chunks, and says so in a way that
    transformers takes for a mistake. One chunk over the whole context is the same."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (
        OSError,
        ValueError,
    ):  # an adapter has none; anything else fails again, and is reported, with the model
        return None
    text = config.get_text_config()
    if getattr(text, "attention_chunk_size", 0) is not None:
        return None
    text.attention_chunk_size = text.max_position_embeddings
    return config


def _revision(name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    if folder.is_dir():
        files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in folder.iterdir() if p.is_file()}
        return sha256_of(files)[:16]
    for file in ("adapter_config.json", "config.json"):
        path = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name  # snapshots/COMMIT/file
    return revision


def _gated(name: str, text: str) -> str | None:
    """What to do about a gated model; None if it is something else."""
    if "gated repo" not in text:
        return None
    # an adapter's base may be the one that is gated
    closed = re.search(r"https?://[^/\s]+/([\w.-]+/[\w-][\w.-]*[\w-])", text)
    gated = closed[1] if closed else name
    behind = "" if gated == name else f" (judge {name} stands on it)"
    return (
        f"judge model {gated} is gated{behind}: accept its licence on https://huggingface.co/{gated}, "
        "then log in with `hf auth login`"
    )
