"""Reasoning loss: L_R of Eq. 1 itself, on responses of the model before training that nothing was fitted to.

Two figures, in nats per response token: the negative log-likelihood (NLL) that a model gives these responses, and the
forward KL divergence of its next-token distributions from those of the model before training. As the responses are the
original's own, the expected rise of the NLL is the KL. They cost one forward pass over some dozens of responses, where
an accuracy costs the generation of thousands.

Traces are taken one at a time: no figure depends on padding or on a batch size, and the KL of the untouched model is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import fsum
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rpsa.divergence import TOP, OriginalLogits, forward_kl
from rpsa.errors import RPSAError
from rpsa.fisher.log_probs import evaluation_mode, label_log_probs, response_logits
from rpsa.fisher.samples import Samples, data_fingerprint, read_samples, refuse_foreign_ids
from rpsa.parameters import without_adapter
from rpsa.reference import ReferenceDataset
from rpsa.sharding import reshard, without_ddp


@dataclass(frozen=True)
class TraceLoss:
    """Of one trace: its response tokens, and means over them in nats; `kl` is None where there was no original."""

    problem_id: str
    tokens: int
    nll: float
    kl: float | None


@dataclass(frozen=True)
class ReasoningLoss:
    """Of some traces; `nll` and `kl` are means over all of their response tokens, in nats."""

    traces: tuple[TraceLoss, ...]

    @property
    def tokens(self) -> int:
        return sum(trace.tokens for trace in self.traces)

    @property
    def nll(self) -> float:
        return fsum(trace.nll * trace.tokens for trace in self.traces) / self.tokens

    @property
    def kl(self) -> float | None:
        """None where there was no original to compare with."""
        known = [trace.kl * trace.tokens for trace in self.traces if trace.kl is not None]
        return fsum(known) / self.tokens if len(known) == len(self.traces) else None


@dataclass(frozen=True)
class RecordedOriginal:
    """What the model before training gave at every response token of some traces.

    Attributes:
        logits: of the traces one after the other, as `record_original` took them; on the CPU.
        vocabulary: how many tokens its logits were for.
        of: what tells the traces, as far as they were seen, from any others.
    """

    logits: OriginalLogits
    vocabulary: int
    of: str

    def save(self, path: Path) -> None:
        """Write a safetensors file, which appears whole."""
        self.logits.save(path, {"vocabulary": str(self.vocabulary), "of": self.of})

    @classmethod
    def load(
        cls, path: Path, held_out: ReferenceDataset, max_length: int | None
    ) -> "RecordedOriginal | None":
        """What `save` wrote; None where there is no such file, or it is of other traces."""
        try:
            logits, about = OriginalLogits.load(path)
        except (OSError, SafetensorError):
            return None
        if about.get("of") != data_fingerprint(_samples(held_out, max_length)):
            return None
        return cls(logits, int(about["vocabulary"]), about["of"])


def record_original(
    model: nn.Module,
    held_out: ReferenceDataset,
    max_length: int | None,
    top: int | None = TOP,
    device: torch.device | None = None,
) -> RecordedOriginal:
    """What `model` gives at every response token of the traces, to be compared with what it gives later.

    Where the model has an adapter it is switched off: one that was warmed up is no part of the original. Of a sharded
    model all ranks' work. Neither the random state nor a parameter is changed.

    Args:
        max_length: tokens of a trace that are seen, prompt included; None: all.
        top: tokens kept at each position (`rpsa.divergence`); None: all, which is exact.
        device: where the batches go; by default where the parameters are.

    Raises:
        RPSAError: the traces are another tokenizer's, or the model is no causal language model.
    """
    samples = _samples(held_out, max_length)
    parts: list[OriginalLogits] = []
    sizes: list[int] = []

    def record(one: Samples, logits_RV: Tensor, rows_N: Tensor, labels_N: Tensor) -> None:
        parts.append(OriginalLogits.of(logits_RV, rows_N, top).to("cpu"))
        sizes.append(logits_RV.shape[1])

    with without_adapter(model):
        _pass_over(model, samples, record, device)
    return RecordedOriginal(OriginalLogits.joined(parts), sizes[0], data_fingerprint(samples))


def reasoning_loss(
    model: nn.Module,
    held_out: ReferenceDataset,
    max_length: int | None,
    original: RecordedOriginal | None = None,
    device: torch.device | None = None,
) -> ReasoningLoss:
    """NLL and, where the original was recorded on the same traces, KL(original || model), trace by trace.

    Of a sharded model all ranks' work, and all of them get the result. Arguments as for `record_original`.

    Raises:
        RPSAError: the original was recorded on other traces, or has another vocabulary.
    """
    samples = _samples(held_out, max_length)
    if original is not None and original.of != data_fingerprint(samples):
        raise RPSAError(
            "the original was recorded on other traces than these: record it on the held-out ones"
        )
    found: list[TraceLoss] = []
    seen = 0

    def measure(one: Samples, logits_RV: Tensor, rows_N: Tensor, labels_N: Tensor) -> None:
        nonlocal seen
        nll = -label_log_probs(logits_RV, rows_N, labels_N).double().mean()
        kl = None
        if original is not None:
            if logits_RV.shape[1] != original.vocabulary:
                raise RPSAError(
                    f"the original has a vocabulary of {original.vocabulary} tokens, and the model one of "
                    f"{logits_RV.shape[1]}: name the model that it was trained from"
                )
            part = original.logits[seen : seen + len(rows_N)].to(logits_RV.device)
            kl = forward_kl(part, logits_RV, rows_N).double().mean().item()
        seen += len(rows_N)
        found.append(TraceLoss(one.ids[0], len(rows_N), nll.item(), kl))

    _pass_over(model, samples, measure, device)
    return ReasoningLoss(tuple(found))


def _samples(held_out: ReferenceDataset, max_length: int | None) -> list[Samples]:
    return read_samples(held_out.batches(1, max_length))


def _pass_over(
    model: nn.Module,
    samples: list[Samples],
    take: Callable[[Samples, Tensor, Tensor, Tensor], None],
    device: torch.device | None,
) -> None:
    """Hand the logits (R, V) of each trace on, with the rows that predict its response tokens, and these (N,)."""
    model = without_ddp(model)
    device = device or next(model.parameters()).device
    refuse_foreign_ids(model, "held-out traces", max(int(one.input_ids.max()) for one in samples))
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), evaluation_mode(model):
        for one in samples:
            responses = one.responses()
            logits_RV, rows_N = response_logits(model, one, responses, device)
            take(one, logits_RV, rows_N.to(logits_RV.device), responses.labels.to(logits_RV.device))
    reshard(model)
