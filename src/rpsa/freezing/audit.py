"""The audit: proof, kept beside the model, that frozen elements did not move.

Whenever the mask changes, the bits of the frozen set are checksummed, and checked before it changes again. All
elements are checksummed; a seeded sample (every element of a model of up to 4M) is also compared one by one,
which says how many moved, and how far each group of modules drifted.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rpsa.freezing.freezer import Freezer
from rpsa.parameters import module_group
from rpsa.sharding import as_sharded, full, is_dtensor, local, shard_like, shard_range, sum_over_shards

SAMPLED_ELEMENTS = 1 << 22
_CHUNK = 1 << 20
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no bit of a value is lost mod 2^64


@dataclass(frozen=True)
class Interval:
    """Optimizer steps [start, end) under one mask; `moved` counts frozen elements whose bits differ at the end."""

    start: int
    end: int
    frozen_ratio: float
    threshold: float
    frozen: int
    moved: int
    tensors_changed: tuple[str, ...]


class Audit:
    """Watches one `Freezer`: `open` after its mask changed, `close` before it changes again and at the end."""

    def __init__(self, freezer: Freezer, seed: int = 42) -> None:
        self.freezer = freezer
        self.intervals: list[Interval] = []
        places = _sampled_places(freezer, seed)
        self._held = {
            name: None if of is None else _held(freezer.parameters[name], of) for name, of in places.items()
        }
        self._initial = {name: self._sampled(name) for name in freezer.parameters}
        self._initial_step = freezer.step
        self._opened: tuple[int, dict[str, int], dict[str, Tensor]] | None = None

    @torch.no_grad()
    def open(self) -> None:
        sums = {name: checksum(local(p), self.freezer.frozen(name)) for name, p in self._parameters()}
        self._opened = (
            self.freezer.step,
            sums,
            {name: self._sampled(name) for name, _ in self._parameters()},
        )

    @torch.no_grad()
    def close(self) -> None:
        """Check the frozen set against what `open` saw; nothing to do if no step was taken since."""
        if self._opened is None or self._opened[0] == self.freezer.step:
            return
        start, sums, values = self._opened
        self._opened = None
        # what is sharded may have moved on another rank: counts by tensor, summed over shards
        moved = torch.zeros(len(sums), dtype=torch.int64)
        for place, (name, p) in enumerate(self._parameters()):
            if checksum(local(p), self.freezer.frozen(name)) != sums[name]:
                moved[place] = max(1, self._moved(name, values[name]))
        moved = sum_over_shards(moved, sharded=self.freezer.sharded).cpu()
        self._add(
            Interval(
                start=start,
                end=self.freezer.step,
                frozen_ratio=self.freezer.frozen_ratio,
                threshold=self.freezer.threshold,
                frozen=sum(self.freezer.frozen_counts().values()),
                moved=int(moved.sum()),
                tensors_changed=tuple(name for name, n in zip(sums, moved.tolist(), strict=True) if n),
            )
        )

    def _add(self, interval: Interval) -> None:
        """One interval for one mask, wherever checkpoints lay: those of a run that was stopped lie elsewhere."""
        if self.intervals:
            last = self.intervals[-1]
            is_same = replace(last, start=interval.start, end=interval.end) == interval
            if is_same and last.end == interval.start and not interval.moved:
                interval = replace(interval, start=self.intervals.pop().start)
        self.intervals.append(interval)

    def report(self) -> dict[str, Any]:
        """JSON-able. `frozen_elements_moved` must be 0, unless only gradients were masked.

        Of a sharded model all ranks must ask for it.
        """
        elements = sum(p.numel() for _, p in self._parameters())
        held = torch.tensor(sum(initial.numel() for initial in self._initial.values()))
        sampled = int(sum_over_shards(held, sharded=self.freezer.sharded))
        return {
            "gradient_only": self.freezer.gradient_only,
            "frozen_element_steps_checked": sum(i.frozen * (i.end - i.start) for i in self.intervals),
            "frozen_elements_moved": sum(i.moved for i in self.intervals),
            "moved_counted_on": "every element"
            if sampled == elements
            else f"{sampled} sampled elements; checksums cover all",
            "drift": {"since_step": self._initial_step, "groups": self.drift()},
            "intervals": [asdict(interval) for interval in self.intervals],
        }

    @torch.no_grad()
    def drift(self) -> dict[str, dict[str, float]]:
        """Per module group: ||theta - theta_0|| / ||theta_0|| and the share of elements that differ (sampled)."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
        for name, _ in self._parameters():
            now, before = self._sampled(name).double(), self._initial[name].double()
            terms = [(now - before).square().sum(), before.square().sum(), (now != before).sum()]
            sums[module_group(name)] += torch.tensor([*(float(t) for t in terms), now.numel()])
        totals = sum_over_shards(torch.stack(list(sums.values())), sharded=self.freezer.sharded).cpu()
        return {
            group: {
                "relative": math.sqrt(float(s[0]) / float(s[1])) if s[1] > 0 else math.sqrt(float(s[0])),
                "changed": float(s[2] / s[3]),
            }
            for group, s in zip(sums, totals, strict=True)
        }

    def start_values(self) -> dict[str, Tensor]:
        """What `drift` measures from: the sampled elements at the start, 1-D, on the CPU; for `set_start`.

        Of a sharded model all ranks must ask for them, and each gets those of all shards.
        """
        found = {}
        for name, parameter in self.freezer.parameters.items():
            held, values = self._held[name], self._initial[name]
            if held is None:
                values = full(as_sharded(values.view_as(local(parameter)), parameter)).flatten()
            else:
                values = values.new_zeros(len(held[0])).masked_scatter_(held[0], values)
                values = sum_over_shards(values, sharded=self.freezer.sharded)
            found[name] = values.cpu()
        return found

    def set_start(self, values: Mapping[str, Tensor], step: int) -> None:
        """Go on measuring from the `start_values` of the run that is continued; they are those of `step`."""
        self._initial_step = step
        for name, parameter in self.freezer.parameters.items():
            held, start = self._held[name], values[name].to(parameter.device)
            if held is None:
                self._initial[name] = shard_like(start.view(parameter.shape), parameter).flatten()
            else:
                self._initial[name] = start[held[0]]

    def state_dict(self) -> dict[str, Any]:
        return {
            "intervals": [asdict(interval) for interval in self.intervals],
            "since_step": self._initial_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.intervals = [
            Interval(**{**interval, "tensors_changed": tuple(interval["tensors_changed"])})
            for interval in state["intervals"]
        ]

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.freezer.parameters.items())

    def _sampled(self, name: str) -> Tensor:
        values = local(self.freezer.parameters[name]).detach().flatten()
        held = self._held[name]
        return values.clone() if held is None else values[held[1]]

    def _moved(self, name: str, before: Tensor) -> int:
        frozen = self.freezer.frozen(name).flatten()
        held = self._held[name]
        if held is not None:
            frozen = frozen[held[1]]
        return int(((_bits(self._sampled(name)) != _bits(before)) & frozen).sum())


def checksum(values: Tensor, frozen: Tensor) -> int:
    """64 bits over the bits and positions of the frozen elements; any single change alters it."""
    total = 0
    for start in range(0, values.numel(), _CHUNK):
        bits = _bits(values.flatten()[start : start + _CHUNK]).to(torch.int64)
        # an element moved by one ulp up and another by one down must not cancel: weigh by position
        weights = torch.arange(start, start + bits.numel(), device=bits.device).mul_(2).add_(1)
        weights.mul_(_MULTIPLIER)
        total += int((bits * weights * frozen.flatten()[start : start + _CHUNK]).sum())
    return total & ((1 << 64) - 1)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _sampled_places(freezer: Freezer, seed: int) -> dict[str, Tensor | None]:
    """Per parameter the sampled positions in all of it, the same on all ranks; None = all."""
    sizes = {name: p.numel() for name, p in freezer.parameters.items()}
    share = SAMPLED_ELEMENTS / max(1, sum(sizes.values()))
    if share >= 1:
        return dict.fromkeys(sizes)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(max(1, size), (min(size, max(1, int(share * size))),), generator=generator).to(
            freezer.parameters[name].device
        )
        for name, size in sizes.items()
    }


def _held(parameter: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the `places` in a parameter this rank holds (bool), and where in its shard they are."""
    if not is_dtensor(parameter):
        return torch.ones_like(places, dtype=torch.bool), places
    dim, start, length = shard_range(parameter)
    size, inner = parameter.shape[dim], math.prod(parameter.shape[dim + 1 :])
    along = places // inner % size
    held = (along >= start) & (along < start + length)
    local_places = (places // (inner * size) * length + along - start) * inner + places % inner
    return held, local_places[held]
