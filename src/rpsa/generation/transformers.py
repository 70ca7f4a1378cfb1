"""Transformers backend: `model.generate`, sampled reproducibly per response.

`generate` draws a whole batch from the global random state, so that a response depends on its neighbours.
Here each (seed, sample id, position) has its own uniform number, which picks the token by inverting the
cumulative distribution; `generate` itself decodes greedily and draws nothing.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from rpsa.errors import RPSAError
from rpsa.generation import Completion, ResponseDecoder, Sampling, check_lengths
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TransformersGenerator:
    """A `Generator` around a loaded model (a PEFT model too) on the device where it is.

    Batches are left-padded and ordered by prompt length, longest first. The model's training flags and its
    generation settings come back after every batch; of the latter only the EOS ids are used, so that nothing
    but `Sampling` shapes the distribution. Batches change the text only where kernels round differently.
    A batch that does not fit into the GPU's memory is halved, and so are those after it.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int = 16,
        thought: ThoughtFormat | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._eos_ids = _eos_ids(model, tokenizer)
        self._decoder = ResponseDecoder(tokenizer, thought)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) batch by batch; see `rpsa.generation.Generator`.

        Raises RPSAError if a single sequence does not fit into the GPU's memory.
        """
        check_lengths(prompts, sample_ids)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        size, start = self.batch_size, 0
        while start < len(order):
            batch = order[start : start + size]
            rows = self._respond_if_it_fits(
                [prompts[i] for i in batch], sampling, [sample_ids[i] for i in batch]
            )
            if rows is None:
                size = (len(batch) + 1) // 2
                logger.warning("out of GPU memory with %d sequences: going on with %d", len(batch), size)
                continue
            start += len(batch)
            yield from zip(batch, map(self._completion, rows), strict=True)

    def _respond_if_it_fits(
        self, prompts: list[list[int]], sampling: Sampling, sample_ids: list[str]
    ) -> list[list[int]] | None:
        """`_respond`, or None where the GPU's memory is too small for a batch of several."""
        try:
            return self._respond(prompts, sampling, sample_ids)
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise RPSAError(
                    f"out of GPU memory with one sequence of {len(prompts[0])} prompt tokens and up to "
                    f"{sampling.max_new_tokens} new ones: lower max_new_tokens or load the model in bfloat16"
                ) from error
        torch.cuda.empty_cache()  # outside of the handler, whose traceback keeps the tensors alive
        return None

    def _respond(
        self, prompts: list[list[int]], sampling: Sampling, sample_ids: list[str]
    ) -> list[list[int]]:
        """Response ids of one batch, each still followed by the padding of the longest."""
        pad = self._eos_ids[0] if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)
        width = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._eos_ids,
            pad_token_id=pad,
            use_cache=True,
        )
        with torch.inference_mode(), _for_generation(self.model, config):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=_processors(sampling, sample_ids, width),
            )
        rows: list[list[int]] = output[:, width:].tolist()
        return rows

    def _completion(self, row: list[int]) -> Completion:
        end = next((n for n, token in enumerate(row, start=1) if token in self._eos_ids), None)
        token_ids = row[:end]
        return Completion(token_ids, self._decoder.text(token_ids), "length" if end is None else "stop")


class _KeyedChoice(LogitsProcessor):
    """Leaves one token in each row: the one into whose share of the probability the row's number falls.

    The number is a hash of (seed, sample id, position), uniform in (0, 1). With float64 sums a token of
    probability 0 is never chosen.
    """

    def __init__(self, seed: int, sample_ids: list[str], prompt_width: int) -> None:
        self.seed = seed
        self.sample_ids = sample_ids
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_width
        numbers = [_uniform(self.seed, sample_id, position) for sample_id in self.sample_ids]
        cumulative = scores.double().softmax(-1).cumsum(-1)
        goal = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, goal, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


def _processors(sampling: Sampling, sample_ids: list[str], prompt_width: int) -> Any:
    if sampling.temperature == 0:
        return LogitsProcessorList()
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(_KeyedChoice(sampling.seed, sample_ids, prompt_width))
    return processors


def _uniform(seed: int, sample_id: str, position: int) -> float:
    """A number in (0, 1) with 32 random bits."""
    digest = hashlib.blake2b(f"{seed}\0{sample_id}\0{position}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest) + 0.5) / 2**32


@contextmanager
def _for_generation(model: "PreTrainedModel", config: Any) -> Iterator[None]:
    """The model in eval mode under `config` alone: `generate` fills gaps of a given config from the model's.

    PEFT copies its own generation settings onto the model inside, so both are put back.
    """
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    configs = [holder.generation_config for holder in holders]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        for holder in holders:
            holder.generation_config = config
        yield
    finally:
        for holder, original in zip(holders, configs, strict=True):
            holder.generation_config = original
        for module in training:
            module.training = True


def _eos_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokenizer's EOS and those of the model's generation settings (one, a list or none)."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    ids = [int(i) for i in dict.fromkeys([tokenizer.eos_token_id, *configured]) if i is not None]
    if not ids:
        raise RPSAError(
            f"neither tokenizer {tokenizer.name_or_path!r} nor its model has an EOS token: set one"
        )
    return ids
