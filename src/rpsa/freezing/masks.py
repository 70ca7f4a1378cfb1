"""Control masks: what could be frozen instead of the top of the Fisher ranking (section 4.4, and more).

Each control is again a `FisherDiagonal`, with as many non-zero scores as the Fisher has, so that at every k
it freezes as many elements as the Fisher does, and a smaller k freezes a subset of what a larger one does.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.quantile import order_statistic
from rpsa.settings import MASK, SEED, MaskKind, check
from rpsa.sharding import full


def control_scores(
    mask: MaskKind, fisher: FisherDiagonal, parameters: Mapping[str, Tensor], seed: int = SEED.default
) -> FisherDiagonal:
    """Scores that rank elements by `mask` instead of by Fisher.

    - `random`: uniformly over all parameters (the paper's ablation)
    - `random_nonzero`: uniformly where F > 0
    - `random_per_tensor`: Fisher's count in each tensor, shuffled inside it
    - `magnitude`: largest |theta| first
    - `inverse`: smallest non-zero F first

    The result is not sharded, though its arguments may be: each rank ranks all elements, and so all alike.
    """
    check(MASK, mask)
    fisher = FisherDiagonal({name: full(score) for name, score in fisher.scores.items()}, fisher.manifest)
    generator = torch.Generator().manual_seed(seed)
    build: dict[str, Callable[[], dict[str, Tensor]]] = {
        "fisher": lambda: dict(fisher.scores),
        "random": lambda: keep_top(_uniform(fisher, generator), fisher.nonzero),
        "random_nonzero": lambda: {
            name: draw * (fisher[name] > 0).cpu() for name, draw in _uniform(fisher, generator).items()
        },
        "random_per_tensor": lambda: {name: _shuffled(fisher[name], generator) for name in fisher},
        "magnitude": lambda: keep_top(
            {name: full(parameters[name].detach()).float().abs().cpu() for name in fisher}, fisher.nonzero
        ),
        "inverse": lambda: {name: _inverse(fisher[name]) for name in fisher},
    }
    return FisherDiagonal(build[mask](), fisher.manifest | {"mask": mask, "mask_seed": seed})


def _uniform(fisher: FisherDiagonal, generator: torch.Generator) -> dict[str, Tensor]:
    # 24 random bits, all exact in fp32 and none of them 0
    return {
        name: torch.randint(1, 1 << 24, score.shape, generator=generator).float()
        for name, score in fisher.scores.items()
    }


def as_many(ranking: FisherDiagonal, fisher: FisherDiagonal) -> FisherDiagonal:
    """`ranking` with at most as many non-zero scores as `fisher` has, so that k freezes as many elements."""
    scores = {name: full(score) for name, score in ranking.scores.items()}
    return FisherDiagonal(keep_top(scores, fisher.nonzero), ranking.manifest)


def keep_top(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Zero all but the `count` largest scores; of equals at the edge, the first ones stay."""
    total = sum(int(torch.count_nonzero(score)) for score in scores.values())
    if count >= total:
        return scores
    edge = order_statistic(scores.values(), total - count)
    places = count - sum(int((score > edge).sum()) for score in scores.values())
    kept = {}
    for name, score in scores.items():
        equal = score == edge
        admitted = equal & (equal.flatten().cumsum(0).view_as(score) <= places)
        places -= int(admitted.sum())
        kept[name] = score * ((score > edge) | admitted)
    return kept


def _shuffled(score: Tensor, generator: torch.Generator) -> Tensor:
    return score.flatten().cpu()[torch.randperm(score.numel(), generator=generator)].view_as(score)


def _inverse(score: Tensor) -> Tensor:
    return torch.where(score > 0, score.clamp_min(torch.finfo(torch.float32).tiny).reciprocal(), 0.0)
