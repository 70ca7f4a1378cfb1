"""Anchor: what the original model would say on some sequences is part of the loss (forward KL, DER).

Where a mask or a penalty keeps weights, this keeps what they do. Forward KL to the original is what keeps on-policy
methods near it; DER (Buzzega et al., 2020) takes the distance of logits. The original's distributions are recorded
once, before training; of LoRA they are the model's own without its adapter, and nothing is stored.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from rpsa.artifacts import reading
from rpsa.divergence import OriginalLogits, forward_kl, squared_distance
from rpsa.errors import RPSAError
from rpsa.fisher.log_probs import evaluation_mode, response_logits
from rpsa.fisher.samples import Samples
from rpsa.settings import ANCHOR_TOP, DER, KL, check
from rpsa.sharding import reshard


class Anchor:
    """Its loss is kl * KL(original || model) + der * (mean squared distance of logits), summed over response tokens.

        anchor = Anchor(kl=1.0)
        samples = read_samples(reference.batches(8, max_length))
        anchor.record(model, samples, device)  # before training
        ...
        (loss + anchor.loss(model, samples[i], device) / tokens).backward()

    Dropout is off in it, so that it is 0 before the first step, and so is its gradient.

    Args:
        kl, der: strengths, not negative; a token's divergence is in nats.
        top: tokens of each distribution that are stored; None: all.
        without_adapter: a context in which the model is the original, such as `rpsa.parameters.without_adapter`;
            nothing is recorded then.

    Raises:
        RPSAError: a strength or `top` is impossible.
    """

    def __init__(
        self,
        kl: float = KL.default,
        der: float = DER.default,
        top: int | None = ANCHOR_TOP.default,
        without_adapter: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        check(KL, kl)
        check(DER, der)
        check(ANCHOR_TOP, top)
        self.kl, self.der, self.top = kl, der, top
        self._without_adapter = without_adapter
        self._original: dict[str, OriginalLogits] = {}

    @property
    def needs_record(self) -> bool:
        return self._without_adapter is None

    def record(self, model: nn.Module, batches: Iterable[Samples], device: torch.device) -> None:
        """Keep what the model says now, by the samples' ids, on the CPU. Of a sharded model all ranks must."""
        self._original = {}
        for samples in batches:
            original = _logits_of(model, samples, device, self.top).to("cpu")
            ends_B = samples.response_lengths.cumsum(0).tolist()
            for name, start, end in zip(samples.ids, [0, *ends_B], ends_B, strict=False):
                self._original[name] = original[start:end]

    def loss(self, model: nn.Module, samples: Samples, device: torch.device) -> Tensor:
        """A scalar, summed over the samples' response tokens; run its backward pass inside `evaluation_mode`.

        Raises:
            RPSAError: a sample has not been recorded.
        """
        original = self._original_of(model, samples, device)
        logits_RV, rows_N = response_logits(model, samples, samples.responses(), device)
        rows_N = rows_N.to(logits_RV.device)
        total = logits_RV.new_zeros((), dtype=torch.float32)
        if self.kl:
            total = total + self.kl * forward_kl(original, logits_RV, rows_N).sum()
        if self.der:
            total = total + self.der * squared_distance(original, logits_RV, rows_N).sum()
        return total

    def _original_of(self, model: nn.Module, samples: Samples, device: torch.device) -> OriginalLogits:
        if self._without_adapter is not None:
            with self._without_adapter():
                return _logits_of(model, samples, device, None)
        if missing := [name for name in samples.ids if name not in self._original]:
            raise RPSAError(f"sample {missing[0]!r} was not recorded before training: record it")
        return OriginalLogits.joined([self._original[name] for name in samples.ids]).to(device)

    # In files, for a run that goes on

    def save(self, path: Path) -> None:
        """Write what was recorded."""
        lengths = {name: len(one) for name, one in self._original.items()}
        OriginalLogits.joined(list(self._original.values())).save(path, {"lengths": json.dumps(lengths)})

    def load(self, path: Path, ids: Iterable[str]) -> None:
        """Read what was recorded of the samples with these ids.

        Raises:
            RPSAError: there is no such file, or it is of other samples.
        """
        if not path.is_file():
            raise RPSAError(
                f"{path}: missing, so that what the original model said is not known; start without "
                "resume_from_checkpoint"
            )
        with reading(str(path)):
            whole, about = OriginalLogits.load(path)
            lengths: dict[str, int] = json.loads(about["lengths"])
        if set(lengths) != set(ids):
            raise RPSAError(f"{path}: of other samples than these; start without resume_from_checkpoint")
        ends = itertools.accumulate(lengths.values())
        self._original = {
            name: whole[end - length : end] for (name, length), end in zip(lengths.items(), ends, strict=True)
        }


@torch.no_grad()
def _logits_of(model: nn.Module, samples: Samples, device: torch.device, top: int | None) -> OriginalLogits:
    with evaluation_mode(model):
        logits_RV, rows_N = response_logits(model, samples, samples.responses(), device)
    original = OriginalLogits.of(logits_RV, rows_N.to(logits_RV.device), top)
    reshard(model)
    return original
