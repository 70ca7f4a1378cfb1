"""Termination: what SIGTERM does to a run, as clusters send it before they take a machine away.

It ends a run as Ctrl-C does. Training first finishes its step and writes a checkpoint; launched processes are told by
the one that launched them, and end at the same step.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

CODE = 130
"""The exit code of a command that was ended so."""
_asked = threading.Event()


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it has been obeyed."""


@contextmanager
def _answering(answer: Callable[[], None]) -> Iterator[None]:
    """Within, SIGTERM calls `answer`, if this is the main thread, where alone it can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def answered(number: int, frame: Any) -> None:
        answer()

    before = signal.signal(signal.SIGTERM, answered)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interrupting() -> Iterator[None]:
    """Within, SIGTERM raises Terminated, and reaches the workers of this process."""

    def interrupt() -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise Terminated

    _asked.clear()
    with _answering(interrupt):
        yield


@contextmanager
def waiting() -> Iterator[None]:
    """Within, SIGTERM has to wait until somebody asks whether it came."""
    with _answering(_asked.set):
        yield


def is_asked() -> bool:
    """Whether SIGTERM is waiting."""
    return _asked.is_set()


def obey(said: str = "") -> None:
    """Raise Terminated, with what the user is told."""
    _asked.clear()
    raise Terminated(said)


@contextmanager
def handing_on() -> Iterator[threading.Event]:
    """Within, SIGTERM goes to the processes that this one has started; yields whether it came."""
    import psutil

    asked = threading.Event()

    def hand_on() -> None:
        asked.set()
        children = psutil.Process().children()
        if not children:
            raise Terminated
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.terminate()

    with _answering(hand_on):
        yield asked
