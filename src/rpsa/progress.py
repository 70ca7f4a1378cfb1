"""Progress: the one display of how far work has come, and the callback by which a stage tells."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bars


class Progress(Protocol):
    """Called with what is done and what there is, in `unit`s: steps, responses, sequences.

    `tokens` are those processed since the work began; `figures` are of the moment: loss, k, c.
    """

    def __call__(
        self, done: int, total: int, *, unit: str = "", tokens: int | None = None, **figures: float
    ) -> None: ...


def no_progress(
    done: int, total: int, *, unit: str = "", tokens: int | None = None, **figures: float
) -> None:
    """Tells nobody."""


def duration(seconds: float) -> str:
    """As `7:05` or `1:07:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
