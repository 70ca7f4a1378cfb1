"""The settings of Eq. 4's estimators."""

import re
from dataclasses import dataclass
from typing import Literal

from rpsa.errors import RPSAError, check_fields

Estimator = Literal["token_signs", "per_token", "per_sequence"]
OnNonfinite = Literal["skip", "stop"]
Precision = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class FisherConfig:
    """How Eq. 4 is estimated.

    Raises:
        RPSAError: a value is not possible.
    """

    estimator: Estimator = "token_signs"
    probes: int = 4
    """Backward passes a batch of `token_signs`: more of them, less noise. The others have no use for it."""
    seed: int = 42
    scope: str | None = None
    """A regular expression searched for in canonical parameter names; None: every trainable parameter."""
    on_nonfinite: OnNonfinite = "skip"
    """What to do about a sample whose log-probabilities or gradients are not finite; none is averaged in."""
    precision: Precision = "fp32"
    """How products of matrices are taken: as the weights' dtype has it; with TF32, on CUDA alone; or under bf16
    autocast. The sums are float32 whatever it is."""
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "fisher.")
        if self.probes < 1:
            raise RPSAError(f"fisher.probes is {self.probes}: use 1 or more")
        try:
            re.compile(self.scope or "")
        except re.error as error:
            raise RPSAError(f"fisher.scope {self.scope!r} is no regular expression: {error}") from None
