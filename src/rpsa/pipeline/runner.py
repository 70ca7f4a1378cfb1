"""Running tasks: one after the other here, or side by side in worker processes; finished ones are never repeated."""

import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rpsa.artifacts import sha256_of, write_manifest
from rpsa.pipeline.evaluation import Progress, no_progress
from rpsa.pipeline.models import free_memory
from rpsa.pipeline.quiet import quiet
from rpsa.pipeline.stages import WORK, check_settings
from rpsa.pipeline.tasks import Task, inputs_of
from rpsa.recipe.schema import Recipe
from rpsa.sharding import barrier, rank

__all__ = ["check_settings", "perform", "perform_all", "quiet", "workers"]


def perform(recipe: Recipe, task: Task, progress: Progress = no_progress) -> None:
    """Do one task. Its folder appears when it is complete; what can be resumed waits beside it in a hidden one.

    Several ranks do it together, and rank 0 keeps the folders.
    """
    inputs = inputs_of(recipe, task)
    unfinished = task.folder.with_name(f".{task.folder.name}.{sha256_of(inputs)[:8]}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    WORK[task.stage](recipe, task, unfinished, progress)
    free_memory()
    barrier()
    if rank() == 0:
        _finish(task, unfinished, inputs)
    barrier()


def _finish(task: Task, unfinished: Path, inputs: dict[str, Any]) -> None:
    write_manifest(unfinished, task.stage, inputs)
    if task.folder.exists():
        shutil.rmtree(task.folder)
    unfinished.rename(task.folder)
    for stale in task.folder.parent.glob(f".{task.folder.name}.*.unfinished"):
        shutil.rmtree(stale)


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


def perform_all(executor: ProcessPoolExecutor, recipe: Recipe, tasks: list[Task]) -> Iterator[Task]:
    """Do tasks side by side; yields each as it finishes.

    The first failure is raised once the tasks that are running have come to their end; the rest is not begun.
    """
    futures: dict[Future[None], Task] = {
        executor.submit(_perform_quietly, recipe, task): task for task in tasks
    }
    try:
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        for future in futures:
            future.cancel()


def _start_worker(threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet()


def _perform_quietly(recipe: Recipe, task: Task) -> None:
    # Ctrl-C reaches every process of the terminal: a worker at work stops there, an idle one stays silent
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            perform(recipe, task)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
