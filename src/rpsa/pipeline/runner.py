"""Running tasks: one after the other here, side by side in worker processes, or through `accelerate launch`.

Finished ones are never repeated. A task that fails does not end the others: why is one line, which is kept beside its
folder until it has succeeded.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from rpsa.artifacts import DISK_MESSAGES, atomic_write, refuse_foreign, replace_directory, stable_json
from rpsa.errors import Diverged, RPSAError
from rpsa.models import free_memory, quiet
from rpsa.pipeline import launch, termination
from rpsa.pipeline.live import Monitor, telling
from rpsa.pipeline.stages import tasks_of
from rpsa.pipeline.tasks import MANIFEST, NO_RESULT, Task, is_current, keep, outdated, write_manifest
from rpsa.progress import progress_bars
from rpsa.provenance import TIMING, Stage
from rpsa.recipe.schema import Recipe
from rpsa.sharding import barrier, rank, world_size
from rpsa.text import printable

log = logging.getLogger(__name__)

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


class Run:
    """Does a recipe's tasks, in this process, in `matrix.parallel` workers, or through `accelerate launch`.

    `failed` has a line for each task that failed; `without_result` its folder, and those of what stands on it, with
    the reason.
    """

    def __init__(self, recipe: Recipe, keep_finished: bool) -> None:
        self.recipe = recipe
        self.keep_finished = keep_finished
        self.failed: list[str] = []
        self.without_result: dict[Path, str] = {}
        self._stack = contextlib.ExitStack()
        self._executor: Any = None
        self._bar: Any = None
        self._monitor: Any = None
        self._is_prepared = False

    def do(self, stages: list[Stage]) -> None:
        """Bring the stages up to date."""
        tasks_by_stage = {stage: tasks_of(self.recipe, stage) for stage in stages}
        with progress_bars(disable=rank() > 0) as self._bar, self._stack:
            monitor = Monitor(self._bar, tasks_by_stage, self.recipe.matrix.parallel)
            self._monitor = self._stack.enter_context(monitor.watching())
            for stage, tasks in tasks_by_stage.items():
                if not tasks:
                    continue
                waiting = self._waiting(tasks)
                if waiting:
                    self._prepare()
                done = len(tasks) - len(waiting)
                line = self._bar.add_task(stage, total=len(tasks), completed=done, now="")
                self._monitor.begin(stage, waiting)
                for task, failure in self._attempts(stage, waiting):
                    self._monitor.ended(task)
                    if failure is not None:
                        self._fail(task, failure.why)
                    self._bar.update(line, advance=1, now=printable(task.name))
                self._bar.update(line, now="" if waiting else "up to date")
        if not self._is_prepared:
            _record(self.recipe)

    def _waiting(self, tasks: list[Task]) -> list[Task]:
        """Those to be done now: not finished, and with results of all that they stand on."""
        waiting = []
        reasons: Counter[str] = Counter()
        for task in tasks:
            needed = task.needs()
            if failed := next((one for one in needed if one.folder in self.without_result), None):
                self.without_result[task.folder] = self.without_result[failed.folder]
                continue
            if self.keep_finished:
                for one in needed:
                    _keep(one)
            self._require(needed)
            inputs = task.inputs()
            if self.keep_finished:
                keep(task.folder, task.stage, inputs)
            if why := outdated(task.folder, task.stage, inputs):
                waiting.append(task)
                if why != [NO_RESULT]:
                    reasons[", ".join(why)] += 1
        for reason, count in reasons.items():
            log.warning("%s: %d finished, to be done again: %s", tasks[0].stage, count, reason)
        return waiting

    def _require(self, needed: Sequence[Task]) -> None:
        for task in needed:
            if why := task.why_not():
                state = f"has no result in {task.folder}" if why == NO_RESULT else f"is out of date ({why})"
                raise RPSAError(
                    f"stage {task.stage} {state}: run the recipe without --only, or that stage first"
                )

    def _attempts(self, stage: Stage, tasks: list[Task]) -> Iterator[tuple[Task, Failure | None]]:
        if not tasks:
            return
        if self.recipe.launch and stage in launch.LAUNCHED_STAGES and not launch.is_launched():
            yield from self._launched(stage, tasks)
        elif self._executor is not None:
            yield from attempt_all(self._executor, tasks)
        else:
            for task in tasks:
                # of several processes all have ended when a task failed: this is the next start
                known = failure_of(task) if launch.MARK in os.environ else None
                yield task, known or attempt(task)

    def _prepare(self) -> None:
        """Once, before the first task: whatever can be known beforehand, looked at where the work is done."""
        if self._is_prepared:
            return
        if self.recipe.matrix.parallel > 1 and not launch.is_launched():
            self._executor = self._stack.enter_context(workers(self.recipe.matrix.parallel))
            self._executor.submit(check, self.recipe).result()
        else:
            quiet()
            if launch.MARK not in os.environ:
                check(self.recipe)
        _record(self.recipe)
        self._is_prepared = True

    def _launched(self, stage: Stage, tasks: list[Task]) -> Iterator[tuple[Task, Failure | None]]:
        """In processes that end together where one fails: started again for what is left after a failure."""
        for task in tasks:
            forget_failure(task)
        left = list(tasks)
        while left:
            why, killed = "its processes ended without a result", None
            self._bar.stop()
            try:
                with self._monitor.paused():  # the ranks show what they do
                    launch.launch(self.recipe, stage)
            except launch.RankKilled as error:
                why = str(error)
                killed = Failure(why)
            except RPSAError as error:
                why = str(error)
            self._bar.start()
            failures = {task.folder: failure_of(task) for task in left}
            ended = [task for task in left if failures[task.folder] or task.is_done()]
            if not any(failures.values()):
                ended = left  # one of them was killed, and could not say at what
            for task in ended:
                done = task.is_done()
                yield task, None if done else killed or failures[task.folder] or Failure(why)
            left = [task for task in left if task not in ended]

    def _fail(self, task: Task, why: str) -> None:
        from rich.text import Text

        why = why.removeprefix(f"{task.name}: ")
        self.without_result[task.folder] = f"{task.title} failed: {why}"
        self.failed.append(f"{task.stage} {task.name}: {why}")
        self._bar.console.print(Text(f"failed: {printable(self.failed[-1])}"), soft_wrap=True)


def _keep(task: Task) -> None:
    """With all that it stands on: the stages of a run may be done by several environments."""
    for needed in task.needs():
        _keep(needed)
    keep(task.folder, task.stage, task.inputs())


def _record(recipe: Recipe) -> None:
    """The recipe beside its results: as it was given, its methods in their order, and with all defaults."""
    if launch.MARK in os.environ or not launch.is_first():
        return
    given = recipe.model_dump(mode="json", exclude_unset=True)
    atomic_write(recipe.folder / launch.GIVEN, json.dumps(given, indent=2, ensure_ascii=False) + "\n")
    atomic_write(recipe.folder / "recipe.json", stable_json(recipe.model_dump(mode="json")))


def attempt(task: Task) -> Failure | None:
    """Do one task; None if it has succeeded. Its folder appears when it is complete.

    Several ranks do it together and rank 0 keeps the folders; where one of them fails all have to end, and so the
    error is raised.

    Raises:
        OSError: the disk is full, or something else that every other task would meet as well.
        Terminated: SIGTERM came while it could only wait.
    """
    key = task.identity()
    known = failure_of(task, key)
    if known is not None and known.final:
        return known
    try:
        _perform(task, key)
        failure = None
    except Exception as error:
        if is_of_the_machine(error):
            raise
        failure = _failure(error, task.unfinished_folder(key))
        record = {"why": failure.why, "final": failure.final, "of": key}
        atomic_write(task.failure_file, stable_json(record))
        if world_size() > 1:
            raise
        free_memory()
    if termination.is_asked():
        termination.obey()
    return failure


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error is about the disk, not about the task. Some libraries report that in words alone."""
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return True
    return any(said in str(error) for said in DISK_MESSAGES)


def failure_of(task: Task, key: str | None = None) -> Failure | None:
    """What kept the task from its result when it was last tried (with these inputs, if a `key` is given)."""
    try:
        record = json.loads(task.failure_file.read_text(encoding="utf-8"))
        failure = Failure(str(record["why"]), bool(record["final"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return failure if key in (None, record["of"]) else None


def forget_failure(task: Task) -> None:
    """So that a record that is found afterwards is a new one."""
    task.failure_file.unlink(missing_ok=True)


def _failure(error: Exception, folder: Path) -> Failure:
    if isinstance(error, RPSAError):
        return Failure(printable(str(error)), final=isinstance(error, Diverged))
    if isinstance(error, OSError) and error.strerror:
        return Failure(printable(": ".join(part for part in (error.strerror, error.filename) if part)))
    place = folder / TRACEBACK
    place.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    said = printable(str(error).strip().partition("\n")[0])
    return Failure(f"{type(error).__name__}: {said} (more in {place})")


def _perform(task: Task, key: str) -> None:
    """What can be resumed waits beside the task's folder in a hidden one, which belongs to these very inputs."""
    inputs, unfinished = task.inputs(), task.unfinished_folder(key)
    refuse_foreign(task.folder, MANIFEST)
    unfinished.mkdir(parents=True, exist_ok=True)
    # what a process finished that was killed before it could put the folder in its place
    finished = is_current(unfinished, task.stage, inputs)
    barrier()
    if not finished:
        started = time.perf_counter()
        with telling(task) as progress:
            task.run(unfinished, progress)
        if rank() == 0 and not (unfinished / TIMING).is_file():
            atomic_write(unfinished / TIMING, stable_json({"seconds": time.perf_counter() - started}))
        free_memory()
        barrier()
        if rank() == 0:
            (unfinished / TRACEBACK).unlink(missing_ok=True)
            write_manifest(unfinished, task.stage, inputs, task.place)
    if rank() == 0:
        replace_directory(unfinished, task.folder)
        forget_failure(task)
        for stale in task.unfinished_folders():
            shutil.rmtree(stale)
    barrier()


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that import once and do task after task, each on its share of the cores and on one GPU."""
    threads = max(1, (os.cpu_count() or 1) // count)
    context = get_context("spawn")
    devices = context.SimpleQueue()
    for device in devices_of_workers(count):
        devices.put(device)
    executor = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(threads, devices))
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=True, cancel_futures=True)
        raise
    executor.shutdown()


def attempt_all(executor: ProcessPoolExecutor, tasks: list[Task]) -> Iterator[tuple[Task, Failure | None]]:
    """Do tasks side by side; yields each as it ends, with why it failed.

    Raises:
        OSError: see `attempt`; tasks that are running come to their end first, the rest is not begun.
        RPSAError: a worker process was killed.
    """
    futures: dict[Future[Failure | None], Task] = {
        executor.submit(_attempt_quietly, task): task for task in tasks
    }
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise RPSAError(
            "a worker process was killed, perhaps for lack of memory: lower matrix.parallel; the same command "
            "goes on from what is finished"
        ) from None
    finally:
        for future in futures:
            future.cancel()


def devices_of_workers(count: int) -> list[str | None]:
    """The GPU of each worker, as CUDA_VISIBLE_DEVICES says it; None where there is no choice."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    return [known[worker % len(known)] if len(known) > 1 else None for worker in range(count)]


def _start_worker(threads: int, devices: "SimpleQueue[str | None]") -> None:
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before CUDA is looked at
    import torch

    launch.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet()


def _attempt_quietly(task: Task) -> Failure | None:
    # Ctrl-C reaches every process of the terminal: a worker at work stops there, an idle one stays silent
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            return attempt(task)
    except termination.Terminated:
        os._exit(termination.CODE)  # the executor waits for all workers once one has ended, and this one has
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()


def check(recipe: Recipe) -> None:
    """Here, so that a worker can do it."""
    from rpsa.pipeline.preflight import preflight

    preflight(recipe)
