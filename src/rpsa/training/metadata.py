"""What there is to say about a trained model, as plain values: the content of `rpsa_metadata.json`.

Everything is read from the trainer's own objects; `CardNames` adds what those cannot know. Nothing about the machine
is told.
"""

import logging
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from rpsa.artifacts import package_versions, sha256_of
from rpsa.parameters import canonical_name, fingerprint, trainable_parameters
from rpsa.sharding import is_sharded, local
from rpsa.training.alternatives_card import alternatives_metadata
from rpsa.training.freezing_metadata import freezing_metadata, measured_metadata
from rpsa.training.names import CardNames, hub_id, public_name

log = logging.getLogger(__name__)

FORMAT = "rpsa.model/1"
_HASHED_ROWS = 4096
_LICENSE_TIMEOUT = 3.0  # seconds


def model_metadata(trainer: Any, names: CardNames) -> dict[str, Any]:
    """JSON-able facts about the model that `trainer` (any Hugging Face trainer) holds now.

    `freezing`, `fisher`, `reference`, `trajectory`, `audit` and `alternatives` are None where there is no such
    thing, as all are after plain fine-tuning. `training` tells of steps whose loss was not finite (`nonfinite`), and
    whether it is not in the end, or weights are not (`diverged`). Calls no collective: one rank can do it alone.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    measured = measured_metadata(trainer, names) if hasattr(trainer, "reference_dataset") else {}
    frozen = freezing_metadata(trainer) if hasattr(trainer, "rpsa") else {}
    return {
        "format": FORMAT,
        "model_name": names.model,
        "weights_fingerprint": _weights_fingerprint(model),
        "tags": [*(getattr(model, "model_tags", None) or []), *names.tags],
        "front_matter": dict(names.front_matter),
        "base_model": _base(model, names),
        "adapter": _adapter(model),
        "freezing": None,
        "fisher": None,
        "reference": None,
        "trajectory": None,
        "audit": None,
        **measured,
        **frozen,
        "alternatives": alternatives_metadata(trainer, names),
        "safety_data": _safety_data(trainer.train_dataset, names.dataset),
        "training": _training(trainer, model),
        "results": None,
        "versions": package_versions(),
    }


# The model and its training


def _base(model: Any, names: CardNames) -> dict[str, Any]:
    source = getattr(model.config, "_name_or_path", "") or ""
    name = names.base or source
    return {
        "name": public_name(name) if name else None,
        "hub_id": hub_id(name),
        "revision": getattr(model.config, "_commit_hash", None),
        "license": _license(source) if source else {},
    }


@lru_cache
def _license(source: str) -> dict[str, str]:
    """`license` and, where it is "other", `license_name` and `license_link`, as the base's own card has them.

    {} where there is no card, or the hub cannot be asked: a card without a license is better than none.
    """
    from huggingface_hub import ModelCard, is_offline_mode, model_info, try_to_load_from_cache

    card = str(Path(source) / "README.md") if Path(source).is_dir() else None
    try:
        cached = card or try_to_load_from_cache(source, "README.md")
        if isinstance(cached, str):
            data: Any = ModelCard.load(cached).data if Path(cached).is_file() else None
        else:
            data = None if is_offline_mode() else model_info(source, timeout=_LICENSE_TIMEOUT).card_data
    except Exception as error:  # of HTTP libraries that differ by version, of YAML, of validation
        log.info("no license of %s: %s", source, error)
        return {}
    fields = ("license", "license_name", "license_link")
    return {name: value for name in fields if data is not None and (value := data.get(name))}


def _adapter(model: Any) -> dict[str, Any] | None:
    if not hasattr(model, "peft_config"):
        return None
    config = next(iter(model.peft_config.values()))
    targets = getattr(config, "target_modules", None)
    return {
        "type": str(getattr(config.peft_type, "value", config.peft_type)),
        "r": getattr(config, "r", None),
        "lora_alpha": getattr(config, "lora_alpha", None),
        "lora_dropout": getattr(config, "lora_dropout", None),
        "target_modules": targets if isinstance(targets, str | None) else sorted(targets),
    }


def _weights_fingerprint(model: Any) -> str | None:
    """Of all parameters; None where this rank holds only a part of them."""
    parameters = {canonical_name(name): p for name, p in model.named_parameters()}
    return None if is_sharded(parameters) else fingerprint(parameters)


def _training(trainer: Any, model: Any) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    trainable = trainable_parameters(model).values()
    losses = {name: [e[name] for e in state.log_history if name in e] for name in ("loss", "eval_loss")}
    return {
        "trainer": type(trainer).__name__,
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        "best_step": state.best_global_step if args.load_best_model_at_end else None,
        "trainable_parameters": sum(p.numel() for p in trainable),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": sorted({str(p.dtype).removeprefix("torch.") for p in trainable}),
        "autocast": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "max_length": getattr(args, "max_length", None),
        "seed": args.seed,
        "nonfinite": trainer.records.nonfinite if hasattr(trainer, "records") else None,
        "diverged": any(not bool(local(p).isfinite().all()) for p in trainable)
        or (hasattr(trainer, "records") and trainer.records.diverged),
        **{name: _json_number(values[-1]) if values else None for name, values in losses.items()},
    }


def _json_number(value: float | None) -> float | str:
    """JSON knows neither NaN nor infinity, which a log has as None; a run that diverged must be saved all the same."""
    return value if value is not None and math.isfinite(value) else "nan"


def _safety_data(dataset: Any, name: str | None) -> dict[str, Any]:
    """`sha256` covers the rows as the trainer sees them, up to 4,096 evenly spaced ones."""
    from datasets import Dataset

    size = len(dataset) if hasattr(dataset, "__len__") else None
    digest = None
    if isinstance(dataset, Dataset) and size:
        rows = dataset.with_format(None).select(range(0, size, math.ceil(size / _HASHED_ROWS)))
        digest = sha256_of([size, rows.to_list()])
    name = name or _downloaded_from(dataset)
    without_split = name.partition(":")[0] if name else None
    return {
        "name": public_name(name) if name else None,
        "hub_id": hub_id(without_split) if without_split and "/" in without_split else None,
        "examples": size,
        "sha256": digest,
    }


def _downloaded_from(dataset: Any) -> str | None:
    """The repository that `load_dataset` took the files from."""
    for address in getattr(getattr(dataset, "info", None), "download_checksums", None) or {}:
        if found := re.match(r"hf://datasets/([^/@]+/[^/@]+)@", address):
            return found[1]
    return None
