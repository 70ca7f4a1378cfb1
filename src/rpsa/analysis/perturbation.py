"""Perturbation, Fig. 3: scale a small part of a model's elements, those with the highest Fisher or others, and see.

The experiment is a set of cells, each one way to disturb the model. A cell is stored when it is finished, and the
model's bits are put back before the next begins.

Of the cells come accuracies, drops and differences to the Fisher cell. Their intervals are of 95%, and cover both that
the problems are a sample and that the random selections are draws. Over problems they are Wilson's for an accuracy,
and Newcombe's (1998, method 10) for a difference paired by problem; over draws Student's t. Parts are put together by
squaring and adding the distances to either limit, which is also how benchmarks are put together for their mean.
"""

import logging
import math
import statistics
from collections import Counter, defaultdict
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
from rpsa.evaluation.statistics import mean_interval
from rpsa.evaluation.statistics.rates import wilson_limits
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.masks import control_scores, keep_top
from rpsa.parameters import trainable_parameters
from rpsa.settings import MaskKind

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
            if selection not in get_args(MaskKind):
                raise RPSAError(f"selection {selection!r} is not one of {', '.join(get_args(MaskKind))}")
        if self.draws < 1:
            raise RPSAError(f"draws is {self.draws}: give at least 1")


@dataclass(frozen=True)
class PerturbationCell:
    """One way to disturb the model: `fraction` of all elements, times `factor`. `draw` numbers the seeds."""

    selection: str
    fraction: float = 0.0
    factor: float = 1.0
    draw: int = 0


@dataclass(frozen=True)
class PerturbationOutcome:
    """A finished cell.

    Attributes:
        where: how many elements were scaled in attention, mlp, norms and so on.
        change: Euclidean length of what scaling added to the parameters, over that of the parameters. Selections
            of one size differ in it, because large weights change more.
        scores: each problem's score by benchmark.
    """

    cell: PerturbationCell
    where: Mapping[str, int]
    change: float
    scores: Mapping[str, Sequence[float]]

    @property
    def elements(self) -> int:
        return sum(self.where.values())


def cells(config: PerturbationConfig) -> list[PerturbationCell]:
    """The untouched model first; cells that share a selection of elements follow one another."""
    return [PerturbationCell(ORIGINAL)] + [
        PerturbationCell(selection, fraction, factor, draw)
        for selection in config.selections
        for fraction in config.fractions
        for draw in range(config.draws if selection in DRAWN else 1)
        for factor in config.factors
    ]


def select(
    selection: MaskKind, fisher: FisherDiagonal, parameters: Mapping[str, Tensor], fraction: float, seed: int
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
    on_cell: Callable[[PerturbationCell], None] = lambda cell: None,
) -> list[PerturbationOutcome]:
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
            done[cell] = PerturbationOutcome(cell, _by_kind(chosen, role_of), change, scores)
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


def _stored(store: Path, inputs: Mapping[str, Any]) -> dict[PerturbationCell, PerturbationOutcome]:
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
) -> dict[PerturbationCell, PerturbationOutcome]:
    first, *rest = records
    old = first["inputs"]
    if different := [key for key in {**old, **inputs} if old.get(key) != inputs.get(key)]:
        raise RPSAError(
            f"{store} holds cells of another {', '.join(different)}: give another folder, or delete that file"
        )
    outcomes = [
        PerturbationOutcome(**{**record, "cell": PerturbationCell(**record["cell"])}) for record in rest
    ]
    return {outcome.cell: outcome for outcome in outcomes}


Samples = Mapping[str, Sequence[Sequence[float]]]
"""Benchmark -> draw -> problem -> score in [0, 1]."""

_Z = 1.96


@dataclass(frozen=True)
class BoundedMean:
    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "ci95": [self.low, self.high]}


@dataclass(frozen=True)
class Effect:
    """One selection at one fraction and factor, all draws together; each by benchmark, and "mean" over them.

    Attributes:
        draws: the mean over the benchmarks for each draw.
        where, change: of the first draw; see `PerturbationOutcome`.
        drop: from the untouched model, paired by problem; None for that model itself.
        above_fisher: how much better than the Fisher cell of this fraction and factor, paired by problem; None
            without one.
    """

    selection: str
    fraction: float
    factor: float
    draws: Sequence[float]
    where: Mapping[str, int]
    change: float
    accuracy: Mapping[str, BoundedMean]
    drop: Mapping[str, BoundedMean] | None
    above_fisher: Mapping[str, BoundedMean] | None

    def to_json(self) -> dict[str, Any]:
        def estimates(of: Mapping[str, BoundedMean] | None) -> Any:
            return {name: estimate.to_json() for name, estimate in of.items()} if of else None

        return {
            "selection": self.selection,
            "fraction": self.fraction,
            "factor": self.factor,
            "draws": list(self.draws),
            "elements": dict(self.where),
            "change": self.change,
            "accuracy": estimates(self.accuracy),
            "drop": estimates(self.drop),
            "above_fisher": estimates(self.above_fisher),
        }


def effects(outcomes: Sequence[PerturbationOutcome]) -> list[Effect]:
    """One effect for each selection, fraction and factor, in order of appearance."""
    groups: dict[tuple[str, float, float], list[PerturbationOutcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.cell.selection, outcome.cell.fraction, outcome.cell.factor].append(outcome)
    samples = {key: _samples(group) for key, group in groups.items()}
    original = next(found for key, found in samples.items() if key[0] == ORIGINAL)
    results = []
    for key, group in groups.items():
        selection, fraction, factor = key
        fisher = samples.get(("fisher", fraction, factor))
        results.append(
            Effect(
                selection,
                fraction,
                factor,
                _draw_means(samples[key]),
                group[0].where,
                group[0].change,
                accuracy(samples[key]),
                difference(original, samples[key]) if selection != ORIGINAL else None,
                difference(samples[key], fisher) if fisher and selection != "fisher" else None,
            )
        )
    return results


def accuracy(samples: Samples) -> dict[str, BoundedMean]:
    """The mean score over problems and draws of each benchmark, and the "mean" of these means.

    Fewer than three draws say nothing about how much draws differ: the interval is then over problems alone.
    """
    over_problems = {}
    for name, draws in samples.items():
        problems = _problem_means(draws)
        value = statistics.fmean(problems)
        over_problems[name] = BoundedMean(value, *wilson(value, len(problems)))
    draw_means = {name: [statistics.fmean(draw) for draw in draws] for name, draws in samples.items()}
    return _with_mean(over_problems, draw_means, (0.0, 1.0))


def difference(first: Samples, second: Samples) -> dict[str, BoundedMean]:
    """first - second, paired by problem; as `accuracy`. One of them may have a single draw, the other several."""
    over_problems = {
        name: newcombe(_problem_means(first[name]), _problem_means(second[name])) for name in first
    }
    draw_means = {}
    for name in first:
        a, b = ([statistics.fmean(draw) for draw in of[name]] for of in (first, second))
        count = max(len(a), len(b))
        a, b = (means * count if len(means) == 1 else means for means in (a, b))
        draw_means[name] = [x - y for x, y in zip(a, b, strict=True)]
    return _with_mean(over_problems, draw_means, (-1.0, 1.0))


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% score interval of a share of `count` problems; scores between 0 and 1 make it wider than need be."""
    return wilson_limits(share, count, _Z)


def newcombe(first: Sequence[float], second: Sequence[float]) -> BoundedMean:
    """The mean of first - second over the same problems, its interval from both Wilson intervals."""
    a, b = statistics.fmean(first), statistics.fmean(second)
    (low_a, high_a), (low_b, high_b) = wilson(a, len(first)), wilson(b, len(second))
    correlation = _correlation(first, second)

    def apart(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    return BoundedMean(a - b, a - b - apart(a - low_a, high_b - b), a - b + apart(high_a - a, b - low_b))


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Newcombe's phi: a positive covariance is taken 1 / 2n smaller; 0 where one of the two does not vary."""
    a, b = statistics.fmean(first), statistics.fmean(second)
    scale = math.sqrt(statistics.pvariance(first) * statistics.pvariance(second))
    if scale == 0:
        return 0.0
    covariance = math.fsum((x - a) * (y - b) for x, y in zip(first, second, strict=True)) / len(first)
    return (covariance if covariance <= 0 else max(0.0, covariance - 0.5 / len(first))) / scale


def _with_mean(
    over_problems: Mapping[str, BoundedMean],
    draws: Mapping[str, Sequence[float]],
    bounds: tuple[float, float],
) -> dict[str, BoundedMean]:
    """Each benchmark with the spread of its draws, and the mean over benchmarks with that of its own."""
    count = len(over_problems)
    value = statistics.fmean(e.value for e in over_problems.values())
    mean = BoundedMean(
        value,
        value - math.hypot(*(e.value - e.low for e in over_problems.values())) / count,
        value + math.hypot(*(e.high - e.value for e in over_problems.values())) / count,
    )
    found = {name: _widened(e, draws[name], bounds) for name, e in over_problems.items()}
    return found | {
        "mean": _widened(mean, [statistics.fmean(one) for one in zip(*draws.values(), strict=True)], bounds)
    }


def _widened(of: BoundedMean, draws: Sequence[float], bounds: tuple[float, float]) -> BoundedMean:
    interval = mean_interval(draws)
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    return BoundedMean(
        of.value,
        max(bounds[0], of.value - math.hypot(of.value - of.low, half)),
        min(bounds[1], of.value + math.hypot(of.high - of.value, half)),
    )


def _problem_means(draws: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(scores) for scores in zip(*draws, strict=True)]


def _samples(group: Sequence[PerturbationOutcome]) -> Samples:
    return {name: [outcome.scores[name] for outcome in group] for name in group[0].scores}


def _draw_means(samples: Samples) -> list[float]:
    return [
        statistics.fmean(statistics.fmean(scores) for scores in one)
        for one in zip(*samples.values(), strict=True)
    ]
