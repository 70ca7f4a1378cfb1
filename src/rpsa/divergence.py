"""Divergence: how far a model's next-token distributions are from those of the model that it was before training.

The original's are recorded once (`OriginalLogits`): the logits of its most likely tokens, and the mass of all others
together. Where all tokens are kept it is exact; where `top` are, the others count as one token, so that a divergence
is never larger than the exact one.

Shapes: R rows of logits (all positions of a batch), N of them that predict a response token, V vocabulary, K tokens
kept, C rows at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rpsa.artifacts import atomic_write

TOP = 64
"""Tokens kept at each position, if not all."""

_CHUNK_ELEMENTS = 1 << 24
"""Elements of the logits that are widened to float32 at a time."""


@dataclass(frozen=True)
class OriginalLogits:
    """What a model gave at N positions, to be compared with what it gives later.

    Attributes:
        ids_NK: int64, the most likely tokens, all of them where K = V.
        logits_NK: theirs, float32, or float64 where the model's are, as are the other two.
        normalizers_N: log of the sum of all tokens' exp(logit).
        others_N: the same of the tokens that are not kept; -inf where K = V.
    """

    ids_NK: Tensor
    logits_NK: Tensor
    normalizers_N: Tensor
    others_N: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, logits_RV: Tensor, rows_N: Tensor, top: int | None = TOP) -> "OriginalLogits":
        """Of the given rows; `top` None keeps every token."""
        vocabulary = logits_RV.shape[1]
        kept = vocabulary if top is None else min(top, vocabulary)
        parts = []
        for chunk in _chunks(len(rows_N), vocabulary):
            logits_CV = _widened(logits_RV.index_select(0, rows_N[chunk]))
            if kept == vocabulary:
                ids_CK = torch.arange(vocabulary, device=logits_CV.device).expand(len(logits_CV), -1)
            else:
                ids_CK = logits_CV.topk(kept, dim=1, sorted=False).indices
            normalizers_C, others_C = _masses(logits_CV, ids_CK)
            parts.append((ids_CK, logits_CV.gather(1, ids_CK), normalizers_C, others_C))
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence["OriginalLogits"]) -> "OriginalLogits":
        """One after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def to(self, device: torch.device | str) -> "OriginalLogits":
        return OriginalLogits(*(getattr(self, field.name).to(device) for field in fields(self)))

    def save(self, path: Path, about: Mapping[str, str]) -> None:
        """Write a safetensors file, which appears whole, with what `about` says of the positions."""
        tensors = {
            "ids": self.ids_NK.int(),
            "logits": self.logits_NK,
            "normalizers": self.normalizers_N,
            "others": self.others_N,
        }
        atomic_write(path, save({name: t.contiguous() for name, t in tensors.items()}, dict(about)))

    @classmethod
    def load(cls, path: Path) -> tuple["OriginalLogits", dict[str, str]]:
        """What `save` wrote; OSError or SafetensorError where there is no such file."""
        with safe_open(path, "pt") as file:
            parts = (file.get_tensor(name) for name in ("logits", "normalizers", "others"))
            return cls(file.get_tensor("ids").long(), *parts), dict(file.metadata() or {})

    def __len__(self) -> int:
        return len(self.ids_NK)

    def __getitem__(self, positions: slice) -> "OriginalLogits":
        return OriginalLogits(*(getattr(self, field.name)[positions] for field in fields(self)))


def forward_kl(original: OriginalLogits, logits_RV: Tensor, rows_N: Tensor) -> Tensor:
    """KL(original || model) at each position, in nats: (N,), differentiable once in the logits.

    Its gradient is softmax(logits) - p at the tokens that were kept; it is 0, and so is the divergence, where the
    logits are the original's. The logits are kept as they are; the softmax is taken again in the backward pass.
    """
    result: Tensor = _ForwardKL.apply(
        logits_RV, rows_N, original.ids_NK, original.logits_NK, original.normalizers_N, original.others_N
    )  # type: ignore[no-untyped-call]
    return result


def squared_distance(original: OriginalLogits, logits_RV: Tensor, rows_N: Tensor) -> Tensor:
    """Mean over the tokens that were kept of (logit - the original's)^2, (N,) (DER: Buzzega et al., 2020)."""
    logits_NK = _widened(logits_RV[rows_N[:, None], original.ids_NK])
    return (logits_NK - original.logits_NK).square().mean(dim=1)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _masses(logits_CV: Tensor, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
    """log of the sum of exp(logit), (C,), of all tokens and of those that are not in `ids_CK`."""
    normalizers_C = logits_CV.logsumexp(dim=1)
    if ids_CK.shape[1] == logits_CV.shape[1]:
        return normalizers_C, torch.full_like(normalizers_C, -torch.inf)
    return normalizers_C, logits_CV.scatter(1, ids_CK, -torch.inf).logsumexp(dim=1)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_RV: Tensor,
        rows_N: Tensor,
        ids_NK: Tensor,
        logits_NK: Tensor,
        normalizers_N: Tensor,
        others_N: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(logits_RV, rows_N, ids_NK, logits_NK, normalizers_N, others_N)
        divergences = []
        for chunk in _chunks(len(rows_N), logits_RV.shape[1]):
            logits_CV = _widened(logits_RV.index_select(0, rows_N[chunk]))
            log_q_CK, log_q_others_C = _log_probs(logits_CV, ids_NK[chunk])
            log_p_CK = logits_NK[chunk] - normalizers_N[chunk, None]
            log_p_others_C = others_N[chunk] - normalizers_N[chunk]
            kept_C = _weighted(log_p_CK, log_q_CK).sum(dim=1)
            divergences.append(kept_C + _weighted(log_p_others_C, log_q_others_C))
        return torch.cat(divergences)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_RV, rows_N, ids_NK, logits_NK, normalizers_N, others_N = ctx.saved_tensors
        result_RV = torch.zeros_like(logits_RV)
        for chunk in _chunks(len(rows_N), logits_RV.shape[1]):
            ids_CK = ids_NK[chunk]
            logits_CV = _widened(logits_RV.index_select(0, rows_N[chunk]))
            log_q_CK, log_q_others_C = _log_probs(logits_CV, ids_CK)
            p_CK = (logits_NK[chunk] - normalizers_N[chunk, None]).exp()
            # d KL / d logit: q - p at a token that was kept, q (1 - p' / q') at another, p' and q' of all others
            ratio_C = (others_N[chunk] - normalizers_N[chunk] - log_q_others_C).exp().nan_to_num(1.0)
            delta_CV = logits_CV.softmax(dim=1) * (1 - ratio_C)[:, None]
            delta_CV = delta_CV.scatter(1, ids_CK, log_q_CK.exp() - p_CK)
            result_RV.index_copy_(0, rows_N[chunk], (delta_CV * gradient_N[chunk, None]).to(result_RV.dtype))
        return result_RV, None, None, None, None, None


def _log_probs(logits_CV: Tensor, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens that were kept, (C, K), and of all others together, (C,)."""
    normalizers_C, others_C = _masses(logits_CV, ids_CK)
    return logits_CV.gather(1, ids_CK) - normalizers_C[:, None], others_C - normalizers_C


def _weighted(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q); 0 where p is 0."""
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
