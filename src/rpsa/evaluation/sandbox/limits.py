"""How much a program may use, and what became of it."""

from dataclasses import dataclass
from typing import Literal

Ending = Literal["exit", "timeout", "output"]


@dataclass(frozen=True)
class Limits:
    """Limits on one run of one program. All are hard: what goes beyond fails or is killed."""

    seconds: float = 10.0
    """Wall time; processor time of a process is bounded by the same, and a second."""
    memory_mb: int = 1024
    """Address space of each process; a tree of processes can hold `processes` times as much."""
    scratch_mb: int = 16
    """Size of the one folder that can be written to, /tmp; it lies in memory."""
    file_mb: int = 16
    processes: int = 16
    """Processes and threads."""
    open_files: int = 64
    output_bytes: int = 1 << 16
    """What is read of stdout and stderr together; a program that writes more is ended."""


@dataclass(frozen=True)
class Finished:
    """What a program did: `ending` says whether it ended by itself, at its time, or at its output's limit."""

    ending: Ending
    exit_code: int | None
    """None unless it ended by itself; 128 + n if by signal n."""
    output: str
    """stdout and stderr as they came, up to the limit."""
    seconds: float
    tier: str
    """Name and version of the sandbox."""
