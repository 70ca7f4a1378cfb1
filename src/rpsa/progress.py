"""Progress: the one display of how far work has come, and the callback by which a stage tells."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Progress = Callable[[int, int], None]
"""Called with what is done and what there is."""


def no_progress(done: int, total: int) -> None:
    """For a run beside others, whose output would be in the way."""


def progress_bars(*, disable: bool = False) -> "Bars":
    """Bars on stderr: what, how far, the time it took, and in the field `now` of each task a word of the present."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}", style="dim", markup=False),
        console=Console(stderr=True),
        disable=disable,
    )
