"""Fig. 3: scale a small part of a model's elements, those with the highest Fisher or others, and see what breaks.

The experiment is a set of cells, each one way to disturb the model. A cell is stored when it is finished, and the
model's bits are put back before the next begins.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from rpsa.analysis.structure import Role, roles
from rpsa.artifacts import appending, reading_records, recover_lines
from rpsa.errors import RPSAError, check_fields
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.masks import Mask, control_scores, keep_top
from rpsa.parameters import trainable_parameters

log = logging.getLogger(__name__)

ORIGINAL = "original"
DRAWN = ("random", "random_nonzero", "random_per_tensor")
"""Selections that depend on a seed."""

Evaluate = Callable[[Any, Any], Mapping[str, Sequence[float]]]
"""(model, tokenizer) -> benchmark -> one score in [0, 1] for each problem, always the same problems in one order."""


@dataclass(frozen=True)
class PerturbationConfig:
    """Which cells there are: every combination; `draws` of each random selection, one of the others.

    Raises:
        RPSAError: a value is impossible.
    """

    fractions: tuple[float, ...] = (0.01,)
    factors: tuple[float, ...] = (0.9,)
    selections: tuple[str, ...] = ("fisher", "random", "random_per_tensor", "magnitude")
    draws: int = 5
    seed: int = 42

    def __post_init__(self) -> None:
        check_fields(self)
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise RPSAError(f"fraction {fraction!r} is not above 0 and at most 1")
        for factor in self.factors:
            if not math.isfinite(factor):
                raise RPSAError(f"factor {factor!r} is not a finite number")
        for name in ("fractions", "factors", "selections"):
            if not getattr(self, name):
                raise RPSAError(f"{name}: empty; give at least one")
        for selection in self.selections:
            if selection not in get_args(Mask):
                raise RPSAError(f"selection {selection!r} is not one of {', '.join(get_args(Mask))}")
        if self.draws < 1:
            raise RPSAError(f"draws is {self.draws}: give at least 1")


@dataclass(frozen=True)
class Cell:
    """One way to disturb the model: `fraction` of all elements, times `factor`. `draw` numbers the seeds."""

    selection: str
    fraction: float = 0.0
    factor: float = 1.0
    draw: int = 0


@dataclass(frozen=True)
class Outcome:
    """A finished cell.

    Attributes:
        where: how many elements were scaled in attention, mlp, norms and so on.
        change: Euclidean length of what scaling added to the parameters, over that of the parameters. Selections
            of one size differ in it, because large weights change more.
        scores: each problem's score by benchmark.
    """

    cell: Cell
    where: Mapping[str, int]
    change: float
    scores: Mapping[str, Sequence[float]]

    @property
    def elements(self) -> int:
        return sum(self.where.values())


def cells(config: PerturbationConfig) -> list[Cell]:
    """The untouched model first; cells that share a selection of elements follow one another."""
    return [Cell(ORIGINAL)] + [
        Cell(selection, fraction, factor, draw)
        for selection in config.selections
        for fraction in config.fractions
        for draw in range(config.draws if selection in DRAWN else 1)
        for factor in config.factors
    ]


def select(
    selection: Mask, fisher: FisherDiagonal, parameters: Mapping[str, Tensor], fraction: float, seed: int
) -> dict[str, Tensor]:
    """`fraction` of all elements that the Fisher scores: flat int64 indices into each parameter, on the CPU.

    The count is floor(fraction x elements) exactly, and the same for every selection: of equals at the edge the
    first ones are taken. Elements with F = 0 are not ranked; where there are too few others, the count is
    theirs, and a warning says so. See `control_scores` for what the selections are.

    Raises:
        RPSAError: the count is 0.
    """
    elements = sum(score.numel() for score in fisher.scores.values())
    wanted = int(Fraction(repr(fraction)) * elements)
    count = min(wanted, fisher.nonzero)
    if count == 0:
        raise RPSAError(f"a fraction of {fraction!r} of {elements:,} elements is less than one of them")
    if count < wanted:
        log.warning("only %d elements have F > 0, not the %d wanted: these are taken", count, wanted)
    ranking = control_scores(selection, fisher, parameters, seed)
    return {
        name: score.flatten().nonzero().flatten().cpu()
        for name, score in keep_top(ranking.scores, count).items()
    }


@contextmanager
def scaled(
    parameters: Mapping[str, Tensor], selection: Mapping[str, Tensor], factor: float
) -> Iterator[None]:
    """Multiply the selected elements in place; when the block ends, in whatever way, their old bits are back."""
    with torch.no_grad():
        places = {
            name: indices.to(parameters[name].device) for name, indices in selection.items() if len(indices)
        }
        before = {name: parameters[name].take(indices) for name, indices in places.items()}
        try:
            for name, indices in places.items():
                parameters[name].put_(indices, before[name] * factor)
            with torch.enable_grad():
                yield
        finally:
            for name, indices in places.items():
                parameters[name].put_(indices, before[name])


def perturb(
    model: Any,
    tokenizer: Any,
    fisher: FisherDiagonal,
    evaluate: Evaluate,
    config: PerturbationConfig,
    store: Path,
    inputs: Mapping[str, Any],
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> list[Outcome]:
    """Evaluate the model in every cell that `store` does not hold yet; returns all cells' outcomes, in order.

    Args:
        store: a file of JSON lines. Cells of another `config` stay in it, so that more can be added later.
        inputs: JSON-able: what decides the outcomes besides the cell (the model, the Fisher, the problems).
        on_cell: called with each cell that was not run before, when it is finished.

    Raises:
        RPSAError: the Fisher was not measured on this model, or `store` holds cells of other inputs.
    """
    fisher.check_weights(model)
    done = _stored(store, inputs)
    parameters = trainable_parameters(model)
    role_of = roles({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    wanted = cells(config)
    chosen: dict[str, Tensor] = {}
    chosen_for: tuple[Any, ...] = ()
    with appending(store) as append:
        for cell in wanted:
            if cell in done:
                continue
            if cell.selection != ORIGINAL and chosen_for != (cell.selection, cell.fraction, cell.draw):
                chosen_for = (cell.selection, cell.fraction, cell.draw)
                mask: Any = cell.selection
                chosen = select(mask, fisher, parameters, cell.fraction, config.seed + cell.draw)
            with scaled(parameters, chosen, cell.factor):
                scores = {name: list(values) for name, values in evaluate(model, tokenizer).items()}
            change = abs(1 - cell.factor) * _length(parameters, chosen) / _length(parameters)
            done[cell] = Outcome(cell, _by_kind(chosen, role_of), change, scores)
            append(asdict(done[cell]))
            on_cell(cell)
    return [done[cell] for cell in wanted]


def _by_kind(selection: Mapping[str, Tensor], role_of: Mapping[str, Role]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, indices in selection.items():
        counts[role_of[name].kind] += len(indices)
    return {kind: count for kind, count in counts.items() if count}


@torch.no_grad()
def _length(parameters: Mapping[str, Tensor], selection: Mapping[str, Tensor] | None = None) -> float:
    """Euclidean length of all parameters, or of the selected elements."""
    if selection is None:
        parts = [parameter.flatten() for parameter in parameters.values()]
    else:
        parts = [
            parameters[name].take(indices.to(parameters[name].device)) for name, indices in selection.items()
        ]
    return math.sqrt(sum(part.float().square().sum(dtype=torch.float64).item() for part in parts))


def _stored(store: Path, inputs: Mapping[str, Any]) -> dict[Cell, Outcome]:
    store.parent.mkdir(parents=True, exist_ok=True)
    records = recover_lines(store)
    if not records:
        with appending(store) as append:
            append({"inputs": inputs})
        return {}
    with reading_records(store):
        return _outcomes(store, records, inputs)


def _outcomes(
    store: Path, records: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any]
) -> dict[Cell, Outcome]:
    first, *rest = records
    old = first["inputs"]
    if different := [key for key in {**old, **inputs} if old.get(key) != inputs.get(key)]:
        raise RPSAError(
            f"{store} holds cells of another {', '.join(different)}: give another folder, or delete that file"
        )
    outcomes = [Outcome(**{**record, "cell": Cell(**record["cell"])}) for record in rest]
    return {outcome.cell: outcome for outcome in outcomes}
