"""Generation with vLLM in this process: token ids in and out, a seed for each sample.

`LLM.generate` answers when all of its prompts are done, so prompts go in waves: what one wave gave is yielded
before the next. Data parallelism, which vLLM's `LLM` does not have, is `vllm_server`'s.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rpsa.errors import RPSAError
from rpsa.generation import Completion, Sampling, check_lengths, sample_seed
from rpsa.generation.decoding import ResponseDecoder
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
