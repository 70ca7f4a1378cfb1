"""What each backward pass differentiates: weights of the response tokens' log-probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rpsa.fisher.config import FisherConfig
from rpsa.fisher.samples import Responses, Samples
from rpsa.fisher.signs import random_signs, sample_key


@dataclass(frozen=True)
class Probe:
    """Those of a batch's N response tokens that one backward pass is about, (n,) int64, and their weights, float32.

    Both on the CPU.
    """

    tokens: Tensor
    weights: Tensor


def probes(config: FisherConfig, samples: Samples, responses: Responses) -> list[Probe]:
    """One for each backward pass of a whole batch; every response token is in one of them.

    The squares of the gradients of sum_t w_t log p_t, summed over the passes, are one sequence's part of F.
    """
    weights = responses.lengths[responses.rows].float().rsqrt()
    if config.estimator != "token_signs":
        return [Probe(torch.arange(len(weights)), weights)]
    keys = torch.tensor([sample_key(config.seed, name) for name in samples.ids])
    weights = weights * random_signs(keys[responses.rows], responses.positions)
    groups = responses.ranks % config.probes
    chosen = [(groups == group).nonzero()[:, 0] for group in sorted({*groups.tolist()})]
    return [Probe(tokens, weights[tokens]) for tokens in chosen]
