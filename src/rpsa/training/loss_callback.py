"""Reasoning loss while a model is trained: what its own held-out reasoning loses, step by step."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rpsa.errors import check_type
from rpsa.reasoning_loss import RecordedOriginal, reasoning_loss, record_original
from rpsa.reference import ReferenceDataset
from rpsa.settings import REFERENCE_MAX_LENGTH
from rpsa.sharding import barrier, rank

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger(__name__)

ORIGINAL = "original_logits.safetensors"
"""In a trainer's `output_dir`: what the model gave before training, for a run that is resumed."""

SAFETY_AND_REASONING = "eval_safety_and_reasoning_loss"
"""The held-out safety loss plus the held-out reasoning NLL, both in nats per token: lower is better."""


class ReasoningLossCallback(TrainerCallback):
    """Logs `eval_reasoning_nll` and `eval_reasoning_kl`: before the first step, at every evaluation, and at the end.

    For any trainer of transformers or TRL: `trainer.add_callback(ReasoningLossCallback(trainer, held_out))`. At an
    evaluation they are also among its metrics, with `eval_safety_and_reasoning_loss`, their NLL plus `eval_loss`, so
    that `metric_for_best_model` may name any of them. Training itself is the same with and without.

    Args:
        trainer: the trainer that it is added to.
        held_out: traces that nothing is fitted to (`ReferenceDataset`), or their folder.
        max_length: tokens of a trace that are seen; None: all.
    """

    def __init__(
        self,
        trainer: "Trainer",
        held_out: ReferenceDataset | str | Path,
        max_length: int | None = REFERENCE_MAX_LENGTH.default,
    ) -> None:
        if isinstance(held_out, str | Path):
            held_out = ReferenceDataset.load(held_out)
        check_type("held_out", held_out, ReferenceDataset, "a ReferenceDataset, or its folder")
        self.trainer = trainer
        self.held_out = held_out
        self.max_length = max_length
        self._original: RecordedOriginal | None = None
        self._logged_at: int | None = None
        """The step of the last log; None outside of a run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = Path(str(args.output_dir)) / ORIGINAL
        if state.global_step > 0:
            self._logged_at = state.global_step
            self._original = RecordedOriginal.load(path, self.held_out, self.max_length)
            if self._original is None and rank() == 0:
                log.warning(
                    "%s: missing, or of other traces: the reasoning KL of this run is not known", path
                )
            return
        self._original = record_original(kwargs["model"], self.held_out, self.max_length, device=args.device)
        if rank() == 0:
            self._original.save(path)
        barrier()
        self._log(self._metrics(kwargs["model"], args), state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if self._logged_at is None:
            return
        measured = self._metrics(kwargs["model"], args)
        metrics |= measured  # what `Trainer.evaluate` is about to return
        if "eval_loss" in metrics:
            metrics[SAFETY_AND_REASONING] = metrics["eval_loss"] + measured["eval_reasoning_nll"]
        if state.global_step != self._logged_at:
            self._log(measured, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # once more, as the weights may be those of the best step, or changed after training
        self._log(self._metrics(kwargs["model"], args), state)
        self._logged_at, self._original = None, None

    def _metrics(self, model: Any, args: TrainingArguments) -> dict[str, float]:
        found = reasoning_loss(model, self.held_out, self.max_length, self._original, args.device)
        metrics = {"eval_reasoning_nll": found.nll}
        return metrics if found.kl is None else metrics | {"eval_reasoning_kl": found.kl}

    def _log(self, metrics: dict[str, float], state: TrainerState) -> None:
        self._logged_at = state.global_step
        self.trainer.log(dict(metrics))
