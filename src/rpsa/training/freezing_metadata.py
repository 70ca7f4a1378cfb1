"""The part of a model's metadata that is about freezing: how, by which Fisher, and what k and the audit found."""

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from rpsa.parameters import fingerprint
from rpsa.training.names import CardNames, public_name

if TYPE_CHECKING:
    from rpsa.fisher.diagonal import FisherDiagonal
    from rpsa.reference import ReferenceDataset
    from rpsa.training.reasoning_trainer import ReasoningMixin
    from rpsa.training.trainer import RPSAMixin


def freezing_metadata(trainer: "RPSAMixin") -> dict[str, Any]:
    """The facts `freezing`, `trajectory` and `audit`; None where there is no such thing."""
    return {
        "freezing": _freezing(trainer),
        "trajectory": _trajectory(trainer.rpsa.trajectory),
        "audit": _audit(trainer),
    }


def measured_metadata(trainer: "ReasoningMixin", names: CardNames) -> dict[str, Any]:
    """The facts `fisher` and `reference`; None where the trainer was given no such thing."""
    reference = trainer.reference_dataset
    return {
        "fisher": _fisher(trainer.fisher) if trainer.fisher is not None else None,
        "reference": _reference(reference, names.problems) if reference is not None else None,
    }


def _freezing(trainer: "RPSAMixin") -> dict[str, Any]:
    args, freezer = trainer.args, trainer.rpsa.freezer
    moves = isinstance(args.frozen_ratio, str)
    return {
        "frozen_ratio": args.frozen_ratio,
        **{name: getattr(args, name) if moves else None for name in ("window", "every", "sigma_scale")},
        "mask": args.mask,
        "exact": not args.gradient_only,
        "compact": args.compact,
        "frozen_moments": args.frozen_moments,
        "zero_fisher": args.zero_fisher,
        "last_ratio": freezer.frozen_ratio if freezer else None,
        "elements": sum(p.numel() for p in freezer.parameters.values()) if freezer else None,
        "nonzero": freezer.nonzero if freezer else None,
        "frozen_fraction": trainer.rpsa.frozen_fraction if freezer else None,
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


def _audit(trainer: "RPSAMixin") -> dict[str, Any] | None:
    if trainer.rpsa.audit is None:
        return None
    # the card is one rank's work, a sharded model's report all ranks': it was made when the weights were saved
    report = trainer.rpsa.reported or trainer.rpsa.report()
    steps = sum(interval["end"] - interval["start"] for interval in report["intervals"])
    names = ("frozen_elements_moved", "frozen_element_steps_checked", "moved_counted_on")
    return {**{name: report[name] for name in names}, "steps": steps}
