"""Probes: what each backward pass differentiates, as weights of the response tokens' log-probabilities.

Signs are random and depend on the seed, the sample and the position alone: whichever batch or rank a sample comes to,
its Fisher is the same. So they are hashed, and not drawn from a generator.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rpsa.fisher.samples import Responses, Samples

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def sample_key(seed: int, sample_id: str) -> int:
    """A signed 64-bit key of one sample under one seed, the same in every process."""
    digest = hashlib.blake2b(f"{seed}\0{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def random_signs(keys: Tensor, positions: Tensor) -> Tensor:
    """+1 or -1 (float32) for each pair of a sample's key and a token's position, both int64 of one shape."""
    bits = _splitmix64(keys + positions * _GOLDEN_GAMMA)
    return ((bits & 1) * 2 - 1).float()


def _splitmix64(state: Tensor) -> Tensor:
    """The output function of splitmix64 (Steele et al., 2014); int64 products wrap as unsigned ones do."""
    state = state + _GOLDEN_GAMMA
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's own copies the sign bit of int64 into the vacated places."""
    shifted: Tensor = torch.bitwise_right_shift(values, bits) & ((1 << (64 - bits)) - 1)
    return shifted


@dataclass(frozen=True)
class Probe:
    """Those of a batch's N response tokens that one backward pass is about, (n,) int64, and their weights, float32.

    Both on the CPU.
    """

    tokens: Tensor
    weights: Tensor


def whole_probe(responses: Responses) -> Probe:
    """All response tokens in one backward pass, each weighing 1/sqrt(|y|)."""
    weights = _weights(responses)
    return Probe(torch.arange(len(weights)), weights)


def signed_probes(samples: Samples, responses: Responses, count: int, seed: int) -> list[Probe]:
    """The passes of `token_signs`: each response's tokens dealt to `count` of them in turn, with random signs.

    The squares of the gradients of sum_t w_t log p_t, summed over the passes, are one sequence's part of F.
    """
    keys = torch.tensor([sample_key(seed, name) for name in samples.ids])
    weights = _weights(responses) * random_signs(keys[responses.rows], responses.positions)
    groups = responses.ranks % count
    chosen = [(groups == group).nonzero()[:, 0] for group in sorted({*groups.tolist()})]
    return [Probe(tokens, weights[tokens]) for tokens in chosen]


def _weights(responses: Responses) -> Tensor:
    """Squared they are Eq. 4's 1/|y|."""
    return responses.lengths[responses.rows].float().rsqrt()
