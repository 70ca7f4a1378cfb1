"""A mask as one bit an element: what is frozen, kept between changes of k.

Every step reads the mask of every element. One bool an element would cost as much memory as an 8-bit moment, and
comparing scores anew would need the scores on the device. Here eight elements share a byte, the first one in its
lowest bit. A table of 256 rows turns bytes back into words as wide as a tensor's elements, block by block, so that
they stay in the cache; words of ones and zeros clear or select whatever an element holds, NaN included, and no
operation waits for the device.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rpsa.fisher.quantile import blocks

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PACKING = 0x0102040810204080  # a product with it brings the lowest bits of eight bytes into the highest byte


class BitMask:
    """A bool tensor, packed.

    Args:
        packed: uint8, ceil(n / 8); bits behind the last element are 0.
        shape: of the tensor that is masked.
    """

    def __init__(self, packed: Tensor, shape: torch.Size) -> None:
        self.packed, self.shape = packed, shape
        self._block_counts: list[int] | None = None

    @classmethod
    def pack(cls, mask: Tensor) -> "BitMask":
        """From a bool tensor."""
        flat = mask.reshape(-1)
        packed = [_pack(flat[start:stop]) for start, stop in blocks(flat.numel(), flat.device)]
        return cls(torch.cat(packed) if packed else flat.to(torch.uint8), mask.shape)

    @classmethod
    def compare(cls, tensor: Tensor, relation: Literal["greater", "less"], value: float) -> "BitMask":
        """Of `tensor > value` or `tensor < value`; False where the tensor is NaN."""
        flat = tensor.reshape(-1)
        packed = [
            _compare(flat[start:stop], relation, value) for start, stop in blocks(flat.numel(), flat.device)
        ]
        return cls(torch.cat(packed) if packed else flat.to(torch.uint8), tensor.shape)

    def __and__(self, other: "BitMask") -> "BitMask":
        return BitMask(self.packed & other.packed, self.shape)

    def __or__(self, other: "BitMask") -> "BitMask":
        return BitMask(self.packed | other.packed, self.shape)

    def unpack(self) -> Tensor:
        """Bool, in the shape of the mask."""
        return self.block(0, self.shape.numel()).view(self.shape)

    def block(self, start: int, stop: int) -> Tensor:
        """Bool, elements [start, stop) of the flattened mask; `start` is a multiple of 8."""
        table = _bool_table(self.packed.device)
        return table.index_select(0, self._bytes(start, stop)).view(torch.bool)[: stop - start]

    def words(self, start: int, stop: int, dtype: torch.dtype, *, where: bool = True) -> Tensor:
        """Integers of `dtype` with all bits set where the mask is `where`, and none elsewhere; as `block`."""
        table = _word_table(dtype, self.packed.device, where)
        return table.index_select(0, self._bytes(start, stop)).view(-1)[: stop - start]

    def _bytes(self, start: int, stop: int) -> Tensor:
        return self.packed[start // 8 : -(-stop // 8)].int()

    def _blocks(self) -> Iterator[tuple[int, int]]:
        return blocks(self.shape.numel(), self.packed.device)

    def counts(self) -> Tensor:
        """How many bits are set in each block of elements: int64, on the mask's device."""
        ones = _bool_table(self.packed.device).view(torch.int8).view(256, 8).sum(1)
        counts = [ones.index_select(0, self._bytes(start, stop)).sum() for start, stop in self._blocks()]
        return torch.stack(counts) if counts else self.packed.long()

    def select(self, tensor: Tensor, *, where: bool = True) -> Tensor:
        """The elements of `tensor` at which the mask is `where`, 1-D. `know_counts` must have been called."""
        flat = tensor.detach().reshape(-1)
        result = flat.new_empty(self.number(where))
        end = 0
        for (start, stop), indices in self._indices(where):
            begin, end = end, end + len(indices)
            torch.index_select(flat[start:stop], 0, indices, out=result[begin:end])
        return result

    def scatter_(self, values: Tensor, into: Tensor, *, where: bool = True) -> None:
        """Write 1-D values into the elements of a tensor at which the mask is `where`: undoes `select`."""
        flat = into.detach().view(-1) if into.is_contiguous() else into.detach().reshape(-1)
        end = 0
        for (start, stop), indices in self._indices(where):
            begin, end = end, end + len(indices)
            flat[start:stop].scatter_(0, indices, values[begin:end].to(flat.dtype))
        if not into.is_contiguous():
            into.copy_(flat.view(into.shape))

    def number(self, where: bool = True) -> int:
        """How many elements `select` gives."""
        assert self._block_counts is not None, "know_counts() first"
        return sum(self._block_counts) if where else self.shape.numel() - sum(self._block_counts)

    def _indices(self, where: bool) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Of each block, where it lies and int64 indices into it; the device is not waited for."""
        assert self._block_counts is not None, "know_counts() first"
        for (start, stop), count in zip(self._blocks(), self._block_counts, strict=True):
            if self.packed.device.type == "cpu":
                packed = self.packed[start // 8 : -(-stop // 8)].numpy()
                bits = np.unpackbits(packed if where else ~packed, count=stop - start, bitorder="little")
                yield (start, stop), torch.from_numpy(np.flatnonzero(bits))
            else:
                block = self.block(start, stop) if where else ~self.block(start, stop)
                size = count if where else stop - start - count
                yield (start, stop), torch.nonzero_static(block, size=size).view(-1)

    def clear_(self, tensor: Tensor) -> None:
        """Set `tensor` to 0 where the mask is set."""
        if not tensor.is_contiguous():
            tensor.masked_fill_(self.unpack(), 0)
            return
        bits = as_words(tensor)
        for start, stop in self._blocks():
            bits[start:stop].bitwise_and_(self.words(start, stop, bits.dtype, where=False))

    def copy_(self, source: Tensor, into: Tensor) -> None:
        """Copy the bits of `source`, of the same dtype, into the tensor where the mask is set."""
        if not into.is_contiguous():
            into.copy_(torch.where(self.unpack(), source, into))
            return
        old, bits = as_words(source), as_words(into)
        for start, stop in self._blocks():
            # x ^= (x ^ y) & mask: two passes less than torch.where makes on a CPU
            changed = (bits[start:stop] ^ old[start:stop]).bitwise_and_(self.words(start, stop, bits.dtype))
            bits[start:stop].bitwise_xor_(changed)


def know_counts(masks: Iterable[BitMask]) -> None:
    """Let masks know how many bits are set, which `select` and `scatter_` need; the device is waited for once."""
    masks = list(masks)
    counts = [mask.counts() for mask in masks]
    known = torch.cat(counts).tolist() if counts else []
    for mask, count in zip(masks, counts, strict=True):
        mask._block_counts, known = known[: len(count)], known[len(count) :]


def as_words(tensor: Tensor) -> Tensor:
    """The bits of a contiguous tensor as a flat integer one of the same width, sharing its storage."""
    return tensor.detach().view(-1).view(_WORDS[tensor.element_size()])


def _pack(flat: Tensor) -> Tensor:
    """uint8 (ceil(n / 8)) of a flat bool tensor."""
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return ((flat.contiguous().view(torch.int64) * _PACKING) >> 56).to(torch.uint8)


def _compare(flat: Tensor, relation: Literal["greater", "less"], value: float) -> Tensor:
    if flat.device.type == "cpu":
        # four times as fast as torch's comparison, which does not use wide instructions here
        numbers = (flat.float() if flat.dtype == torch.bfloat16 else flat).numpy()
        return torch.from_numpy(np.packbits(getattr(np, relation)(numbers, value), bitorder="little"))
    return _pack(getattr(torch, relation)(flat, value))


@cache
def _bits(device: torch.device) -> Tensor:
    """(256, 8) int64: the bits of every byte, the lowest first."""
    return (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1


@cache
def _bool_table(device: torch.device) -> Tensor:
    """int64 (256): each entry is eight bools."""
    return _bits(device).to(torch.int8).view(torch.int64).flatten()


@cache
def _word_table(dtype: torch.dtype, device: torch.device, where: bool) -> Tensor:
    bits = _bits(device)
    return (-bits if where else bits - 1).to(dtype)
