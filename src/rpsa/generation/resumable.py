"""Resumable generation: every completion is on disk before it is yielded, and a stopped run goes on from there.

How far generation is, how fast, and how long it may still take (`track`), for any backend.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rpsa.artifacts import appending, atomic_write, reading_records, recover_lines, sha256_of
from rpsa.errors import RPSAError
from rpsa.generation import Completion, Generator, Sampling, check_lengths
from rpsa.progress import duration, progress_bars

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

    @property
    def speed(self) -> str:
        """Tokens a second, and the time left."""
        left = "?" if self.seconds_left is None else duration(self.seconds_left)
        return f"{self.tokens / self.seconds:,.0f} tokens/s, {left} left"

    def __str__(self) -> str:
        return f"{self.done}/{self.total}, {self.speed}"


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
    with progress_bars() as bar:
        shown = bar.add_task(label, total=pace.total, completed=pace.done, now=pace.speed)
        for index, completion in completions:
            pace.add(completion)
            bar.update(shown, completed=pace.done, now=pace.speed)
            yield index, completion


FORMAT = 1


def generate_resumable(
    generator: Generator,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    sample_ids: Sequence[str],
    path: str | Path,
    identity: str = "",
    label: str | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) as `generator` does, those that `path` holds already first.

    `path` is a JSONL: a header with the sampling and `identity` (what else decides the responses: the model's
    path or fingerprint), then a record for each sample with its id and the hash of its prompt. A line that a
    crash cut off is removed and its sample made again; samples may be added later. `label` shows progress.

    Raises RPSAError if two samples share an id, or if the file was made with another sampling or identity,
    holds a sample whose prompt is another one, or is damaged. Samples that are not asked for stay in the file.
    """
    check_lengths(prompts, sample_ids)
    index_of = {sample_id: index for index, sample_id in enumerate(sample_ids)}
    if len(index_of) < len(sample_ids):
        twice = next(name for i, name in enumerate(sample_ids) if index_of[name] != i)
        raise RPSAError(f"two samples have the id {twice!r}: ids must be unique")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "identity": identity, "sampling": asdict(sampling)}
    lines = recover_lines(target)
    with reading_records(target):
        if lines:
            _check_header(target, lines[0], header)
        stored = _stored(target, lines[1:], prompts, index_of)
    yield from stored.items()
    missing = [i for i in range(len(prompts)) if i not in stored]
    if not missing:
        return
    completions = generator.generate(
        [prompts[i] for i in missing], sampling, [sample_ids[i] for i in missing]
    )
    if label is not None:
        completions = track(completions, len(prompts), label, done=len(stored))
    with appending(target) as append:
        if not lines:
            append(header)
        for position, completion in completions:
            index = missing[position]
            key = {"id": sample_ids[index], "prompt_sha256": _prompt_hash(prompts[index])}
            append(key | asdict(completion))
            yield index, completion


def in_order(path: Path, sample_ids: Sequence[str]) -> None:
    """Put the records of a file into the order of `sample_ids`, others last, however often it was interrupted."""
    header, *records = recover_lines(path)
    places = {name: place for place, name in enumerate(sample_ids)}
    ordered = sorted(records, key=lambda record: places.get(record["id"], len(places)))
    if ordered != records:
        atomic_write(path, _lines([header, *ordered]))


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _check_header(path: Path, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    if found.keys() != header.keys() or found["format"] != FORMAT:
        raise RPSAError(f"{path} does not hold completions: give another path or delete it")
    for name in ("identity", "sampling"):
        if found[name] != header[name]:
            raise RPSAError(
                f"{path} was made with {name} {found[name]!r}, not {header[name]!r}: give another path or delete it"
            )


def _stored(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    prompts: Sequence[list[int]],
    index_of: Mapping[str, int],
) -> dict[int, Completion]:
    """Completions by index, in the order of the file."""
    found: dict[int, Completion] = {}
    for number, record in enumerate(records, start=2):
        index = index_of.get(record["id"])
        if index is None:
            continue  # of another call, with other tasks or more samples
        if record["prompt_sha256"] != _prompt_hash(prompts[index]):
            raise RPSAError(
                f"{path} line {number} answers another prompt ({record['id']!r}): give another path"
            )
        if index in found:
            raise RPSAError(f"{path} line {number} repeats {record['id']!r}: did two processes write to it?")
        found[index] = Completion(
            record["token_ids"], record["text"], record["finish_reason"], record["exact"]
        )
    return found


def _prompt_hash(prompt: list[int]) -> str:
    return sha256_of(list(prompt))


def carry_over(
    earlier: Path,
    path: Path,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    sample_ids: Sequence[str],
    identity: str,
) -> None:
    """Start `path` with those completions of an `earlier` file that `generate_resumable` would make again as they are.

    Does nothing if `path` is there already, or if the earlier file is absent or was made in another way.
    """
    lines = recover_lines(earlier)
    header = {"format": FORMAT, "identity": identity, "sampling": asdict(sampling)}
    if path.exists() or not lines or lines[0] != header:
        return
    wanted = {name: _prompt_hash(prompt) for name, prompt in zip(sample_ids, prompts, strict=True)}
    with reading_records(earlier):
        fitting = [record for record in lines[1:] if wanted.get(record["id"]) == record["prompt_sha256"]]
    atomic_write(path, _lines([header, *fitting]))
