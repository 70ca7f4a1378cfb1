"""The running sums of squared gradients, and what is read from them."""

from collections.abc import Mapping, Sequence

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

    Every gradient belongs to a row of the current batch, and every row to one half of the samples (0 or 1).
    Besides the full sum, a seeded sample of the elements is summed for each half. A model that is smaller
    than the sample has two full sums instead, one a half. Adding does not wait for the device.

    Of a sharded parameter a gradient may come as its shard, the same sample's on all ranks, or whole, of this
    rank's own sample: whole ones are summed for one module, until `complete`, and no longer.
    """

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
        self._pending: dict[str, list[Tensor]] = {}
        self._traces: dict[str, Tensor] = {}
        self._half_of_row: list[int] = []
        self._counts = True
        self._are_shards = False
        for (name, parameter), sampled in zip(parameters.items(), elements, strict=True):
            copies = 2 if sampled is None else 1
            self._sums[name] = _zeros(copies, local(parameter), parameter.device)
            if sampled is not None:
                self._sampled[name] = sampled.to(parameter.device)
                self._halves[name] = torch.zeros(2, len(sampled), device=parameter.device)

    def begin(self, half_of_row: Sequence[int], *, counts: bool = True) -> None:
        """Start a batch whose row i belongs to half `half_of_row[i]`; one that does not count adds nothing."""
        self._half_of_row = list(half_of_row)
        self._counts = counts
        self._are_shards = False
        self._traces = {
            name: torch.zeros(len(half_of_row), device=sums[0].device) for name, sums in self._sums.items()
        }

    def add(self, name: str, row: int, gradient: Tensor) -> None:
        """Add the square of `gradient`, which has the parameter's shape and any float dtype."""
        if not self._counts:
            return
        self._are_shards |= is_dtensor(gradient)
        target = self._target(name, row, is_shard=is_dtensor(gradient))
        shard = _narrowed(local(gradient))
        target.addcmul_(shard, shard)
        if name in self._sampled:
            self._add_sampled(name, row, gradient, shard.flatten())
        self._add_trace(name, row, shard)

    def add_rows(self, name: str, row: int, indices: Tensor, gradient: Tensor) -> None:
        """Add the square of a gradient that is zero but in the distinct rows `indices` of a 2-D parameter."""
        if not self._counts:
            return
        gradient = _narrowed(gradient)
        self._target(name, row, is_shard=False).index_add_(0, indices, gradient.square())
        if name in self._sampled:
            shape = self._parameters[name].shape
            picked = _pick(gradient.square(), indices, self._sampled[name], shape)
            self._halves[name][self._half_of_row[row]].add_(picked)
        self._add_trace(name, row, gradient)

    def complete(self, name: str) -> None:
        """All rows' whole gradients of this pass were added: each rank keeps the sum of its own shard."""
        if self.sharded:
            for total, part in zip(self._sums[name], self._whole(name), strict=True):
                total += reduce_to_shard(part, self._parameters[name])
            del self._pending[name]

    def _target(self, name: str, row: int, *, is_shard: bool) -> Tensor:
        sums = self._whole(name) if self.sharded and not is_shard else self._sums[name]
        return sums[self._half_of_row[row] if len(sums) == 2 else 0]

    def _whole(self, name: str) -> list[Tensor]:
        if name not in self._pending:
            parameter = self._parameters[name]
            like = torch.empty(parameter.shape, device="meta")
            self._pending[name] = _zeros(len(self._sums[name]), like, parameter.device)
        return self._pending[name]

    def _add_sampled(self, name: str, row: int, gradient: Tensor, values: Tensor) -> None:
        flat, half = self._sampled[name], self._halves[name][self._half_of_row[row]]
        if not is_dtensor(gradient):
            half.addcmul_(values[flat], values[flat])
            return
        # of a shard: those of the sampled elements that it holds, and where it holds them
        shape = gradient.shape
        dim, start, length = shard_range(gradient)
        inner = shape[dim + 1 :].numel()
        outer, index, rest = flat // (shape[dim] * inner), flat // inner % shape[dim], flat % inner
        is_here = (index >= start) & (index < start + length)
        here = ((outer * length + index - start) * inner + rest)[is_here]
        half[is_here] += values[here].float().square()

    def _add_trace(self, name: str, row: int, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._traces[name][row] += norm.square()

    def read_traces(self) -> dict[str, Tensor]:
        """Per parameter the sum of this batch's squared gradients, one float32 value a row, on the CPU."""
        traces = torch.stack([trace.cpu() for trace in self._traces.values()])
        traces = sum_over_shards(traces, sharded=self._are_shards).cpu()
        return dict(zip(self._traces, traces, strict=True))

    def nonfinite_rows(self) -> list[int]:
        """Rows of this batch that had a gradient that is not finite, or whose square is not."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for trace in self._traces.values():
            by_device.setdefault(trace.device, []).append(trace)
        is_bad = torch.zeros(len(self._half_of_row), dtype=torch.int64)
        for traces in by_device.values():
            is_bad |= (~torch.stack(traces).isfinite()).any(dim=0).cpu()
        is_bad = sum_over_shards(is_bad, sharded=self._are_shards).cpu()
        return [int(row) for row in is_bad.nonzero()[:, 0]]

    def clear(self) -> None:
        """Forget everything that was added."""
        self._pending.clear()
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


def _zeros(copies: int, like: Tensor, device: torch.device) -> list[Tensor]:
    return [torch.zeros_like(like, dtype=torch.float32, device=device) for _ in range(copies)]


def _narrowed(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype == torch.float64 else gradient


def _pick(rows: Tensor, indices: Tensor, wanted: Tensor, shape: torch.Size) -> Tensor:
    """Flat elements `wanted` of a matrix of `shape` that is zero but for `rows` at `indices`."""
    place = torch.full((shape[0],), -1, device=indices.device)
    place[indices] = torch.arange(len(indices), device=indices.device)
    found = place[wanted // shape[1]]
    return torch.where(found < 0, 0.0, rows[found, wanted % shape[1]])
