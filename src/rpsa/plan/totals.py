"""The whole study: what is done how often and on how many GPUs, and what that comes to in hours, money and bytes.

Stages follow one another (`rpsa.pipeline.runner`). Within one, `matrix.parallel` workers, each on one GPU, take the
tasks as they come; Fisher and training go through `accelerate launch` instead where the recipe has a section `launch`,
one task after the other on all GPUs.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpsa.errors import RPSAError
from rpsa.plan.time import GPUS, Gpu
from rpsa.provenance import Stage
from rpsa.recipe.loading import parse_yaml
from rpsa.recipe.schema import Recipe

_ORDER: tuple[Stage, ...] = ("reference", "safety", "fisher", "align", "evaluate", "robustness")
_LAUNCHED: tuple[Stage, ...] = ("fisher", "align")


@dataclass(frozen=True)
class Work:
    """Something that the study does `times`.

    `seconds` of one: by GPU name, and by the number of GPUs that do it together; without those that cannot hold it.
    `arithmetic`: how that comes about, on GPUs of the kind that the plan is for.
    """

    stage: Stage
    name: str
    times: int
    seconds: Mapping[str, Mapping[int, float]]
    arithmetic: Sequence[str] = ()


@dataclass(frozen=True)
class Bytes:
    """`size` on disk; `passing`: only while something runs."""

    name: str
    size: int
    arithmetic: str
    passing: bool = False


@dataclass(frozen=True)
class Total:
    """The study on so many GPUs, which are there from beginning to end.

    `seconds` with `matrix.parallel` (and `launch`, where it is needed) as many; `as_written` with the recipe's own
    `matrix.parallel`. None where something does not fit. `usd` None where no price is known.
    """

    gpus: int
    seconds: float | None
    as_written: float | None
    usd: float | None

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.gpus * self.seconds / 3600


@dataclass(frozen=True)
class Calls:
    """What a judge behind an endpoint is asked by the whole study: nobody here knows how long it takes."""

    judge: str
    calls: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Study:
    """`gpu` is the kind that `totals` are of; `gpus` the number that the recipe is written for, or the fewest."""

    gpu: str
    memory: float
    """GiB of one."""
    gpus: int | None
    launched: bool
    """Whether training and Fisher go through `accelerate launch`, one after the other on all GPUs."""
    totals: list[Total]
    calls: list[Calls]
    disk: list[Bytes]
    download: list[Bytes]

    @property
    def total(self) -> Total | None:
        return next((total for total in self.totals if total.gpus == self.gpus), None)

    @property
    def disk_bytes(self) -> int:
        """The most that is there at once, without the downloads: what is left, and the largest that passes."""
        passing = max((one.size for one in self.disk if one.passing), default=0)
        return sum(one.size for one in self.disk if not one.passing) + passing

    @property
    def download_bytes(self) -> int:
        return sum(one.size for one in self.download)


def in_order(works: Sequence[Work]) -> list[Work]:
    """As their stages come."""
    return sorted(works, key=lambda work: _ORDER.index(work.stage))


def kind_of(gpu_memory: float) -> Gpu:
    """The first kind of GPU that has the memory planned for, or at least as much; else the one with the most."""
    enough = sorted((gpu for gpu in GPUS if gpu.memory >= gpu_memory), key=lambda gpu: gpu.memory)
    return enough[0] if enough else max(GPUS, key=lambda gpu: gpu.memory)


def make_study(
    recipe: Recipe,
    gpu: Gpu,
    gpus: Sequence[int],
    usd_per_hour: float | None,
    works: list[Work],
    calls: list[Calls],
    disk: list[Bytes],
    download: list[Bytes],
) -> Study:
    is_launched = recipe.launch is not None or not all(
        1 in work.seconds.get(gpu.name, {1: 0.0}) for work in works if work.stage in _LAUNCHED
    )
    totals = []
    for number in gpus:
        seconds, as_written = (
            wall_seconds(works, gpu.name, number, parallel, launched=is_launched)
            for parallel in (number, min(number, recipe.matrix.parallel))
        )
        paid = None if usd_per_hour is None or seconds is None else number * seconds / 3600 * usd_per_hour
        totals.append(Total(number, seconds, as_written, paid))
    possible = [total.gpus for total in totals if total.seconds is not None]
    own = _processes(recipe) or recipe.matrix.parallel
    chosen = own if own > 1 and own in possible else min(possible, default=None)
    return Study(gpu.name, gpu.memory, chosen, is_launched, totals, calls, disk, download)


def wall_seconds(
    works: Sequence[Work], gpu: str, gpus: int, parallel: int, *, launched: bool
) -> float | None:
    """From beginning to end on `gpus` GPUs of a kind, with `parallel` workers; None where something does not fit."""
    total = 0.0
    for stage in _ORDER:
        of_stage = [work for work in works if work.stage == stage]
        together = launched and stage in _LAUNCHED
        tasks: list[float] = []
        most = 1
        for work in of_stage:
            possible = [n for n in work.seconds.get(gpu, {}) if n <= gpus]
            if not possible:
                return None
            number = max(possible) if together else min(possible)
            most = max(most, number)
            tasks += [work.seconds[gpu][number]] * work.times
        total += makespan(tasks, 1 if together else max(1, min(parallel, gpus // most)))
    return total


def makespan(tasks: Sequence[float], workers: int) -> float:
    """When the last of `tasks` ends, each taken by the first worker that is free."""
    free = [0.0] * workers
    for seconds in tasks:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def _processes(recipe: Recipe) -> int | None:
    """Those that the section launch starts, all machines together."""
    launch = recipe.launch
    if launch is None:
        return None
    if launch.num_processes:
        return launch.num_processes
    if launch.config is None:
        return 1
    try:
        content = parse_yaml(Path(launch.config).read_text(encoding="utf-8"), launch.config)
    except OSError as error:
        raise RPSAError(f"launch.config: {launch.config} cannot be read: {error.strerror}") from error
    return int(content.get("num_processes", 1)) if isinstance(content, dict) else 1
