"""Sums of squared gradients: where hooks and loop add, and what is read from them in the end.

Three things make this more than one accumulator a parameter.

- Halves. Every Fisher comes with the overlap of its two halves of samples. Two full sums would double the memory, so
  that of large models a sample of the elements alone is kept for each half. It is not added to: the sample is read from
  the one full sum before and after a group of rows, and the difference belongs to that group's half.
- Norms. A sample that is not finite must not be averaged in, and which one it was no sum can tell. The batch is then
  gone through once more for each row's squared norms alone.
- Shards. Of sharded parameters, hooks have whole gradients of this rank's own samples: they are summed for the one
  module that the backward pass is at, then reduced to each rank's shard.

Shapes: S sampled elements of a parameter.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rpsa.fisher.overlap import SAMPLED_ELEMENTS, sampled_elements
from rpsa.sharding import (
    all_reduce,
    as_sharded,
    full,
    is_dtensor,
    is_sharded,
    local,
    reduce_to_shard,
    shard_range,
    sum_over_shards,
)


class SquaredGradients:
    """Sums of squared gradients of `parameters` (float32, on each parameter's device, sharded as it is).

    The rows of a batch come in groups of neighbours, `groups`, and every gradient belongs to one of them. A
    group's rows are all of one half of the samples (0 or 1). Besides the full sum, a seeded sample of the elements
    is summed for each half: read from the full sum before and after a group. A model that is smaller than the
    sample has two full sums instead, one a half. Adding does not wait for the device.

    To tell which samples are not finite, and to compare two ways to a gradient, squared norms of each row can be
    had instead of the sums.

    Of a sharded parameter a gradient may come as its shard, the same sample's on all ranks, or whole, of this
    rank's own sample: whole ones are summed for one module, until `complete`, and no longer.
    """

    groups: list[slice]

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], seed: int, sample_size: int = SAMPLED_ELEMENTS
    ) -> None:
        elements = sampled_elements([p.numel() for p in parameters.values()], seed, sample_size)
        self.sharded = is_sharded(parameters)
        self._parameters = dict(parameters)
        self._sums: dict[str, list[Tensor]] = {}
        """By name the sum over all samples, or those over each half."""
        self._halves: dict[str, Tensor] = {}
        """By name the sampled elements' sums over each half, (2, sampled)."""
        self._sampled: dict[str, Tensor] = {}
        """By name places of the sampled elements in the flattened parameter, (S,) int64."""
        self._shards: dict[str, tuple[Tensor, Tensor]] = {}
        self._seen: dict[str, Tensor] = {}
        """By name the sampled elements of the sum when they were last looked at; none: zeros."""
        self._pending: dict[str, list[Tensor]] = {}
        self._norms: dict[str, Tensor] | None = None
        self._half_of_group: list[int] = []
        self._counts = True
        self._are_shards = False
        for (name, parameter), sampled in zip(parameters.items(), elements, strict=True):
            copies = 2 if sampled is None else 1
            self._sums[name] = _zeros(copies, local(parameter), parameter.device)
            if sampled is not None:
                self._sampled[name] = sampled.to(parameter.device)
                self._halves[name] = torch.zeros(2, len(sampled), device=parameter.device)

    def tensors(self) -> list[Tensor]:
        """The sums, of this rank's shards."""
        return [total for sums in self._sums.values() for total in sums]

    def begin(self, half_of_row: Sequence[int], *, counts: bool = True) -> None:
        """Start a batch with row i in half `half_of_row[i]`, ascending; one that does not count adds nothing."""
        ends = [half_of_row.count(0), len(half_of_row)]
        bounds = [(half, start, end) for half, start, end in zip((0, 1), [0, *ends], ends, strict=False)]
        self.groups = [slice(start, end) for _, start, end in bounds if end > start]
        self._half_of_group = [half for half, start, end in bounds if end > start]
        self._norms = None
        self._counts = counts

    def begin_norms(self, rows: int, *, counts: bool = True) -> None:
        """Start a batch of which only each row's squared norms are wanted; the sums stay as they are."""
        self.groups = [slice(row, row + 1) for row in range(rows)]
        self._norms = {name: torch.zeros(rows, device=sums[0].device) for name, sums in self._sums.items()}
        self._counts = counts
        self._are_shards = False

    def add(self, name: str, group: int, gradient: Tensor) -> None:
        """Add the square of a row's `gradient`, of any float dtype."""
        self.into(name, group, is_shard=is_dtensor(gradient))(gradient)

    def into(
        self, name: str, group: int, rows: slice | None = None, *, is_shard: bool = False
    ) -> Callable[[Tensor], object]:
        """What adds the square of a row's gradient: of the whole parameter or shard, or of some `rows` of it."""
        if not self._counts:
            return lambda gradient: None
        self._are_shards |= is_shard
        if self._norms is not None:
            return lambda gradient: self._add_norm(name, group, _narrowed(local(gradient)))
        target = self._target(name, group, is_shard=is_shard)
        part = target if rows is None else target[rows]

        def add(gradient: Tensor) -> None:
            gradient = _narrowed(local(gradient))
            part.addcmul_(gradient, gradient)

        return add

    def add_stack(self, name: str, group: int, gradients: Tensor) -> None:
        """Add the squares of the gradients of all of a group's rows, (rows, *shape of the parameter)."""
        if not self._counts:
            return
        if self._norms is not None:
            self._add_norm(name, group, _narrowed(gradients))
        else:
            self._target(name, group).add_(
                gradients.float().square().sum(dim=0)
            )  # squared before it is summed

    def add_rows(self, name: str, group: int, indices: Tensor, gradients: Tensor) -> None:
        """Add the squares of a group's gradients that are zero but in some rows of a 2-D parameter.

        `gradients` has a row for each of `indices`; an index may come again, of another sample or with zeros.
        """
        if not self._counts:
            return
        if self._norms is not None:
            self._add_norm(name, group, _narrowed(gradients))
        else:
            self._target(name, group).index_add_(0, indices, gradients.float().square())

    def look(self, name: str, group: int) -> None:
        """What was added of the sampled elements since the last look belongs to this group's half."""
        if name not in self._sampled or self._norms is not None or not self._counts:
            return
        half = self._halves[name][self._half_of_group[group]]
        if not self.sharded or name in self._pending:
            now = self._target(name, group).view(-1).index_select(0, self._sampled[name])
            # an element that did not grow adds a zero that is exact
            half.add_(now - self._seen[name] if name in self._seen else now)
        else:
            which, places = self._in_shard(name)
            now = self._sums[name][0].view(-1).index_select(0, places)
            half.index_add_(0, which, now - self._seen[name] if name in self._seen else now)
        self._seen[name] = now

    def complete(self, name: str) -> None:
        """All rows' whole gradients of this pass were added: each rank keeps the sum of its own shard."""
        if self.sharded and self._norms is None:
            for total, part in zip(self._sums[name], self._whole(name), strict=True):
                total += reduce_to_shard(part, self._parameters[name])
            del self._pending[name]
            self._seen.pop(name, None)

    def _target(self, name: str, group: int, *, is_shard: bool = False) -> Tensor:
        sums = self._whole(name) if self.sharded and not is_shard else self._sums[name]
        return sums[self._half_of_group[group] if len(sums) == 2 else 0]

    def _whole(self, name: str) -> list[Tensor]:
        if name not in self._pending:
            parameter = self._parameters[name]
            like = torch.empty(parameter.shape, device="meta")
            self._pending[name] = _zeros(len(self._sums[name]), like, parameter.device)
        return self._pending[name]

    def _in_shard(self, name: str) -> tuple[Tensor, Tensor]:
        """Which of the sampled elements this rank's shard holds, and where in it."""
        if name not in self._shards:
            parameter, flat = self._parameters[name], self._sampled[name]
            dim, start, length = shard_range(parameter)
            inner = parameter.shape[dim + 1 :].numel()
            width = parameter.shape[dim]
            outer, index, rest = flat // (width * inner), flat // inner % width, flat % inner
            which = ((index >= start) & (index < start + length)).nonzero()[:, 0]
            self._shards[name] = which, ((outer * length + index - start) * inner + rest)[which]
        return self._shards[name]

    def _add_norm(self, name: str, group: int, gradient: Tensor) -> None:
        assert self._norms is not None
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._norms[name][group] += norm.square()

    def read_norms(self) -> dict[str, Tensor]:
        """Per parameter the squared norm of this batch's gradients, one float32 value a row, on the CPU."""
        assert self._norms is not None
        norms = torch.stack([norm.cpu() for norm in self._norms.values()])
        norms = sum_over_shards(norms, sharded=self._are_shards).cpu()
        return dict(zip(self._norms, norms, strict=True))

    def nonfinite_rows(self) -> list[int]:
        """Rows of this batch whose squared norms are not finite."""
        norms = torch.stack(list(self.read_norms().values()))
        return [int(row) for row in (~norms.isfinite()).any(dim=0).nonzero()[:, 0]]

    def is_finite(self) -> Tensor:
        """Whether this rank's sums are, a bool on the first one's device."""
        everything = self.tensors()
        largest = [everything[0].new_zeros(())]
        largest += [total.amax().to(largest[0].device) for total in everything if total.numel()]
        return torch.stack(largest).isfinite().all()

    def clear(self) -> None:
        """Forget everything that was added."""
        self._pending.clear()
        self._seen.clear()
        for sums in self._sums.values():
            for total in sums:
                total.zero_()
        for halves in self._halves.values():
            halves.zero_()

    def sum_over_ranks(self) -> None:
        """Add up what the ranks have summed of their own samples; once, at the end."""
        if not self.sharded:
            for sums in self._sums.values():
                for total in sums:
                    total.copy_(all_reduce(total))
        for halves in self._halves.values():
            halves.copy_(all_reduce(halves))

    def sampled_halves(self) -> tuple[Tensor, Tensor]:
        """The sampled elements of the two halves, 1-D, on the CPU."""
        parts: list[list[Tensor]] = [[], []]
        for name, sums in self._sums.items():
            for half in (0, 1):
                if name in self._halves:
                    parts[half].append(self._halves[name][half].cpu())
                else:
                    whole = full(as_sharded(sums[half], self._parameters[name]))
                    parts[half].append(whole.flatten().cpu())
        return torch.cat(parts[0]), torch.cat(parts[1])

    def means(self, samples: int) -> dict[str, Tensor]:
        """The sums over both halves, divided by `samples`; in place, so nothing can follow it."""
        result = {}
        for name, sums in self._sums.items():
            total = sums[0].add_(sums[1]) if len(sums) == 2 else sums[0]
            result[name] = as_sharded(total.div_(samples), self._parameters[name])
        return result


def sums_bytes(elements: int) -> int:
    """What `SquaredGradients` holds of so many elements, over all ranks, once each was looked at."""
    if elements <= SAMPLED_ELEMENTS:
        return 2 * 4 * elements
    # drawn with replacement, each is then kept once: two halves, what was seen last, its place in int64
    sampled = int(-elements * math.expm1(-SAMPLED_ELEMENTS / elements))
    return 4 * elements + sampled * (3 * 4 + 8)


def _zeros(copies: int, like: Tensor, device: torch.device) -> list[Tensor]:
    return [torch.zeros_like(like, dtype=torch.float32, device=device) for _ in range(copies)]


def _narrowed(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype == torch.float64 else gradient
