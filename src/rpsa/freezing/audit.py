"""Audit: proof, kept beside the model, that frozen elements did not move.

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

from rpsa.fisher.quantile import blocks
from rpsa.freezing.bits import BitMask, as_words
from rpsa.freezing.exact import Mask
from rpsa.freezing.freezer import Freezer
from rpsa.parameters import module_group
from rpsa.settings import SEED
from rpsa.sharding import as_sharded, full, is_dtensor, local, shard_like, shard_range, sum_over_shards

SAMPLED_ELEMENTS = 1 << 22
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no bit of a value is lost mod 2^64


@dataclass(frozen=True)
class MaskSpan:
    """Optimizer steps [start, end) under one mask; `moved` counts frozen elements whose bits differ at the end."""

    start: int
    end: int
    frozen_ratio: float
    threshold: float
    frozen: int
    moved: int
    tensors_changed: tuple[str, ...]


@dataclass(frozen=True)
class _Opened:
    """What `open` saw."""

    step: int
    mask: Mask
    frozen_ratio: float
    threshold: float
    frozen: int
    checksums: list[int]
    values: dict[str, Tensor]


class Audit:
    """Watches one `Freezer`: `open` after its mask changed, `close` before it changes again and at the end.

    `next_interval` does both in one reading of the weights, after the mask has changed or at any time.
    """

    def __init__(self, freezer: Freezer, seed: int = SEED.default) -> None:
        self.freezer = freezer
        self.intervals: list[MaskSpan] = []
        places = _sampled_places(freezer, seed)
        self._held = {
            name: None if of is None else _held(freezer.parameters[name], of) for name, of in places.items()
        }
        self._initial = {name: self._sampled(name) for name in freezer.parameters}
        self._initial_step = freezer.step
        self._opened: _Opened | None = None

    def open(self) -> None:
        """Remember the frozen set, its values and its checksums.

        Raises:
            RPSAError: no optimizer is attached: what it does to frozen elements would not be checked.
        """
        self.freezer.check_attached()
        [sums] = self._checksums(self.freezer.mask)
        self._open(sums)

    def close(self) -> None:
        """Check the frozen set against what `open` saw; nothing to do if no step was taken since."""
        if self._opened is not None and self._opened.step != self.freezer.step:
            [sums] = self._checksums(self._opened.mask)
            self._close(self._opened, sums)

    def next_interval(self) -> None:
        """`close` and `open`. Weights must not have changed since the mask did."""
        before, mask = self._opened, self.freezer.mask
        if before is None or before.step == self.freezer.step:
            self.open()
            return
        old, *new = self._checksums(before.mask, *([mask] if mask is not before.mask else []))
        self._close(before, old)
        self._open(new[0] if new else old)

    def _open(self, sums: list[int]) -> None:
        freezer = self.freezer
        self._opened = _Opened(
            freezer.step,
            freezer.mask,
            freezer.frozen_ratio,
            freezer.threshold,
            sum(freezer.frozen_counts().values()),
            sums,
            {name: self._sampled(name) for name in freezer.parameters},
        )

    def _close(self, opened: _Opened, sums: list[int]) -> None:
        self._opened = None
        # what is sharded may have moved on another rank: counts by tensor, summed over shards
        counts = [
            0 if now == before else max(1, self._moved(name, opened))
            for name, now, before in zip(self.freezer.parameters, sums, opened.checksums, strict=True)
        ]
        moved = sum_over_shards(torch.tensor(counts), sharded=self.freezer.sharded).tolist()
        self._add(
            MaskSpan(
                start=opened.step,
                end=self.freezer.step,
                frozen_ratio=opened.frozen_ratio,
                threshold=opened.threshold,
                frozen=opened.frozen,
                moved=sum(moved),
                tensors_changed=tuple(n for n, m in zip(self.freezer.parameters, moved, strict=True) if m),
            )
        )

    def _checksums(self, *masks: Mask) -> list[list[int]]:
        """Of each mask's frozen elements, by parameter; the device is waited for once."""
        sums = [
            checksums(local(p.detach()), *(mask[name] for mask in masks))
            for name, p in self.freezer.parameters.items()
        ]
        device = sums[0].device
        by_parameter: list[list[int]] = torch.stack([each.to(device) for each in sums]).tolist()
        return [list(column) for column in zip(*by_parameter, strict=True)]

    def _add(self, interval: MaskSpan) -> None:
        """One interval for one mask, wherever checkpoints lay: those of a run that was stopped lie elsewhere."""
        if self.intervals:
            last = self.intervals[-1]
            is_same = replace(last, start=interval.start, end=interval.end) == interval
            if is_same and last.end == interval.start and not interval.moved:
                interval = replace(interval, start=self.intervals.pop().start)
        self.intervals.append(interval)

    def report(self) -> dict[str, Any]:
        """JSON-able. `frozen_elements_moved` must be 0, unless only gradients were masked.

        It is None where no frozen element was checked over any step: then nothing is proved. Of a sharded model
        all ranks must ask for it.
        """
        elements = sum(p.numel() for _, p in self._parameters())
        held = torch.tensor(sum(initial.numel() for initial in self._initial.values()))
        sampled = int(sum_over_shards(held, sharded=self.freezer.sharded))
        checked = sum(i.frozen * (i.end - i.start) for i in self.intervals)
        found = self.freezer.non_finite
        return {
            "gradient_only": self.freezer.gradient_only,
            "frozen_element_steps_checked": checked,
            "frozen_elements_moved": sum(i.moved for i in self.intervals) if checked else None,
            "moved_counted_on": "every element"
            if sampled == elements
            else f"{sampled} sampled elements; checksums cover all",
            "non_finite_gradients": asdict(found) if found else None,
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
            MaskSpan(**{**interval, "tensors_changed": tuple(interval["tensors_changed"])})
            for interval in state["intervals"]
        ]

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.freezer.parameters.items())

    def _sampled(self, name: str) -> Tensor:
        values = local(self.freezer.parameters[name]).detach().flatten()
        held = self._held[name]
        return values.clone() if held is None else values[held[1]]

    def _moved(self, name: str, opened: _Opened) -> int:
        frozen = opened.mask[name].unpack().flatten()
        held = self._held[name]
        if held is not None:
            frozen = frozen[held[1]]
        now, before = self._sampled(name), opened.values[name]
        return int(((as_words(now) != as_words(before)) & frozen).sum())


@torch.no_grad()
def checksums(values: Tensor, *masks: BitMask) -> Tensor:
    """64 bits over the bits and positions of each mask's elements; any single change alters it.

    Returns:
        int64, one for each mask, on the device of `values`.
    """
    words = as_words(values.contiguous())
    sums = torch.zeros(len(masks), dtype=torch.int64, device=words.device)
    for start, stop in blocks(words.numel(), words.device):
        # an element moved by one ulp up and another by one down must not cancel: weigh by position
        weights = torch.arange(start, stop, device=words.device).mul_(2).add_(1).mul_(_MULTIPLIER)
        for place, mask in enumerate(masks):
            held = words[start:stop] & mask.words(start, stop, words.dtype)
            sums[place] += (held * weights).sum()
    return sums


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
