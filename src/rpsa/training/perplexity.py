"""Perplexity of the training data under the model before training: how foreign they are to it.

Responses of other models have a high one, the model's own a low one; learning the former moves it further.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from rpsa.artifacts import atomic_write, read_json, stable_json, without_nan
from rpsa.fisher.log_probs import evaluation_mode, response_log_probs
from rpsa.fisher.samples import read_samples
from rpsa.reference import collated
from rpsa.sharding import rank, reshard

EXAMPLES = 128
"""So many of the first are enough."""


def response_perplexity(
    model: nn.Module, rows: Sequence[Mapping[str, list[int]]], device: torch.device, batch_size: int
) -> float:
    """exp of the mean negative log-likelihood of all response tokens of the `rows`, dropout off.

    The global random state and the model are left as they were. Ranks of a sharded model all do the same passes.

    Args:
        rows: `input_ids` and `labels`, -100 = not a response token; each row has one at least.
    """
    total, tokens = 0.0, 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            [samples] = read_samples([collated([r["input_ids"] for r in some], [r["labels"] for r in some])])
            log_probs_N = response_log_probs(model, samples, device)
            total -= float(log_probs_N.double().sum())
            tokens += len(log_probs_N)
            reshard(model)
    mean = total / tokens
    return math.exp(mean) if mean < 700 else math.inf


class PerplexityCallback(TrainerCallback):
    """Measures before the first step, and keeps the value in the file `path` for a run that goes on."""

    def __init__(self, trainer: Any, rows: Any, path: Path) -> None:
        self.trainer, self.path = trainer, path
        self._rows = [dict(rows[i]) for i in range(min(EXAMPLES, len(rows)))]

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            return
        trainer = self.trainer
        value = response_perplexity(
            trainer.model_wrapped,
            self._rows,
            trainer.accelerator.device,
            args.per_device_train_batch_size,
        )
        if rank() == 0:
            atomic_write(self.path, stable_json(without_nan(value)))

    @property
    def value(self) -> float | None:
        """None where it is not a number, or the run was begun by another version."""
        return read_json(self.path) if self.path.is_file() else None
