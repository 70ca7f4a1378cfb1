"""Passes: backward passes over traces beside a trainer's own, the same over all ranks as in one process."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rpsa.fisher.log_probs import evaluation_mode
from rpsa.fisher.samples import Samples, read_samples
from rpsa.reference import ReferenceDataset

Loss = Callable[[nn.Module, Samples, torch.device], Tensor]
"""Of a model on samples: summed over their response tokens."""


def mean_backward(
    model: nn.Module, samples: Samples, loss: Loss, accelerator: Accelerator, micro_batch_size: int
) -> Tensor:
    """Accumulate into `.grad` the gradient of a loss's mean over the response tokens of a batch; returns the mean.

    Dropout is off and the global random state is left as it was, so that a run that makes such a pass sees the same
    dropout as one that does not.

    Args:
        samples: this rank's part of the batch.
        loss: summed over the tokens; the mean is over those of all ranks.
        micro_batch_size: sequences of one forward pass.
    """
    tokens = accelerator.reduce(samples.response_lengths.sum().to(accelerator.device), "sum").item()
    # DDP and FSDP average gradients over ranks; the token mean is over all of them: scaled by ranks / all tokens,
    # the average of the ranks' sums is the sum over all tokens / all tokens
    scale = accelerator.num_processes / tokens
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    with torch.random.fork_rng(devices), evaluation_mode(model):
        for start in range(0, len(samples), micro_batch_size):
            part = samples.select(range(start, min(start + micro_batch_size, len(samples))))
            value = loss(model, part, accelerator.device)
            accelerator.backward(value * scale)
            total += value.detach()
    mean: Tensor = accelerator.reduce(total, "sum") / tokens
    return mean


def share_of_rank(trainer: Any, traces: ReferenceDataset, number: int) -> Samples:
    """This rank's part of the `number`-th batch of traces, which has as many sequences as a step of the trainer."""
    ours = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    size = ours * trainer.accelerator.num_processes
    batch = traces.rotating_batch(number, size, trainer.args.reference_max_length)
    first = trainer.accelerator.process_index * ours
    [samples] = read_samples([{key: values[first : first + ours] for key, values in batch.items()}])
    return samples
