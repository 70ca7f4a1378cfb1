"""Reasoning gradient: g_R of Eq. 6, computed by us and never through a trainer's `compute_loss`, which may be DPO's.

`ReasoningMixin` is what every trainer that protects reasoning needs: a Fisher, D_ref, g_R, an anchor, and the moment
to act.
`warm_up` moves a LoRA adapter off its start, so that all of it has a Fisher (an option; section 3.2 measures at the
start). There B is 0, so that the gradient of A is 0 and with it F of A: only B can be frozen. A few steps on the
model's own responses, where the expected gradient is 0, move B without teaching the model much.

Shapes: B sequences, T positions of each, N response tokens of all of them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from rpsa.errors import RPSAError, check_type
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.log_probs import check_causal, evaluation_mode, response_log_probs
from rpsa.fisher.samples import Samples, read_samples, refuse_foreign_ids
from rpsa.reference import ReferenceDataset
from rpsa.sharding import refuse_accelerator, refuse_model
from rpsa.training.anchoring import Anchoring, anchor_rows
from rpsa.training.passes import mean_backward, share_of_rank
from rpsa.training.records import RecordsMixin, check_kept, given


def reasoning_backward(
    model: nn.Module, batch: dict[str, Any], accelerator: Accelerator, micro_batch_size: int
) -> None:
    """Accumulate into `.grad` the gradient of the mean negative log-likelihood of a batch's response tokens.

    Args:
        batch: this rank's part: `input_ids`, `attention_mask`, `labels` (B, T), right-padded, -100 = not a
            response token.
        micro_batch_size: sequences of one forward pass.
    """
    [samples] = read_samples([batch])
    mean_backward(model, samples, negative_log_likelihood, accelerator, micro_batch_size)


def negative_log_likelihood(model: nn.Module, samples: Samples, device: torch.device) -> torch.Tensor:
    """Summed over the response tokens."""
    log_probs_N = response_log_probs(model, samples, device)
    return -log_probs_N.sum()


def warm_up(model: nn.Module, batches: Iterable[Mapping[str, Any]], learning_rate: float) -> None:
    """One step of AdamW (no decay, gradients clipped at 1) on the trainable parameters for each batch, in place.

    Args:
        batches: `input_ids`, `attention_mask` and `labels` (B, T), as for `estimate_fisher`. The loss is the mean
            negative log-likelihood of a batch's response tokens, dropout off.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    device = parameters[0].device
    with evaluation_mode(model):
        for number, batch in enumerate(batches):
            [samples] = read_samples([batch])
            if number == 0:
                check_causal(model, samples, device)
            tokens = int(samples.response_lengths.sum())
            (negative_log_likelihood(model, samples, device) / tokens).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()


class ReasoningMixin(RecordsMixin):
    """The base of `RPSAMixin` and `AlternativesMixin`: goes before a `Trainer` subclass, as they do.

    Args:
        benign_dataset: rows to be complied with, with the columns `input_ids` and `labels`; for an anchor on them.

    Raises:
        RPSAError: the model cannot be trained this way, or the Fisher does not fit it.
    """

    fisher: FisherDiagonal | None

    def __init__(
        self,
        *args: Any,
        fisher: FisherDiagonal | str | Path | None = None,
        reference_dataset: ReferenceDataset | str | Path | None = None,
        benign_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        fisher, reference_dataset = given_fisher(fisher), _reference(reference_dataset)
        model: Any = given(self, args, kwargs).get("model")
        has_adapter = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
        refuse_model(model, has_adapter=has_adapter)
        super().__init__(*args, **kwargs)
        check_kept(self, kwargs.get("train_dataset"), kwargs.get("formatting_func"))
        refuse_accelerator(self.accelerator, self.args.n_gpu)
        self._starts_elsewhere = False
        if fisher is not None:
            fisher.check_shapes(self.model)
            if self.accelerator.is_main_process:  # the others may not have read the weights yet
                # trained weights are what a run has that goes on, and only `train` knows whether one does
                self._starts_elsewhere = fisher.check_related(self.model) == "trained"
        if reference_dataset is not None:
            tokens = max(max(*t.prompt_ids, *t.response_ids, 0) for t in reference_dataset.traces)
            refuse_foreign_ids(self.model, "D_ref", tokens)
        self.fisher = fisher
        self.reference_dataset = reference_dataset
        self.anchoring: Anchoring | None = None
        if self.args.has_anchor:
            self.anchoring = Anchoring(self, anchor_rows(self.args.anchor, reference_dataset, benign_dataset))
            self.add_callback(self.anchoring)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._starts_elsewhere and not resume_from_checkpoint:
            assert self.fisher is not None
            self.fisher.check_weights(self.model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            if self.anchoring is not None:
                self.anchoring.backward(self.state.global_step)
            self.on_gradients_complete()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.anchoring is not None:
            logs["alternatives/anchor"] = self.anchoring.value
        super().log(logs, *args, **kwargs)

    def on_gradients_complete(self) -> None:
        """g_S is in `.grad`, of all micro-batches and ranks, an anchor's part included; clipping comes next."""
        raise NotImplementedError

    def reasoning_backward(self, measurement: int) -> None:
        """Accumulate g_R of the `measurement`-th batch of D_ref, which has as many sequences as a step."""
        if self.reference_dataset is None:
            raise RPSAError("the reasoning gradient is measured on D_ref: give reference_dataset")
        part = share_of_rank(self, self.reference_dataset, measurement)
        if measurement == 0:
            with evaluation_mode(self.model_wrapped):
                check_causal(self.model_wrapped, part, self.accelerator.device)
        micro = self.args.per_device_train_batch_size
        mean_backward(self.model_wrapped, part, negative_log_likelihood, self.accelerator, micro)


def given_fisher(given: FisherDiagonal | str | Path | None) -> FisherDiagonal | None:
    """A Fisher, or what its folder holds."""
    if isinstance(given, str | Path):
        return FisherDiagonal.load(given)
    check_type(
        "fisher", given, FisherDiagonal | None, "what estimate_fisher(model, batches) returns, or its folder"
    )
    return given


def _reference(given: ReferenceDataset | str | Path | None) -> ReferenceDataset | None:
    if isinstance(given, str | Path):
        return ReferenceDataset.load(given)
    check_type("reference_dataset", given, ReferenceDataset | None, "a ReferenceDataset, or its folder")
    return given
