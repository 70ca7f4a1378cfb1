"""The model under test against the one that it was trained from: its reasoning loss, and how sure one may be of it."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rpsa.artifacts import read_json, sha256_of
from rpsa.errors import RPSAError
from rpsa.evaluation.statistics import Interval, ratio_interval
from rpsa.models import free_memory, generation_dtype, load_model
from rpsa.reasoning_loss import ReasoningLoss, RecordedOriginal, TraceLoss, reasoning_loss, record_original
from rpsa.recipe.sections import Model
from rpsa.reference import ReferenceDataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LossName = Literal["nll", "kl"]


@dataclass(frozen=True)
class HeldOut:
    """What a reasoning loss is measured on, and against what.

    Attributes:
        folder: of traces of the original, as `rpsa.reference.build_reference` leaves it.
        original: the model that they are of, as a recipe names it; None: there is no KL then.
        max_length: tokens of a trace that are seen; None: all.
        model: how the original is loaded, as a recipe says it.
    """

    folder: Path
    original: str | None
    max_length: int | None
    model: Model = field(default_factory=Model)

    @property
    def is_empty(self) -> bool:
        """Whether there was no problem left to hold out."""
        manifest = read_json(self.folder / "manifest.json")
        return bool(manifest["traces"] == 0)


def measured_loss(
    load: Callable[[], "PreTrainedModel"] | None, held_out: HeldOut | None
) -> ReasoningLoss | None:
    """The reasoning loss of the model that `load` loads; None, with a line in the log, where it cannot be had.

    The original is loaded before it, unless it was the last one that was, and both in the dtype in which they generate.
    """
    if held_out is None or held_out.is_empty:
        return None
    if load is None:
        log.warning("no reasoning loss: a server says nothing of log-probabilities; give the model's folder")
        return None
    try:
        traces = ReferenceDataset.load(held_out.folder)
        original = None
        if held_out.original is not None:
            key = sha256_of(held_out.folder / "traces.jsonl")
            original = _recorded(held_out, key)
            free_memory()
        found = reasoning_loss(load(), traces, held_out.max_length, original)
        if not all(isfinite(value) for one in found.traces for value in (one.nll, one.kl or 0.0)):
            raise RPSAError("its log-probabilities are not finite")
    except RPSAError as error:
        log.warning("no reasoning loss: %s", error)
        return None
    return found


@lru_cache(maxsize=1)
def _recorded(held_out: HeldOut, key: str) -> RecordedOriginal:
    """Of the same base for one run of a study after the other; `key` tells the traces from any others."""
    from rpsa.generation.backends import has_gpu

    assert held_out.original is not None
    model = held_out.model
    original = load_model(held_out.original, model, generation_dtype(model, on_gpu=has_gpu()))
    return record_original(original, ReferenceDataset.load(held_out.folder), held_out.max_length)


def loss_interval(loss: ReasoningLoss, name: LossName) -> Interval | None:
    """95% interval of a token mean over traces, as a ratio of sums; None for fewer than 3 traces, or no KL."""
    values = [getattr(trace, name) for trace in loss.traces]
    if None in values:
        return None
    tokens = [float(trace.tokens) for trace in loss.traces]
    sums = [value * count for value, count in zip(values, tokens, strict=True)]
    found = ratio_interval(sums, tokens)
    return Interval(max(found.low, 0.0), found.high) if found else None


def loss_to_json(loss: ReasoningLoss) -> dict[str, Any]:
    """In nats per response token, trace by trace as well."""
    intervals = {name: loss_interval(loss, name) for name in ("nll", "kl")}
    return {
        "nll": loss.nll,
        "kl": loss.kl,
        "traces": len(loss.traces),
        "tokens": loss.tokens,
        **{f"{name}_ci95": list(found) if found else None for name, found in intervals.items()},
        "per_trace": [asdict(trace) for trace in loss.traces],
    }


def loss_from_json(found: Mapping[str, Any] | None) -> ReasoningLoss | None:
    """What `loss_to_json` made; None where nothing was measured."""
    return ReasoningLoss(tuple(TraceLoss(**one) for one in found["per_trace"])) if found else None
