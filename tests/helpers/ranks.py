"""Several ranks on one CPU (gloo): each a process that starts from a server which has imported everything once."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["helpers.preloaded"])


def run_ranks(count: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` on each of `count` ranks, and what each returned; an exception on one is raised here.

    Ranks of which one dies in native code are started once more, with a warning. (Seen once: the C library found the
    heap of a rank corrupted; 80 repetitions, half of them with its checks of the heap, did not show it again.)
    """
    killed_by = _run_once(count, function, folder, args)
    if killed_by:
        warnings.warn(f"a rank of {count} was killed by signal {killed_by}; started again", stacklevel=2)
        assert not _run_once(count, function, folder, args), "a rank was killed by a signal, twice"
    failures = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    assert not failures, "\n".join(f"{path.name} of {count}: {path.read_text()}" for path in failures)
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(count)]


def _run_once(count: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> int:
    """The signal that ended a rank which left neither a result nor a failure; 0 if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("result-*"), *folder.glob("failure-*")]:
        old.unlink()
    port = free_port()
    _start_server()
    processes = [
        _SERVER.Process(target=_run, args=(rank, count, port, function, folder, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    crashed = 0
    for process in processes:
        process.join(timeout=240)
        if process.exitcode in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):
            crashed = -process.exitcode
        process.kill()
    return crashed


def _start_server() -> None:
    """Before Python 3.13 it knows from the environment alone where modules are, and is silent about what it lacks."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _run(
    rank: int, count: int, port: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if count == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    try:
        torch.save(function(*args), folder / f"result-{rank}")
        _wait_for_others(count, folder)
    except BaseException:
        (folder / f"failure-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _wait_for_others(count: int, folder: Path) -> None:
    """A rank that closes its connections while another still reads from them makes that one fail."""
    for _ in range(600):
        ended = {
            path.name.rpartition("-")[2] for path in [*folder.glob("result-*"), *folder.glob("failure-*")]
        }
        if len(ended) == count:
            return
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
