"""Bit masks: what is frozen as one bit an element, kept between changes of k.

Every step reads the mask of every element. One bool an element would cost as much memory as an 8-bit moment, and
comparing scores anew would need the scores on the device. Here eight elements share a byte, the first one in its
lowest bit. A table of 256 rows turns bytes back into words as wide as a tensor's elements, block by block, so that
they stay in the cache. A word is all ones or all zeros: bit-and with it clears an element or leaves it as it is,
whatever it holds, where a product would turn a frozen NaN or infinity into NaN; and it is three times as fast as
`masked_fill_` on a CPU. No operation waits for the device.

There are two ways through most methods. On a CPU numpy works on the same memory: its bit operations, comparisons and
`packbits` use wide instructions where torch's do not. Elsewhere torch does all of it, in the device's own queue.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rpsa.fisher.quantile import CPU_BLOCK, blocks

NUMPY_ON = ("cpu",)
"""Where numpy does the work and may keep what it works with; elsewhere torch does, and the device is not waited for."""

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
        self._kept: dict[bool, Tensor] = {}
        self._unset: Any = None

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

    @classmethod
    def signs(cls, tensor: Tensor) -> tuple["BitMask", "BitMask"]:
        """`compare` of greater and of less than 0, block by block, so that the tensor is read once."""
        flat = tensor.reshape(-1)
        pairs = [
            (_compare(flat[start:stop], "greater", 0.0), _compare(flat[start:stop], "less", 0.0))
            for start, stop in blocks(flat.numel(), flat.device)
        ]
        if not pairs:
            pairs = [(flat.to(torch.uint8), flat.to(torch.uint8))]
        positive, negative = zip(*pairs, strict=True)
        return cls(torch.cat(positive), tensor.shape), cls(torch.cat(negative), tensor.shape)

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
        if self.packed.device.type in NUMPY_ON:
            packed = self.packed.numpy()
            parts = (packed[start // 8 : -(-stop // 8)] for start, stop in self._blocks())
            return torch.tensor([int(np.bitwise_count(part).sum(dtype=np.int64)) for part in parts])
        ones = _bool_table(self.packed.device).view(torch.int8).view(256, 8).sum(1)
        counts = [ones.index_select(0, self._bytes(start, stop)).sum() for start, stop in self._blocks()]
        return torch.stack(counts) if counts else self.packed.long()

    def select(self, tensor: Tensor, *, where: bool = True, out: Tensor | None = None) -> Tensor:
        """The elements of `tensor` at which the mask is `where`, 1-D. `know_counts` must have been called."""
        flat = tensor.detach().reshape(-1)
        result = flat.new_empty(self.number(where)) if out is None else out
        if where in self._kept:
            return torch.index_select(flat, 0, self._kept[where], out=result)
        end = 0
        for (start, stop), indices in self._indices(where):
            begin, end = end, end + len(indices)
            torch.index_select(flat[start:stop], 0, indices, out=result[begin:end])
        return result

    def scatter_(self, values: Tensor, into: Tensor, *, where: bool = True) -> None:
        """Write 1-D values into the elements of a tensor at which the mask is `where`: undoes `select`."""
        flat = into.detach().view(-1) if into.is_contiguous() else into.detach().reshape(-1)
        if where in self._kept:
            flat.scatter_(0, self._kept[where], values.to(flat.dtype))
        else:
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

    def keep_indices(self, *, where: bool) -> None:
        """On a CPU remember what `select` and `scatter_` look for (int64): finding it takes longer than using it."""
        if self.packed.device.type in NUMPY_ON and where not in self._kept:
            found = [indices + start for (start, _), indices in self._indices(where)]
            self._kept[where] = torch.cat(found) if found else self.packed.long()

    def _indices(self, where: bool) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Of each block, where it lies and int64 indices into it; the device is not waited for."""
        assert self._block_counts is not None, "know_counts() first"
        for (start, stop), count in zip(self._blocks(), self._block_counts, strict=True):
            if self.packed.device.type in NUMPY_ON:
                packed = self.packed[start // 8 : -(-stop // 8)].numpy()
                bits = np.unpackbits(packed if where else ~packed, count=stop - start, bitorder="little")
                yield (start, stop), torch.from_numpy(np.flatnonzero(bits))
            else:
                block = self.block(start, stop) if where else ~self.block(start, stop)
                size = count if where else stop - start - count
                yield (start, stop), torch.nonzero_static(block, size=size).view(-1)

    def _unset_words(self) -> Any:
        """int8, -1 where the mask is not set and 0 where it is: a wider integer takes it for all of its bits or none.

        On a CPU, where it is kept: numpy reads it faster than torch unpacks bits.
        """
        if self._unset is None:
            bits = np.unpackbits(self.packed.numpy(), count=self.shape.numel(), bitorder="little")
            self._unset = bits.view(np.int8) - np.int8(1)
        return self._unset

    def clear_(self, tensor: Tensor) -> None:
        """Set `tensor` to 0 where the mask is set."""
        if not tensor.is_contiguous():
            tensor.masked_fill_(self.unpack(), 0)
            return
        bits = as_words(tensor)
        if bits.device.type in NUMPY_ON:
            whole, kept = bits.numpy(), self._unset_words()
            for start, stop in self._blocks():
                part = whole[start:stop]
                np.bitwise_and(part, kept[start:stop], out=part)
            return
        for start, stop in self._blocks():
            bits[start:stop].bitwise_and_(self.words(start, stop, bits.dtype, where=False))

    def copy_(self, source: Tensor, into: Tensor) -> None:
        """Copy the bits of `source`, of the same dtype, into the tensor where the mask is set."""
        if not into.is_contiguous():
            into.copy_(torch.where(self.unpack(), source, into))
            return
        old, bits = as_words(source), as_words(into)
        if bits.device.type in NUMPY_ON:
            whole, before, kept = bits.numpy(), old.numpy(), self._unset_words()
            scratch = np.empty(min(len(whole), CPU_BLOCK), whole.dtype)
            for start, stop in self._blocks():
                part, copied, differs = whole[start:stop], before[start:stop], scratch[: stop - start]
                # x ^ ((x ^ y) & mask) is y where the mask is set, and x elsewhere, without a branch
                np.bitwise_xor(part, copied, out=differs)
                np.bitwise_and(differs, kept[start:stop], out=differs)
                np.bitwise_xor(copied, differs, out=part)
            return
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
    if flat.device.type in NUMPY_ON:
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    # eight bools are the bytes of one int64; each 1 is shifted to its own bit of the highest byte
    return ((flat.contiguous().view(torch.int64) * _PACKING) >> 56).to(torch.uint8)


def _compare(flat: Tensor, relation: Literal["greater", "less"], value: float) -> Tensor:
    if flat.device.type in NUMPY_ON:
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
    return (-bits if where else bits - 1).to(dtype)  # -1 has all bits set, in any width
