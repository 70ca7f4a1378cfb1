"""What takes long to make and is only read: made by one of pytest's workers, for all of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """The folder that `fill` has filled, in this process or in another worker of the same session."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / f"shared-{name}"
    with FileLock(base / f"shared-{name}.lock"):
        if not folder.exists():
            unfinished = base / f"unfinished-{name}"
            unfinished.mkdir()  # not there already: what failed in another worker fails in this one, too
            fill(unfinished)
            unfinished.rename(folder)
    return folder
