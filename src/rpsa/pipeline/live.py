"""What runs now: each task writes a small file beside its folder while it works, which every process may read.

The runner shows them as they change, whether a task is done here, by a worker or by launched ranks; `rpsa status`
shows them from another shell. How long the rest takes is said by the tasks that are finished.
"""

import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rpsa.artifacts import read_json
from rpsa.pipeline.tasks import Task, read_manifest
from rpsa.progress import Progress, duration, no_progress
from rpsa.provenance import TIMING, Stage
from rpsa.sharding import rank
from rpsa.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_EVERY = 1.0
"""Seconds between two writes, and those after the first call in which what was stored before is told at once."""
_SLOW, _SLOW_FROM = 2.0, 60.0
"""Slow is what has taken this many times as long as its like, and at least so many seconds."""


@dataclass(frozen=True)
class Pulse:
    """How far a task is.

    Attributes:
        began, updated: seconds since the epoch.
        unit: what is counted; empty before anything is.
        base, first_tokens: time, and done or tokens, from which the pace counts: what an earlier process did has none.
        told: when `tokens` last changed; it comes with logs, more rarely than steps.
    """

    stage: str
    name: str
    process: int
    host: str
    began: float
    updated: float
    done: int = 0
    total: int = 0
    unit: str = ""
    tokens: int | None = None
    told: float = 0.0
    base: tuple[float, int] | None = None
    first_tokens: tuple[float, int] | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float | None:
        """None before there is a pace."""
        if self.base is None or self.done <= self.base[1]:
            return None
        return (self.total - self.done) * (self.updated - self.base[0]) / (self.done - self.base[1])

    @property
    def tokens_per_second(self) -> float | None:
        if self.first_tokens is None or self.tokens is None or self.told <= self.first_tokens[0]:
            return None
        return (self.tokens - self.first_tokens[1]) / (self.told - self.first_tokens[0])

    @property
    def is_alive(self) -> bool:
        """Whether its process is there, as far as that can be known from this machine."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def __str__(self) -> str:
        if not self.total:
            return f"starting, {duration(time.time() - self.began)}"
        parts = [f"{self.unit} {self.done:,}/{self.total:,}".strip()]
        parts += [f"{name} {value:.3g}" for name, value in self.figures.items()]
        if (speed := self.tokens_per_second) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        if (left := self.seconds_left) is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


class Telling:
    """A `Progress` that keeps a task's pulse in `path`."""

    def __init__(self, task: Task, path: Path, clock: Callable[[], float] = time.time) -> None:
        now = clock()
        self.pulse = Pulse(task.stage, task.name, os.getpid(), socket.gethostname(), now, now)
        self._path = path
        self._clock = clock
        self._first: float | None = None
        self._written = now
        self._write()

    def __call__(
        self, done: int, total: int, *, unit: str = "", tokens: int | None = None, **figures: float
    ) -> None:
        now, before = self._clock(), self.pulse
        if self._first is None:
            self._first = now
        known = before.tokens if tokens is None else tokens
        base, first_tokens = before.base, before.first_tokens
        if base is None or now - self._first < _EVERY or (before.unit and unit != before.unit):
            base, first_tokens = (now, done), None
        if first_tokens is None and known is not None:
            first_tokens = (now, known)
        self.pulse = replace(
            before,
            updated=now,
            done=done,
            total=total,
            unit=unit,
            tokens=known,
            told=now if known != before.tokens else before.told,
            base=base,
            first_tokens=first_tokens,
            figures=figures or before.figures,
        )
        if now - self._written >= _EVERY or done == total:
            self._written = now
            self._write()

    @staticmethod
    def new(path: Path) -> Path:
        """Where the next pulse is written before it takes its place."""
        return path.with_name(f"{path.name}.new")

    def _write(self) -> None:
        """No lock and no sync: the next one comes in a second. A reader sees the old or the new."""
        new = self.new(self._path)
        new.write_text(json.dumps(asdict(self.pulse)), encoding="utf-8")
        new.replace(self._path)


@contextmanager
def telling(task: Task) -> Iterator[Progress]:
    """Within, the task's pulse is kept; of several ranks by the first."""
    if rank() > 0:
        yield no_progress
        return
    task.live_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield Telling(task, task.live_file)
    finally:
        for path in (task.live_file, Telling.new(task.live_file)):
            path.unlink(missing_ok=True)


def pulse_of(task: Task) -> Pulse | None:
    """How far the task is; None where nobody is at it."""
    try:
        found = json.loads(task.live_file.read_text(encoding="utf-8"))
        pairs = {name: tuple(found[name]) for name in ("base", "first_tokens") if found[name]}
        return Pulse(**{**found, **pairs})
    except (OSError, ValueError, TypeError, KeyError):
        return None


class TimeLeft:
    """How long tasks take, as their like took that is finished."""

    def __init__(self) -> None:
        self._seconds: dict[Path, float] = {}
        self._kinds: dict[str, list[float]] = {}

    def learn(self, tasks: Iterable[Task]) -> None:
        """From those that are finished; each is read once."""
        for task in tasks:
            if task.folder in self._seconds:
                continue
            try:
                seconds = float(read_json(task.folder / TIMING)["seconds"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            self._seconds[task.folder] = seconds
            for kind in (task.stage, task.kind):
                self._kinds.setdefault(kind, []).append(seconds)

    def of(self, task: Task) -> float | None:
        """The median of its kind, else of its stage, else None."""
        return _median(self._kinds, task)

    def is_slow(self, task: Task, pulse: Pulse) -> bool:
        """Whether it has taken far longer than others of its very kind."""
        known = self._kinds.get(task.kind)
        if not known:
            return False
        return time.time() - pulse.began > max(_SLOW_FROM, _SLOW * statistics.median(known))

    def left(self, waiting: Iterable[Task], parallel: int) -> tuple[float, set[Stage]]:
        """Seconds that the tasks still take side by side, and the stages of which nothing is known.

        Where no task of a stage has ended, those that run tell how long another one will take.
        """
        now = time.time()
        each: list[float] = []
        others: list[tuple[Task, Pulse | None]] = []
        running: dict[str, list[float]] = {}
        for task in waiting:
            pulse = pulse_of(task)
            if pulse is None or pulse.seconds_left is None:
                others.append((task, pulse))
                continue
            each.append(pulse.seconds_left)
            for kind in (task.stage, task.kind):
                running.setdefault(kind, []).append(now - pulse.began + pulse.seconds_left)
        unknown: set[Stage] = set()
        for task, pulse in others:
            usual = self.of(task) or _median(running, task)
            if usual is None:
                unknown.add(task.stage)
            else:
                each.append(max(0.0, usual - (now - pulse.began if pulse else 0.0)))
        return max(sum(each) / parallel, max(each, default=0.0)), unknown


def _median(seconds: Mapping[str, Sequence[float]], task: Task) -> float | None:
    known = seconds.get(task.kind) or seconds.get(task.stage)
    return statistics.median(known) if known else None


def is_finished(task: Task) -> bool:
    """Whether there is a result, of whatever inputs: what is asked often must not hash models."""
    return read_manifest(task.folder) is not None


def left_in_words(seconds: float, unknown: Iterable[str]) -> str:
    beside = sorted(unknown)
    if not seconds and beside:
        return ""
    return f"about {duration(seconds)} left" + (f", {' and '.join(beside)} not counted" if beside else "")


class Monitor:
    """Shows what runs while a run waits for it: on a terminal a line a task, in a log file one line now and then."""

    def __init__(
        self,
        bars: "Bars",
        tasks: Mapping[Stage, Sequence[Task]],
        parallel: int,
        every: float = 30.0,
    ) -> None:
        self._bars = bars
        self._tasks = tasks
        self._parallel = parallel
        self._every = every
        self._estimate = TimeLeft()
        self._stage: Stage | None = None
        self._waiting: dict[Path, Task] = {}
        self._later: list[Task] = []
        self._lines: dict[Path, TaskID] = {}
        self._said_slow: set[Path] = set()
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def begin(self, stage: Stage, waiting: Sequence[Task]) -> None:
        """What is done next; of the stages after it, whatever has no result is thought to be done, too."""
        with self._lock:
            self._stage, self._waiting = stage, {task.folder: task for task in waiting}
            stages = list(self._tasks)
            later = stages[stages.index(stage) + 1 :]
            self._later = [task for one in later for task in self._tasks[one] if not is_finished(task)]

    def ended(self, task: Task) -> None:
        with self._lock:
            del self._waiting[task.folder]
            self._take_off(task.folder)

    @contextmanager
    def watching(self) -> Iterator["Monitor"]:
        """A thread looks once a second."""
        if self._bars.disable:
            yield self
            return
        thread = threading.Thread(target=self._watch, name="rpsa-monitor", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While others show what they do."""
        with self._lock:
            yield

    def _watch(self) -> None:
        said = time.monotonic()
        while not self._is_over.wait(_EVERY):
            with self._lock:
                found = ((task, pulse_of(task)) for task in self._waiting.values())
                running = [(task, pulse) for task, pulse in found if pulse is not None]
                is_due = time.monotonic() - said >= self._every
                if is_due:
                    self._estimate.learn(task for tasks in self._tasks.values() for task in tasks)
                    said = time.monotonic()
                if self._bars.console.is_terminal:
                    self._show(running)
                elif is_due and running:
                    self._print(self.line(running))
                self._warn_of_slow(running)

    def line(self, running: Sequence[tuple[Task, Pulse]]) -> str:
        """Stage, how many are left, what runs, and the time left for the whole study."""
        left = left_in_words(*self._estimate.left([*self._waiting.values(), *self._later], self._parallel))
        total = len(self._tasks[self._stage]) if self._stage else 0
        parts = [f"{self._stage} {total - len(self._waiting)}/{total}"]
        parts += [f"{task.name}: {pulse}" for task, pulse in running]
        parts += [f"whole study: {left}"] if left else []
        return "; ".join(parts)

    def _show(self, running: Sequence[tuple[Task, Pulse]]) -> None:
        for task, pulse in running:
            if task.folder not in self._lines:
                self._lines[task.folder] = self._bars.add_task(
                    f"  {printable(task.name)}", total=None, now=""
                )
            self._bars.update(
                self._lines[task.folder], completed=pulse.done, total=pulse.total or None, now=str(pulse)
            )
        for folder in set(self._lines) - {task.folder for task, _ in running}:
            self._take_off(folder)

    def _take_off(self, folder: Path) -> None:
        if (line := self._lines.pop(folder, None)) is not None:
            self._bars.remove_task(line)

    def _warn_of_slow(self, running: Sequence[tuple[Task, Pulse]]) -> None:
        for task, pulse in running:
            if task.folder not in self._said_slow and self._estimate.is_slow(task, pulse):
                self._said_slow.add(task.folder)
                usual = self._estimate.of(task) or 0.0
                self._print(
                    f"slow: {task.stage} {task.name}: {duration(time.time() - pulse.began)} so far, "
                    f"others of its kind took {duration(usual)}"
                )

    def _print(self, text: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text(printable(text)), soft_wrap=True)
