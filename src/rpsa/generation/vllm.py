"""vLLM backend: in this process, or several engines behind a server of its own.

In the process (`VLLMGenerator`) token ids go in and out, with a seed for each sample. `LLM.generate` answers when all
of its prompts are done, so prompts go in waves: what one wave gave is yielded before the next. Data parallelism, which
vLLM's `LLM` does not have, is its server's (`VLLMServerGenerator`), which lives as long as its generator.
"""

import ctypes
import importlib
import json
import logging
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
from rpsa.generation import Completion, ResponseDecoder, Sampling, check_lengths, sample_seed
from rpsa.generation.server import ServerConfig, ServerGenerator
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WAVE = 512


class VLLMGenerator:
    """A `Generator` on `vllm.LLM`. LoRA adapters are merged into the model before.

    `model` is a folder or a hub id; `engine` holds any argument of `vllm.LLM` (tensor_parallel_size, dtype,
    max_model_len, gpu_memory_utilization, ...). EOS ids are those of the model's generation settings, as in
    the transformers backend; nothing else of these settings shapes the distribution. Equal seeds give equal
    text only on the same engine and hardware, and not always then: vLLM's kernels depend on the batch.

    Raises RPSAError if vLLM cannot be imported or refuses the arguments.
    """

    def __init__(
        self,
        model: str,
        tokenizer: "PreTrainedTokenizerBase",
        engine: Mapping[str, Any] | None = None,
        wave: int = WAVE,
        thought: ThoughtFormat | None = None,
    ) -> None:
        arguments = dict(engine or {})
        if (replicas := data_parallel_size(arguments)) > 1:
            raise RPSAError(
                f"data_parallel_size {replicas}: vLLM has it in its server only; use VLLMServerGenerator"
            )
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise RPSAError(
                f"vLLM cannot be imported ({error}): pip install 'rpsa[vllm]', or use another backend"
            ) from error
        try:
            self._llm = self._vllm.LLM(model=model, **arguments)
        except (TypeError, ValueError) as error:
            raise RPSAError(f"vLLM cannot load {model}: {_one_line(error)}") from error
        self._decoder = ResponseDecoder(tokenizer, thought)
        self._wave = wave

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) wave by wave; see `rpsa.generation.Generator`.

        Raises RPSAError if vLLM refuses a prompt (one longer than max_model_len, for instance) or aborts.
        """
        check_lengths(prompts, sample_ids)
        for start in range(0, len(prompts), self._wave):
            indices = range(start, min(start + self._wave, len(prompts)))
            try:
                outputs = self._llm.generate(
                    [self._vllm.TokensPrompt(prompt_token_ids=prompts[i]) for i in indices],
                    [self._sampling_params(sampling, sample_ids[i]) for i in indices],
                    use_tqdm=False,
                )
            except Exception as error:
                # its own errors are no ValueErrors in newer versions
                if not isinstance(error, ValueError) and type(error).__module__ != "vllm.exceptions":
                    raise
                raise RPSAError(f"vLLM refused a request: {_one_line(error)}") from error
            for i, output in zip(indices, outputs, strict=True):
                yield i, self._completion(output.outputs[0], sample_ids[i])

    def _sampling_params(self, sampling: Sampling, sample_id: str) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=sample_seed(sampling.seed, sample_id),
            detokenize=False,
        )

    def _completion(self, output: Any, sample_id: str) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RPSAError(f"vLLM ended sample {sample_id!r} with {output.finish_reason!r}: run it again")
        token_ids = list(output.token_ids)
        return Completion(token_ids, self._decoder.text(token_ids), output.finish_reason)


def data_parallel_size(engine: Mapping[str, Any]) -> int:
    """How many engines, each with the whole model, the arguments of `vllm.LLM` ask for."""
    size: int = engine.get("data_parallel_size", 1)
    return size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
