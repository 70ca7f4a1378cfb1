"""A LoRA adapter moved off its start, so that all of it has a Fisher (an option; section 3.2 measures at the start).

At the start B is 0, so that the gradient of A is 0 and with it F of A: only B can be frozen. A few steps on the
model's own responses, where the expected gradient is 0, move B without teaching the model much.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rpsa.evaluation_mode import evaluation_mode
from rpsa.fisher.log_probs import check_causal
from rpsa.fisher.samples import read_samples
from rpsa.training.reasoning_gradient import negative_log_likelihood


def warm_up(model: nn.Module, batches: Iterable[Mapping[str, Any]], learning_rate: float) -> None:
    """One step of AdamW (no decay, gradients clipped at 1) on the trainable parameters for each batch, in place.

    Args:
        batches: `input_ids`, `attention_mask` and `labels` (B, T), as for `estimate_fisher`. The loss is the mean
            negative log-likelihood of a batch's response tokens, dropout off.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    device = parameters[0].device
    with evaluation_mode(model):
        for number, batch in enumerate(batches):
            [samples] = read_samples([batch])
            if number == 0:
                check_causal(model, samples, device)
            tokens = int(samples.response_lengths.sum())
            (negative_log_likelihood(model, samples, device) / tokens).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
