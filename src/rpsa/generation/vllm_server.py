"""Data parallelism with vLLM: several engines behind one server of its own, which lives as long as its generator."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx2

from rpsa.errors import RPSAError
from rpsa.generation import Completion, Sampling
from rpsa.generation.server import ServerConfig, ServerGenerator
from rpsa.generation.vllm import data_parallel_size
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = "model"
_IN_FLIGHT = 256  # requests that one engine takes at a time by default
_LONGEST_RESPONSE = 24 * 3600.0  # the connection breaks when the server ends: nothing waits for a dead one
_GRACE = 20.0
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class VLLMServerGenerator:
    """A `Generator` on `vllm serve`, started here on loopback and ended with the object, or with this process.

    `model` is a folder or a hub id, `engine` any argument of `vllm.LLM`, `data_parallel_size` among them. LoRA
    adapters are merged into the model before.

    Raises RPSAError if the server ends before it answers, with the last line that it said.
    """

    def __init__(
        self,
        model: str,
        tokenizer: "PreTrainedTokenizerBase",
        engine: Mapping[str, Any],
        thought: ThoughtFormat | None = None,
    ) -> None:
        port = _free_port()
        folder = TemporaryDirectory(prefix="rpsa-vllm-")
        log = Path(folder.name) / "log"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", _NAME]
        # a key of the user's own server is not for this one
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *flags(engine)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._end = weakref.finalize(self, _end, process, folder)
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/health", model, log)
        except BaseException:
            self._end()
            raise
        config = ServerConfig(
            f"http://127.0.0.1:{port}/v1",
            _NAME,
            prompts_as="token_ids",
            max_in_flight=_IN_FLIGHT * data_parallel_size(engine),
            timeout=_LONGEST_RESPONSE,
        )
        self._generator = ServerGenerator(config, tokenizer, thought)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as they finish; see `rpsa.generation.Generator` and `ServerGenerator`."""
        return self._generator.generate(prompts, sampling, sample_ids)


def flags(engine: Mapping[str, Any]) -> list[str]:
    """Arguments of `vllm.LLM` as options of `vllm serve`; None is left out, nested values are JSON."""
    options: list[str] = []
    for key, value in engine.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, Mapping):
            options += [f"--{name}", json.dumps(value)]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            options += [f"--{name}", *map(str, value)]
        elif value is not None:
            options += [f"--{name}", str(value)]
    return options


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, model: str, log: Path) -> None:
    while process.poll() is None:
        with suppress(httpx2.RequestError):
            if httpx2.get(url, timeout=5.0, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error:" in line] or lines
    last = telling[-1][-500:] if telling else "without a word"
    raise RPSAError(f"vLLM's server for {model} ended with code {process.returncode}: {last}")


def _end_with_parent() -> None:
    """A process that is killed runs no finalizer: the kernel ends its server."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _end(process: "subprocess.Popen[bytes]", folder: "TemporaryDirectory[str]") -> None:
    """The server first, so that it can end its engines; then whatever of its group is left."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
