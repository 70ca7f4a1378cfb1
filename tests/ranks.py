"""Several ranks on one CPU (gloo): each a process that starts from a server which has imported everything once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "torch.distributed.fsdp", "peft", "rpsa.training.trainer"])


def run_ranks(count: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` on each of `count` ranks, and what each returned; an exception on one is raised here."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        _SERVER.Process(target=_run, args=(rank, count, port, function, folder, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        process.kill()
    failures = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    assert not failures, "\n".join(f"{path.name} of {count}: {path.read_text()}" for path in failures)
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(count)]


def _run(
    rank: int, count: int, port: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if count == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    try:
        torch.save(function(*args), folder / f"result-{rank}")
    except BaseException:
        (folder / f"failure-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
