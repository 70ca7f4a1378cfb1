"""Processes in a sandbox: how they start, what is said to them and heard of them, how they end for certain.

How much a program may use (`Limits`), and what became of it (`Finished`).
"""

import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

Ending = Literal["exit", "timeout", "output"]


@dataclass(frozen=True)
class Limits:
    """Limits on one run of one program. All are hard: what goes beyond fails or is killed."""

    seconds: float = 10.0
    """Wall time; processor time of a process is bounded by the same, and a second."""
    memory_mb: int = 1024
    """Address space of each process; a tree of processes can hold `processes` times as much."""
    scratch_mb: int = 16
    """Size of the one folder that can be written to, /tmp; it lies in memory."""
    file_mb: int = 16
    processes: int = 16
    """Processes and threads."""
    open_files: int = 64
    output_bytes: int = 1 << 16
    """What is read of stdout and stderr together; a program that writes more is ended."""


@dataclass(frozen=True)
class Finished:
    """What a program did: `ending` says whether it ended by itself, at its time, or at its output's limit."""

    ending: Ending
    exit_code: int | None
    """None unless it ended by itself; 128 + n if by signal n."""
    output: str
    """stdout and stderr as they came, up to the limit."""
    seconds: float
    tier: str
    """Name and version of the sandbox."""


_INSIDE = "rpsa.evaluation.sandbox.inside"
_START_SECONDS = 60.0
# a write of this size never blocks on a pipe that select() calls writable
_CHUNK = 4096
# out of memory, the kernel is to end a sandbox and not its neighbours; raising the score is always allowed
_FIRST_VICTIM = 'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec "$@"'


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Invocation:
    """How one program is started in a sandbox, so that `entry` runs in it and reads its job from stdin."""

    command: Sequence[str]
    environment: dict[str, str]
    folder: str = "/"
    uid: int | None = None
    """Whom `entry` becomes, if it is root."""
    path: tuple[str, ...] = ()
    """Folders of packages, as seen inside."""
    clean_up: Callable[[], None] = field(default=_nothing)
    """Ends what killing the process group does not reach, and removes what is left."""


class Process:
    """One process group, its leader started from `launch`; a context that leaves nothing of it running."""

    def __init__(self, launch: Invocation, stdin: int, stdout: int, stderr: int) -> None:
        self._launch = launch
        self._popen = subprocess.Popen(
            ["/bin/sh", "-c", _FIRST_VICTIM, "sh", *launch.command],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=launch.environment,
            cwd=launch.folder,
            start_new_session=True,
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def stdin(self) -> IO[bytes]:
        assert self._popen.stdin is not None
        return self._popen.stdin

    @property
    def output(self) -> IO[bytes]:
        """The pipe among stdout and stderr."""
        pipe = self._popen.stdout or self._popen.stderr
        assert pipe is not None
        return pipe

    def has_ended(self, seconds: float) -> bool:
        """Whether its leader has ended by itself, after waiting for that so long at most."""
        deadline = time.monotonic() + seconds
        # not reaped yet: as long as the leader is a zombie, its group's number is nobody else's
        while os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def end(self) -> int:
        """Kill all of it. The leader's exit code, 128 + n if signal n ended it."""
        if self._popen.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
            self._launch.clean_up()
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        code = self._popen.returncode
        return code if code >= 0 else 128 - code


@dataclass(frozen=True)
class Heard:
    """What came out of a process: all of it for "exit", else what came until it was stopped."""

    ending: Ending
    output: bytes
    seconds: float


def exchange(
    jobs: Sequence[tuple[int, bytes]], output: int, limits: Limits, stop: threading.Event | None = None
) -> Heard:
    """Write each job to its descriptor and close that, in order; read `output` to its end.

    The clock runs from when the last job was taken. `output` over its limit, or open when time is up or `stop` is
    set, ends the exchange; nobody is killed here.
    """
    pending, heard = list(jobs), bytearray()
    start = time.monotonic()
    deadline = start + _START_SECONDS
    position = 0
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        if pending:
            selector.register(pending[0][0], selectors.EVENT_WRITE)
        try:
            while True:
                ready = selector.select(max(0.0, min(0.2, deadline - time.monotonic())))
                if time.monotonic() >= deadline or (stop is not None and stop.is_set()):
                    return Heard("timeout", bytes(heard), time.monotonic() - start)
                for key, _ in ready:
                    if key.fd == output:
                        part = os.read(output, 1 << 16)
                        heard += part
                        if not part:
                            return Heard("exit", bytes(heard), time.monotonic() - start)
                        if len(heard) > limits.output_bytes:
                            heard = heard[: limits.output_bytes]
                            return Heard("output", bytes(heard), time.monotonic() - start)
                        continue
                    descriptor, job = pending[0]
                    try:
                        position += os.write(descriptor, job[position : position + _CHUNK])
                    except BrokenPipeError:
                        position = len(job)
                    if position == len(job):
                        selector.unregister(descriptor)
                        os.close(descriptor)
                        pending.pop(0)
                        position = 0
                        if pending:
                            selector.register(pending[0][0], selectors.EVENT_WRITE)
                        else:
                            start = time.monotonic()
                            deadline = start + limits.seconds
        finally:
            for descriptor, _ in pending:
                os.close(descriptor)


def job_text(launch: Invocation, limits: Limits, run: str | None, data: Any) -> bytes:
    """The job that `entry` takes: run the module `run` of `inside` with `data`, or the program `data` if None."""
    job = {
        "limits": asdict(limits),
        "uid": launch.uid,
        "path": launch.path,
        "modules": [[f"{_INSIDE}.{name}", source(name)] for name in _needed(run)],
        "run": None if run is None else f"{_INSIDE}.{run}",
        "data": data,
    }
    text = json.dumps(job).encode()
    return b"%d\n" % len(text) + text


@cache
def source(name: str) -> str:
    return (Path(__file__).parent / "inside" / f"{name}.py").read_text(encoding="utf-8")


def _needed(run: str | None) -> list[str]:
    """Modules in the order of their imports; a solution's process gets no line of what judges it."""
    return {
        None: ["seccomp"],
        "candidate": ["seccomp", "wire", "candidate"],
        "suite": ["seccomp", "wire", "suite"],
        "together": ["seccomp", "wire", "candidate", "suite", "together"],
    }[run]
