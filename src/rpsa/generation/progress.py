"""How far generation is, how fast, and how long it may still take, for any backend."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from rpsa.generation import Completion

logger = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass
class Pace:
    """Counts responses and their tokens since it was made.

    The time left supposes that the remaining responses take as many tokens each as those so far, at the same
    speed. Where many are under way at once, short ones end first: early on it says too little.
    """

    total: int
    done: int = 0
    clock: Clock = time.monotonic
    tokens: int = 0
    responses: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def add(self, completion: Completion) -> None:
        self.done += 1
        self.responses += 1
        self.tokens += len(completion.token_ids)

    @property
    def seconds(self) -> float:
        """Since the start; never 0."""
        return max(self.clock() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None before the first token."""
        if not self.tokens:
            return None
        tokens_left = (self.total - self.done) * self.tokens / self.responses
        return tokens_left * self.seconds / self.tokens

    def __str__(self) -> str:
        left = "?" if self.seconds_left is None else _duration(self.seconds_left)
        return f"{self.done}/{self.total}, {self.tokens / self.seconds:,.0f} tokens/s, {left} left"


def track(
    completions: Iterable[tuple[int, Completion]],
    total: int,
    label: str,
    done: int = 0,
    every: float = 60.0,
    clock: Clock = time.monotonic,
) -> Iterator[tuple[int, Completion]]:
    """Pass `completions` on and show progress: a bar on a terminal, else a log line every `every` seconds.

    `done` of the `total` were there before and do not count for the speed.
    """
    pace = Pace(total, done, clock)
    if sys.stderr.isatty():
        yield from _with_bar(completions, pace, label)
        return
    last = clock()
    for index, completion in completions:
        pace.add(completion)
        if pace.done == total or clock() - last >= every:
            last = clock()
            logger.info("%s: %s", label, str(pace))
        yield index, completion


def _with_bar(
    completions: Iterable[tuple[int, Completion]], pace: Pace, label: str
) -> Iterator[tuple[int, Completion]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn(label), BarColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task(label, total=pace.total, completed=pace.done, pace=str(pace))
        for index, completion in completions:
            pace.add(completion)
            bar.update(shown, completed=pace.done, pace=str(pace))
            yield index, completion


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
