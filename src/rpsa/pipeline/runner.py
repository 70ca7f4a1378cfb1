"""Running tasks: one after the other here, or side by side in worker processes; finished ones are never repeated.

A task that fails does not end the others: why is one line, which is kept beside its folder until it has succeeded.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rpsa.artifacts import DISK_MESSAGES, atomic_write, refuse_foreign, replace_directory, stable_json
from rpsa.errors import RPSAError
from rpsa.pipeline.alignment import Diverged
from rpsa.pipeline.launch import end_with_parent
from rpsa.pipeline.manifests import MANIFEST, identity, is_current, write_manifest
from rpsa.pipeline.models import free_memory
from rpsa.pipeline.quiet import quiet
from rpsa.pipeline.stages import WORK
from rpsa.pipeline.tasks import (
    Progress,
    Task,
    failure_file,
    inputs_of,
    no_progress,
    place_of,
    unfinished_folder,
    unfinished_folders,
)
from rpsa.recipe.schema import Recipe
from rpsa.sharding import barrier, rank, world_size
from rpsa.text import printable

__all__ = ["Failure", "attempt", "attempt_all", "check", "failure_of", "forget_failure", "quiet", "workers"]

_OF_THE_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
}
TRACEBACK = "traceback.txt"


@dataclass(frozen=True)
class Failure:
    """Why a task has no result, in one line. `final`: doing it again with the same inputs would end alike."""

    why: str
    final: bool = False


def attempt(recipe: Recipe, task: Task, progress: Progress = no_progress) -> Failure | None:
    """Do one task; None if it has succeeded. Its folder appears when it is complete.

    Several ranks do it together and rank 0 keeps the folders; where one of them fails all have to end, and so the
    error is raised.

    Raises:
        OSError: the disk is full, or something else that every other task would meet as well.
    """
    key = identity(task.stage, inputs_of(recipe, task))
    known = failure_of(task, key)
    if known is not None and known.final:
        return known
    try:
        _perform(recipe, task, key, progress)
        return None
    except Exception as error:
        if is_of_the_machine(error):
            raise
        failure = _failure(error, unfinished_folder(task, key))
        record = {"why": failure.why, "final": failure.final, "of": key}
        atomic_write(failure_file(task), stable_json(record))
        if world_size() > 1:
            raise
    free_memory()
    return failure


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error is about the disk, not about the task. Some libraries report that in words alone."""
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return True
    return any(said in str(error) for said in DISK_MESSAGES)


def failure_of(task: Task, key: str | None = None) -> Failure | None:
    """What kept the task from its result when it was last tried (with these inputs, if a `key` is given)."""
    try:
        record = json.loads(failure_file(task).read_text(encoding="utf-8"))
        failure = Failure(str(record["why"]), bool(record["final"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return failure if key in (None, record["of"]) else None


def forget_failure(task: Task) -> None:
    """So that a record that is found afterwards is a new one."""
    failure_file(task).unlink(missing_ok=True)


def _failure(error: Exception, folder: Path) -> Failure:
    if isinstance(error, RPSAError):
        return Failure(printable(str(error)), final=isinstance(error, Diverged))
    if isinstance(error, OSError) and error.strerror:
        return Failure(printable(": ".join(part for part in (error.strerror, error.filename) if part)))
    place = folder / TRACEBACK
    place.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    said = printable(str(error).strip().partition("\n")[0])
    return Failure(f"{type(error).__name__}: {said} (more in {place})")


def _perform(recipe: Recipe, task: Task, key: str, progress: Progress) -> None:
    """What can be resumed waits beside the task's folder in a hidden one, which belongs to these very inputs."""
    inputs, unfinished = inputs_of(recipe, task), unfinished_folder(task, key)
    refuse_foreign(task.folder, MANIFEST)
    unfinished.mkdir(parents=True, exist_ok=True)
    # what a process finished that was killed before it could put the folder in its place
    finished = is_current(unfinished, task.stage, inputs)
    barrier()
    if not finished:
        WORK[task.stage](recipe, task, unfinished, progress)
        free_memory()
        barrier()
        if rank() == 0:
            (unfinished / TRACEBACK).unlink(missing_ok=True)
            write_manifest(unfinished, task.stage, inputs, place_of(recipe, task))
    if rank() == 0:
        replace_directory(unfinished, task.folder)
        forget_failure(task)
        for stale in unfinished_folders(task):
            shutil.rmtree(stale)
    barrier()


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that import once and do task after task, each on its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // count)
    executor = ProcessPoolExecutor(
        count, get_context("spawn"), initializer=_start_worker, initargs=(threads,)
    )
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=True, cancel_futures=True)
        raise
    executor.shutdown()


def attempt_all(
    executor: ProcessPoolExecutor, recipe: Recipe, tasks: list[Task]
) -> Iterator[tuple[Task, Failure | None]]:
    """Do tasks side by side; yields each as it ends, with why it failed.

    Raises:
        OSError: see `attempt`; tasks that are running come to their end first, the rest is not begun.
        RPSAError: a worker process was killed.
    """
    futures: dict[Future[Failure | None], Task] = {
        executor.submit(_attempt_quietly, recipe, task): task for task in tasks
    }
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise RPSAError(
            "a worker process was killed, perhaps for want of memory: lower matrix.parallel; the same command "
            "goes on from what is finished"
        ) from None
    finally:
        for future in futures:
            future.cancel()


def _start_worker(threads: int) -> None:
    import torch

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet()


def _attempt_quietly(recipe: Recipe, task: Task) -> Failure | None:
    # Ctrl-C reaches every process of the terminal: a worker at work stops there, an idle one stays silent
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            return attempt(recipe, task)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()


def check(recipe: Recipe) -> None:
    """Here, so that a worker can do it."""
    from rpsa.pipeline.preflight import preflight

    preflight(recipe)
