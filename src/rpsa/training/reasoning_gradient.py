"""g_R of Eq. 6: the gradient of the reasoning loss, computed by us and not through a trainer's `compute_loss`."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rpsa.evaluation_mode import evaluation_mode
from rpsa.fisher.log_probs import response_log_probs
from rpsa.fisher.samples import Samples, read_samples


def reasoning_backward(
    model: nn.Module, batch: dict[str, Any], accelerator: Accelerator, micro_batch_size: int
) -> None:
    """Accumulate into `.grad` the gradient of the mean negative log-likelihood of a batch's response tokens.

    Dropout is off and the global random state is left as it was, so that a run that measures the conflict
    sees the same dropout as one that does not.

    Args:
        batch: this rank's part: `input_ids`, `attention_mask`, `labels` (B, T), right-padded, -100 = not a
            response token.
        micro_batch_size: sequences of one forward pass.
    """
    [samples] = read_samples([batch])
    tokens = samples.response_lengths.sum().to(accelerator.device)
    # DDP and FSDP average gradients over ranks; the token mean is over all of them
    scale = accelerator.num_processes / accelerator.reduce(tokens, "sum").item()
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluation_mode(model):
        for start in range(0, len(samples), micro_batch_size):
            part = samples.select(range(start, min(start + micro_batch_size, len(samples))))
            accelerator.backward(negative_log_likelihood(model, part, accelerator.device) * scale)


def negative_log_likelihood(model: nn.Module, samples: Samples, device: torch.device) -> torch.Tensor:
    """Summed over the response tokens."""
    log_probs = response_log_probs(model, samples, device)
    return -log_probs.sum()
