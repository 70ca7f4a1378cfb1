"""A small model, its Fisher, a backward pass and a ratio that grows: what the tests of freezing share."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from helpers.devices import DEVICE
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.audit import Audit
from rpsa.freezing.freezer import Freezer
from rpsa.parameters import trainable_parameters


@dataclass
class GrowingRatio:
    """Freezes more at every measurement: what exposes stale momentum."""

    ks: list[float] = field(default_factory=lambda: [0.3, 0.6, 0.6, 0.9])
    every: int = 2
    seen: int = 0

    def initial(self) -> float:
        return 0.1

    def update(self, conflict: float) -> float:
        self.seen += 1
        return self.ks[min(self.seen, len(self.ks)) - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return layers.to(DEVICE, dtype)


def make_fisher(model: nn.Module, seed: int = 1) -> FisherDiagonal:
    """A quarter zeros, some ties."""
    generator = torch.Generator().manual_seed(seed)
    return FisherDiagonal(
        {
            n: (torch.randint(0, 40, p.shape, generator=generator).float() - 10).clamp_min(0)
            for n, p in trainable_parameters(model).items()
        }
    )


def forward_backward(model: nn.Module, seed: int, scale: float | Tensor = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (6, 3), generator=generator).to(DEVICE)
    target = torch.randn(6, 3, 4, generator=generator).to(DEVICE)
    ((model(ids) - target).square().mean() * scale).backward()


def audited(
    model: nn.Module, freezer: Freezer, optimizer: Any, steps: int = 8
) -> tuple[dict[str, Any], list[float]]:
    """Train with an attached freezer; returns what the audit has found, and k at each step."""
    audit, ks = Audit(freezer), []
    audit.open()
    for step in range(steps):
        if freezer.reference_due:
            forward_backward(model, 1000 + step)
            freezer.capture_reference()
        forward_backward(model, step)
        freezer.mask_gradients()
        audit.next_interval()
        ks.append(freezer.frozen_ratio)
        optimizer.step()
        optimizer.zero_grad()
    audit.close()
    return audit.report(), ks
