"""Footprint: what an estimate holds in memory, told by the estimate's own code from shapes alone.

The passes below are those of `Estimation`. On fake tensors, which have a size and no storage, they compute nothing,
and whoever counts the tensors that come and go sees what a real estimate would hold. What stays, the sums, is
`squares.sums_bytes`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rpsa.fisher.estimators import Batch, Estimation, FisherConfig
from rpsa.fisher.hooked import Hooks, NotHookable
from rpsa.fisher.log_probs import evaluation_mode
from rpsa.fisher.probes import Probe
from rpsa.fisher.samples import Responses, Samples
from rpsa.fisher.squares import SquaredGradients
from rpsa.parameters import trainable_parameters


@dataclass(frozen=True)
class DryPass:
    """A forward pass, and the backward passes that follow it."""

    path: Literal["loop", "hooked"]
    held: list[Tensor]
    """The sums, which are there before and after."""
    run: Callable[[], None]


def dry_passes(model: nn.Module, sequences: int, tokens: int, probes: int) -> Iterator[DryPass]:
    """The passes of an estimate on `sequences` of `tokens` each, all but the first of them a response.

    An estimate by hooks goes through both: before it trusts them, it compares them with the loop on one sequence.

    Args:
        model: of fake tensors, on one device; its parameters' flags are the same afterwards.
    """
    parameters = trainable_parameters(model)
    elements = sum(p.numel() for p in parameters.values())
    config = FisherConfig(probes=probes, progress=False)
    # two sums of all elements, and no sample: to draw one is to look at values
    squares = SquaredGradients(parameters, config.seed, sample_size=elements)
    estimation = Estimation(model, parameters, [], config, squares)

    def run(rows: int) -> None:
        batch = _batch(rows, tokens, probes)
        squares.begin(sorted(row % 2 for row in range(rows)))
        with evaluation_mode(model), torch.enable_grad(), estimation.installed():
            try:
                estimation.forward_backward(batch)
            except NotHookable:
                return  # the estimate would go on by the loop, and has held what was seen until here

    held = squares.tensors()
    yield DryPass("loop", held, lambda: run(1))
    try:
        estimation.hooks = Hooks(model, parameters, squares)
    except NotHookable:
        return
    yield DryPass("hooked", held, lambda: run(sequences))


def _batch(rows: int, tokens: int, probes: int) -> Batch:
    """Of two of the passes at most: the worst moment is in the first, or in a later one whose graph is kept."""
    ids = torch.ones(rows, tokens, dtype=torch.long)
    samples = Samples(ids, ids, ids, tuple(map(str, range(rows))), tuple(range(rows)))
    places = torch.arange(rows * (tokens - 1))
    row, rank = places // (tokens - 1), places % (tokens - 1)
    responses = Responses(row, rank + 1, torch.ones_like(places), rank, torch.ones(rows).long(), largest=1)
    dealt = [places[number::probes] for number in range(min(probes, 2))]
    return Batch(samples, responses, [Probe(part, torch.ones(len(part))) for part in dealt])
