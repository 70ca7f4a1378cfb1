"""A finding: one thing that was looked at, and what to do if it is not as it should be."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """`state`: "note" is worth knowing and stops nothing, with "missing" something will fail."""

    about: str
    state: State
    said: str
