"""Anatomy, Fig. 1 and 2: where the Fisher lies, by layer and module, and what a frozen ratio k does to each of them."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rpsa.analysis.structure import Role, Shapes, roles
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal

Key = TypeVar("Key", bound=Hashable)

MEANING = (
    "mean: the mean of F over all elements of the matrix, in all layers where none is named; "
    "frozen: of its elements, the share with F above the threshold of k; "
    "zero: of its elements, the share with F = 0, which is never frozen; "
    "trainable_share: its part of all elements that still train"
)


@dataclass(frozen=True)
class Tally:
    """Counts of elements and their sum of F; tallies of disjoint sets add up.

    `unscored` elements have no F, because the Fisher's scope leaves them out: they always train.
    """

    elements: int = 0
    total: float = 0.0
    nonzero: int = 0
    frozen: int = 0
    unscored: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.elements + other.elements,
            self.total + other.total,
            self.nonzero + other.nonzero,
            self.frozen + other.frozen,
            self.unscored + other.unscored,
        )

    @property
    def mean(self) -> float:
        return self.total / self.elements if self.elements else 0.0

    @property
    def trainable(self) -> int:
        return self.elements + self.unscored - self.frozen

    @property
    def frozen_fraction(self) -> float:
        return self.frozen / (self.elements + self.unscored)

    @property
    def zero_fraction(self) -> float:
        return 1 - self.nonzero / self.elements if self.elements else 0.0


def is_block(role: Role) -> str | None:
    """ "attention" or "mlp" for their matrices, None for all else."""
    return role.kind if role.is_matrix and role.kind in ("attention", "mlp") else None


def is_layer_matrix(role: Role) -> str | None:
    """The module's name for a matrix inside a layer, None for all else."""
    return role.module if role.is_matrix and role.layer is not None else None


@dataclass(frozen=True)
class Anatomy:
    """A Fisher in numbers, by parameter name; `by` adds them up."""

    k: float
    threshold: float
    roles: Mapping[str, Role]
    tallies: Mapping[str, Tally]

    @property
    def all(self) -> Tally:
        return sum(self.tallies.values(), Tally())

    def by(self, key: Callable[[Role], Key | None]) -> dict[Key, Tally]:
        """Sums over the parameters whose roles have the same key; those whose key is None are left out."""
        sums: dict[Key, Tally] = defaultdict(Tally)
        for name, tally in self.tallies.items():
            value = key(self.roles[name])
            if value is not None:
                sums[value] += tally
        return dict(sums)

    def matrices(self) -> dict[str, Tally]:
        """The matrices inside the layers by module, all layers together: the bars of Fig. 2."""
        return self.by(is_layer_matrix)

    def blocks(self) -> dict[str, Tally]:
        """Attention and MLP, their matrices alone: the other bars of Fig. 2."""
        return self.by(is_block)

    def layers(self) -> dict[int, Tally]:
        """All elements of each layer: the line of Fig. 1."""
        return dict(sorted(self.by(lambda role: role.layer).items()))

    def trainable_share(self, tally: Tally) -> float:
        """Its part of all elements that still train at k."""
        return tally.trainable / max(1, self.all.trainable)

    def attention_over_mlp(self) -> dict[str, float] | None:
        """How many times the MLP's mean Fisher attention's is; None if one of them is missing or zero.

        `elements`: of the means over all elements. `matrices`: of the means over the matrices' means, in which
        a small matrix counts as much as a large one. The paper does not say which it takes.
        """
        blocks = self.blocks()
        if blocks.keys() != {"attention", "mlp"} or not blocks["mlp"].total:
            return None
        means: dict[str, list[float]] = defaultdict(list)
        for (kind, _), tally in self.by(
            lambda role: (role.kind, role.module) if is_layer_matrix(role) else None
        ).items():
            means[kind].append(tally.mean)
        average = {kind: sum(values) / len(values) for kind, values in means.items()}
        return {
            "elements": blocks["attention"].mean / blocks["mlp"].mean,
            "matrices": average["attention"] / average["mlp"],
        }


def anatomy(
    fisher: FisherDiagonal,
    k: float,
    *,
    trained: Shapes | None = None,
    classes: Mapping[str, str] | None = None,
) -> Anatomy:
    """Count and sum a Fisher parameter by parameter.

    Args:
        k: the frozen ratio.
        trained: all that the model trains by name, if the Fisher scores a part of it only.
        classes: see `roles`.

    Raises:
        RPSAError: k is not in [0, 1], or every score is zero.
    """
    threshold = fisher.threshold(k)
    shapes: dict[str, Any] = dict(trained or {}) | {n: tuple(s.shape) for n, s in fisher.scores.items()}
    tallies = {}
    for name, shape in shapes.items():
        if name not in fisher.scores:
            tallies[name] = Tally(unscored=torch.Size(shape).numel())
            continue
        scores = fisher[name]
        tallies[name] = Tally(
            elements=scores.numel(),
            total=scores.sum(dtype=torch.float64).item(),
            nonzero=int(torch.count_nonzero(scores)),
            frozen=int((scores > threshold).sum()),
        )
    return Anatomy(k, threshold, roles(shapes, classes), tallies)


@dataclass(frozen=True)
class Overlap:
    """Two Fishers' frozen sets at k: |A and B| / |A or B|, and what two sets of the same sizes have by chance.

    `by_chance` spreads each set uniformly over all elements, `by_chance_within` over the elements of each
    parameter, with its own count there: what is above it is agreement about single elements.
    """

    k: float
    sizes: tuple[int, int]
    jaccard: float
    by_chance: float
    by_chance_within: float


def overlap(first: FisherDiagonal, second: FisherDiagonal, k: float) -> Overlap:
    """Jaccard index of {F > tau_k} of two Fishers.

    Raises:
        RPSAError: they do not score the same parameters.
    """
    if {n: s.shape for n, s in first.scores.items()} != {n: s.shape for n, s in second.scores.items()}:
        raise RPSAError(
            "the two Fishers score different parameters, so their masks have no overlap to measure"
        )
    tau_first, tau_second = first.threshold(k), second.threshold(k)
    common, a_total, b_total, elements, expected = 0, 0, 0, 0, 0.0
    for name in first:
        in_first, in_second = first[name] > tau_first, second[name] > tau_second
        a, b = int(in_first.sum()), int(in_second.sum())
        common += int((in_first & in_second).sum())
        a_total, b_total, elements = a_total + a, b_total + b, elements + in_first.numel()
        expected += a * b / in_first.numel()

    def jaccard(shared: float) -> float:
        union = a_total + b_total - shared
        return shared / union if union else 0.0

    return Overlap(
        k,
        (a_total, b_total),
        jaccard(common),
        jaccard(a_total * b_total / elements),
        jaccard(expected),
    )


def to_json(at: Sequence[Anatomy]) -> dict[str, Any]:
    """Every number of Fig. 1 and 2 and of the table, of one Fisher at one k or several; `MEANING` explains them."""

    def numbers(tallies: Sequence[Tally]) -> dict[str, Any]:
        first = tallies[0]
        return {
            "elements": first.elements + first.unscored,
            "mean": first.mean if first.elements else None,
            "zero": first.zero_fraction if first.elements else None,
            "frozen": {repr(of.k): t.frozen_fraction for of, t in zip(at, tallies, strict=True)},
            "trainable_share": {repr(of.k): of.trainable_share(t) for of, t in zip(at, tallies, strict=True)},
        }

    def by(key: Callable[[Role], Key | None]) -> dict[Key, dict[str, Any]]:
        sums = [of.by(key) for of in at]
        return {value: numbers([one[value] for one in sums]) for value in sums[0]}

    cells = by(lambda role: (role.layer, role.module) if role.layer is not None else None)
    return {
        "threshold": {repr(of.k): of.threshold for of in at},
        "total": numbers([of.all for of in at]),
        "attention_over_mlp": at[0].attention_over_mlp(),
        "blocks": by(is_block),
        "kinds": by(lambda role: role.kind),
        "modules": [
            {"module": module, "kind": kind} | found
            for (module, kind), found in by(lambda role: (role.module, role.kind)).items()
        ],
        "layers": [
            {"layer": layer} | found | {"modules": {m: cell for (n, m), cell in cells.items() if n == layer}}
            for layer, found in sorted(by(lambda role: role.layer).items())
        ],
    }
