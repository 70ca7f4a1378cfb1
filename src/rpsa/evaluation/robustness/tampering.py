"""Tampering: further fine-tuning of an aligned model on a few rows, harmful or benign (Qi et al., 2024).

As an attacker does it who has the weights: plain AdamW at a constant learning rate, full or LoRA, nothing frozen. The
course depends on the seed alone, so that what n steps give is on the way to what more steps give.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.utils import clip_grad_norm_

from rpsa.chat import Example
from rpsa.models import fresh_adapter
from rpsa.reference import collated

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tampered(
    model: "PreTrainedModel",
    rows: Sequence[Example],
    steps: int,
    paradigm: Literal["fft", "lora"],
    learning_rate: float,
    batch_size: int,
    seed: int,
    lora: Mapping[str, Any],
) -> "PreTrainedModel":
    """The model after `steps` optimizer steps on `rows`, which come in a new order in each epoch; trained in place.

    Args:
        rows: tokenised, their labels on the responses alone.
        lora: fields of PEFT's LoraConfig, for paradigm "lora"; the adapter is merged in the end.
    """
    trained: Any = model.requires_grad_(True)
    if paradigm == "lora":
        trained = fresh_adapter(model, lora, seed)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batches = _batches(rows, batch_size, seed)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        trained.train()
        for _ in range(steps):
            rows_now = next(batches)
            batch = collated([row.input_ids for row in rows_now], [row.labels for row in rows_now])
            on_device = {name: value.to(model.device) for name, value in batch.items()}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(devices)):
                loss = trained(**on_device, use_cache=False).loss
            loss.backward()
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        trained.eval()
    merged: PreTrainedModel = trained.merge_and_unload() if paradigm == "lora" else trained
    return merged


def _batches(rows: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless; a batch is within one epoch."""
    rng = random.Random(f"tampering {seed}")
    while True:
        order = rng.sample(list(rows), len(rows))
        yield from (order[start : start + size] for start in range(0, len(order), size))
