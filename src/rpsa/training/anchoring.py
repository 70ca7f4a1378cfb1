"""Anchoring: an anchor's life in a run of a Hugging Face trainer.

What the original says is recorded when training begins, and kept in `output_dir`, so that a run that goes on has the
same original. Once a step, on the complete gradient, the anchor's is added, over as many sequences as the step has.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rpsa.alternatives.anchor import Anchor
from rpsa.chat import IGNORED_LABEL
from rpsa.errors import RPSAError
from rpsa.fisher.samples import read_samples
from rpsa.parameters import without_adapter
from rpsa.reference import ReferenceDataset, Trace
from rpsa.sharding import barrier
from rpsa.training.passes import mean_backward, share_of_rank

if TYPE_CHECKING:
    from datasets import Dataset

ORIGINAL_FILE = "anchor.safetensors"
"""In `output_dir`: what the original model said."""

_SEED = 0
"""Of the order in which rows of two kinds come."""


class Anchoring(TrainerCallback):
    """The anchor within one call of `train`; `rows` is what it is measured on."""

    def __init__(self, trainer: Any, rows: ReferenceDataset) -> None:
        self.trainer = trainer
        self.rows = rows
        self._anchor: Anchor | None = None
        self._value: Tensor | None = None

    @property
    def value(self) -> float:
        """The anchor's loss at the last step."""
        return float(self._value) if self._value is not None else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, own = self.trainer, self.trainer.args
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        switched_off = (lambda: without_adapter(model)) if hasattr(model, "peft_config") else None
        self._anchor = Anchor(own.kl, own.der, own.anchor_top, without_adapter=switched_off)
        if not self._anchor.needs_record:
            return
        batches = self.rows.batches(own.per_device_train_batch_size, own.reference_max_length)
        samples = read_samples(batches)
        if state.global_step > 0:
            recorded = trainer.resumed_from.parent / ORIGINAL_FILE
            self._anchor.load(recorded, [name for batch in samples for name in batch.ids])
        else:
            self._anchor.record(trainer.model_wrapped, samples, trainer.accelerator.device)
        barrier()  # all have read it
        if own.should_save:
            Path(own.output_dir).mkdir(parents=True, exist_ok=True)
            self._anchor.save(Path(own.output_dir) / ORIGINAL_FILE)

    def backward(self, step: int) -> None:
        """Accumulate the gradient of the anchor's mean over the response tokens of the `step`-th batch of rows."""
        assert self._anchor is not None
        trainer = self.trainer
        samples = share_of_rank(trainer, self.rows, step)
        self._value = mean_backward(
            trainer.model_wrapped,
            samples,
            self._anchor.loss,
            trainer.accelerator,
            trainer.args.per_device_train_batch_size,
        )


def anchor_rows(kind: str, reference: ReferenceDataset | None, benign: "Dataset | None") -> ReferenceDataset:
    """What an anchor is measured on.

    Raises:
        RPSAError: what it needs is not given, or has no response.
    """
    traces = []
    if kind != "benign":
        if reference is None:
            raise RPSAError(
                f"an anchor on {kind} needs D_ref: give reference_dataset, or set anchor to benign"
            )
        traces += reference.traces
    if kind != "reference":
        if benign is None or len(benign) == 0:
            raise RPSAError(
                f"an anchor on {kind} needs rows to be complied with: give benign_dataset (in a recipe, safety data "
                "that has some), or set anchor to reference"
            )
        traces += [_as_trace(number, row) for number, row in enumerate(benign)]
    if kind == "both":
        random.Random(_SEED).shuffle(traces)
    return ReferenceDataset(traces, reference.manifest if reference else None)


def _as_trace(number: int, row: Any) -> Trace:
    ids, labels = list(row["input_ids"]), list(row["labels"])
    start = next((place for place, label in enumerate(labels) if label != IGNORED_LABEL), None)
    if start is None:
        raise RPSAError(f"benign_dataset row {number} has no label that is not {IGNORED_LABEL}: take it out")
    return Trace(f"benign {number}", ids[:start], ids[start:], "", "stop", None)
