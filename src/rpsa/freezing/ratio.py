"""Frozen ratio k: constant, following the conflict between the gradients (Eq. 7), or noise as a control."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rpsa.errors import check_fields
from rpsa.settings import CONSTANT_RATIO, EVERY, SEED, SIGMA_SCALE, WINDOW, check

_UNDECIDED = 0.5
"""k until there is a baseline to compare a conflict with (section 3.3)."""


class FrozenRatio(Protocol):
    """What a `Freezer` asks of a ratio."""

    @property
    def every(self) -> int | None:
        """Optimizer steps between measurements of the conflict; None = it is never measured."""

    def initial(self) -> float:
        """k before the first measurement."""

    def update(self, conflict: float) -> float:
        """k after one more measurement."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class ConstantRatio:
    """The same k throughout (section 4.3 uses 0.6)."""

    value: float = CONSTANT_RATIO.default
    every: None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check(CONSTANT_RATIO, self.value)

    def initial(self) -> float:
        return self.value

    def update(self, conflict: float) -> float:
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


@dataclass
class ConflictRatio:
    """Eq. 7: k = clip((c - mu) / (sigma_scale sigma) + 0.5, 0, 1).

    mu and sigma (population) are those of the previous `window` measurements, the current one excluded; until
    there are as many, and where sigma is 0, k is 0.5. The equation divides by 2 sigma, which saturates at
    mu +- sigma; the paper's text describes mu +- 2 sigma, which is `sigma_scale=4`.
    """

    window: int = WINDOW.default
    every: int = EVERY.default
    sigma_scale: float = SIGMA_SCALE.default
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self)
        for setting in (WINDOW, EVERY, SIGMA_SCALE):
            check(setting, getattr(self, setting.name))

    def initial(self) -> float:
        return _UNDECIDED

    def update(self, conflict: float) -> float:
        previous = self.history[-self.window :]
        self.history.append(conflict)
        if len(previous) < self.window:
            return _UNDECIDED
        mean = math.fsum(previous) / self.window
        sigma = math.sqrt(math.fsum((c - mean) ** 2 for c in previous) / self.window)
        # The mean of equal floats may round off them: what is left is noise, not a spread.
        if sigma <= 1e-12:
            return _UNDECIDED
        return min(1.0, max(0.0, (conflict - mean) / (self.sigma_scale * sigma) + 0.5))

    @property
    def first_dynamic_step(self) -> int:
        """The first optimizer step (from 0) whose k can differ from 0.5."""
        return self.every * self.window

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = [float(c) for c in state["history"]]


@dataclass
class NoiseRatio(ConflictRatio):
    """The control for what the conflict is worth: Eq. 7 applied to white noise in its place.

    k has the law that it would have if c carried no information: the same window, first `window` measurements at
    0.5 and saturation. The conflict is measured as ever, so that a run costs the same and draws the same random
    numbers, and k ignores it. The n-th draw depends on (seed, n) alone, whatever else is random.
    """

    seed: int = SEED.default

    def update(self, conflict: float) -> float:
        return super().update(random.Random(f"{self.seed}:{len(self.history)}").gauss())
