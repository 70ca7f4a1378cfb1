"""Metadata: what there is to say about a trained model, as plain values, the content of `rpsa_metadata.json`.

Everything is read from the trainer's own objects; `CardNames` adds what those cannot know. Nothing about the machine is
told, and folders go by their last part alone.
"""

import hashlib
import logging
import math
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import package_versions, sha256_of
from rpsa.parameters import canonical_name, elements, fingerprint, trainable_parameters
from rpsa.settings import DER, INTERPOLATION, KL, PENALTY, PROJECTION, RESTORED_RATIO
from rpsa.sharding import is_sharded, local

if TYPE_CHECKING:
    from rpsa.fisher.diagonal import FisherDiagonal
    from rpsa.reference import ReferenceDataset
    from rpsa.training.callback import RPSACallback
    from rpsa.training.reasoning import ReasoningMixin

log = logging.getLogger(__name__)

FORMAT = "rpsa.model/1"
_HASHED_ROWS = 4096
_LICENSE_TIMEOUT = 3.0  # seconds


@dataclass(frozen=True)
class CardNames:
    """What a trainer cannot see in its own objects; None: derived where possible, left out where not.

    Attributes:
        model: the card's title.
        base: the base model: a Hugging Face id, or what else it is called.
        dataset: the safety data: a Hugging Face id (`id` or `id:split`), a file, or what else it is called.
        problems: the reasoning problems of D_ref, likewise.
        rehearsed: rows of the safety data that are D_ref's.
        refusing: the share of the safety data that refuses.
        perplexity: of its responses under the model before training.
        tags: more tags.
        front_matter: fields of the card's YAML; they win over derived ones.
    """

    model: str | None = None
    base: str | None = None
    dataset: str | None = None
    problems: str | None = None
    rehearsed: int = 0
    refusing: float | None = None
    perplexity: float | None = None
    tags: tuple[str, ...] = ()
    front_matter: Mapping[str, Any] = field(default_factory=dict)


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository of the Hugging Face hub; None for folders, files and other names."""
    possible = name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()
    return name if possible else None


def public_name(name: str) -> str:
    """A folder's or file's last part; other names as they are."""
    path = Path(name)
    return path.resolve().name if path.is_absolute() or path.exists() else name


def freezing_metadata(callback: "RPSACallback") -> dict[str, Any]:
    """The facts `freezing`, `trajectory` and `audit`; None where there is no such thing."""
    return {
        "freezing": _freezing(callback),
        "trajectory": _trajectory(callback.trajectory),
        "audit": _audit(callback),
    }


def measured_metadata(trainer: "ReasoningMixin", names: CardNames) -> dict[str, Any]:
    """The facts `fisher` and `reference`; None where the trainer was given no such thing."""
    reference = trainer.reference_dataset
    return {
        "fisher": _fisher(trainer.fisher) if trainer.fisher is not None else None,
        "reference": _reference(reference, names.problems) if reference is not None else None,
    }


def _freezing(callback: "RPSACallback") -> dict[str, Any]:
    args, freezer = callback.trainer.args, callback.freezer
    moves = isinstance(args.frozen_ratio, str)
    return {
        "frozen_ratio": args.frozen_ratio,
        **{name: getattr(args, name) if moves else None for name in ("window", "every", "sigma_scale")},
        "mask": args.mask if callback.ranking is None else "own scores",
        "exact": not args.gradient_only,
        "compact": args.compact,
        "frozen_moments": args.frozen_moments,
        "zero_fisher": args.zero_fisher,
        "last_ratio": freezer.frozen_ratio if freezer else None,
        "elements": sum(p.numel() for p in freezer.parameters.values()) if freezer else None,
        "nonzero": freezer.nonzero if freezer else None,
        "frozen_fraction": callback.frozen_fraction if freezer else None,
    }


def _fisher(fisher: "FisherDiagonal") -> dict[str, Any]:
    manifest = fisher.manifest
    estimation = manifest.get("estimation") or {}
    known = ("estimator", "probes", "seed", "scope", "samples", "tokens", "split_half")
    return {
        **{name: estimation.get(name) for name in known},
        "skipped": len(estimation.get("skipped", [])),
        "lora_a_nonzero": _lora_a_nonzero(fisher.scores),
        "weights_fingerprint": manifest.get("fingerprint"),
        "any_weights": bool(manifest.get("any_weights")),
        "data_fingerprint": manifest.get("data_fingerprint"),
        "fingerprint": fingerprint(fisher.scores),
    }


def _lora_a_nonzero(scores: Mapping[str, Any]) -> bool | None:
    """Whether any element of an A can be frozen: not if B was 0 when F was measured. None without LoRA."""
    of_a = [bool(score.any()) for name, score in scores.items() if "lora_A" in name]
    return any(of_a) if of_a else None


def _reference(reference: "ReferenceDataset", problems: str | None) -> dict[str, Any]:
    manifest = reference.manifest
    config = manifest.get("config", {})
    identity = manifest.get("identity")
    return {
        "sampled_from": public_name(identity) if identity else None,
        "problems": public_name(problems) if problems else None,
        "problems_sha256": manifest.get("problems_sha256"),
        "traces": len(reference.traces),
        "correct": sum(trace.correct is True for trace in reference.traces),
        "truncated": sum(trace.finish_reason == "length" for trace in reference.traces),
        "response_tokens": sum(len(trace.response_ids) for trace in reference.traces),
        **{name: config.get(name) for name in ("temperature", "top_p", "max_new_tokens", "only_correct")},
        "sha256": _sha256_of_tokens(ids for t in reference.traces for ids in (t.prompt_ids, t.response_ids)),
    }


def _sha256_of_tokens(rows: Iterable[list[int]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(array("q", [len(row), *row]).tobytes())
    return digest.hexdigest()


def _trajectory(trajectory: list[dict[str, float | None]]) -> dict[str, Any] | None:
    """Of the k and c that were measured; None where nothing was, as with a constant ratio."""
    if not trajectory:
        return None
    ks, conflicts = ([v for entry in trajectory if (v := entry[name]) is not None] for name in ("k", "c"))
    return {
        "measurements": len(ks),
        "k": {"min": min(ks), "median": median(ks), "max": max(ks)},
        "share_k_0": ks.count(0.0) / len(ks),
        "share_k_1": ks.count(1.0) / len(ks),
        "left_half": any(k != 0.5 for k in ks),
        "c": {"min": min(conflicts), "mean": fmean(conflicts), "max": max(conflicts)} if conflicts else None,
    }


def _audit(callback: "RPSACallback") -> dict[str, Any] | None:
    if callback.audit is None:
        return None
    # the card is one rank's work, a sharded model's report all ranks': it was made when the weights were saved
    report = callback.reported or callback.report()
    steps = sum(interval["end"] - interval["start"] for interval in report["intervals"])
    names = ("frozen_elements_moved", "frozen_element_steps_checked", "moved_counted_on")
    return {**{name: report[name] for name in names}, "steps": steps}


def model_metadata(trainer: Any, names: CardNames) -> dict[str, Any]:
    """JSON-able facts about the model that `trainer` (any Hugging Face trainer) holds now.

    `freezing`, `fisher`, `reference`, `trajectory`, `audit` and `alternatives` are None where there is no such
    thing, as all are after plain fine-tuning. `training` tells of steps whose loss was not finite (`nonfinite`), and
    whether it is not in the end, or weights are not (`diverged`). Calls no collective: one rank can do it alone.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    measured = measured_metadata(trainer, names) if hasattr(trainer, "reference_dataset") else {}
    frozen = freezing_metadata(trainer.rpsa) if hasattr(trainer, "rpsa") else {}
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
        "safety_data": _safety_data(trainer.train_dataset, names.dataset)
        | {"refusing": names.refusing, "perplexity": names.perplexity},
        "training": _training(trainer, model),
        "results": None,
        "versions": package_versions(),
    }


_DEFAULTS = {s.name: s.default for s in (PENALTY, PROJECTION, INTERPOLATION, RESTORED_RATIO, KL, DER)}


def alternatives_metadata(trainer: Any, names: CardNames) -> dict[str, Any] | None:
    """The settings that a run had, JSON-able; None where nothing was done instead of freezing or beside it."""
    settings = {name: getattr(trainer.args, name, default) for name, default in _DEFAULTS.items()}
    if settings == _DEFAULTS and not names.rehearsed:
        return None
    strength = trainer.args.penalty_strength if settings["penalty"] else None
    anchor = trainer.args.anchor if settings["kl"] or settings["der"] else None
    energy = trainer.args.nullspace_energy if settings["projection"] == "nullspace" else None
    return {
        **settings,
        "penalty_strength": strength,
        "nullspace_energy": energy,
        "anchor": anchor,
        "rehearsed": names.rehearsed,
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
        "quantization": "4bit" if getattr(model, "is_loaded_in_4bit", False) else None,
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
        "beta": getattr(args, "beta", None),
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        "best_step": state.best_global_step if args.load_best_model_at_end else None,
        "trainable_parameters": sum(p.numel() for p in trainable),
        "parameters": sum(map(elements, model.parameters())),
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
