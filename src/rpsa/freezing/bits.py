"""A mask as one bit an element: what is frozen, kept between changes of k.

Every step reads the mask of every element. One bool an element would cost as much memory as an 8-bit moment, and
comparing scores anew would need the scores on the device. Here eight elements share a byte, the first one in its
lowest bit. A table of 256 rows turns bytes back into words as wide as a tensor's elements, block by block, so that
they stay in the cache; words of ones and zeros clear or select whatever an element holds, NaN included, and no
operation waits for the device.
"""

from collections.abc import Iterator
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

    @classmethod
    def pack(cls, mask: Tensor) -> "BitMask":
        """From a bool tensor."""
        flat = mask.reshape(-1)
        packed = [_pack(flat[start:stop]) for start, stop in _blocks(flat)]
        return cls(torch.cat(packed) if packed else flat.to(torch.uint8), mask.shape)

    @classmethod
    def compare(cls, tensor: Tensor, relation: Literal["greater", "less"], value: float) -> "BitMask":
        """Of `tensor > value` or `tensor < value`; False where the tensor is NaN."""
        flat = tensor.reshape(-1)
        packed = [_compare(flat[start:stop], relation, value) for start, stop in _blocks(flat)]
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
        bytes_ = self.packed[start // 8 : -(-stop // 8)].int()
        return _bool_table(bytes_.device).index_select(0, bytes_).view(torch.bool)[: stop - start]

    def words(self, start: int, stop: int, dtype: torch.dtype, *, where: bool = True) -> Tensor:
        """Integers of `dtype` with all bits set where the mask is `where`, and none elsewhere; as `block`."""
        bytes_ = self.packed[start // 8 : -(-stop // 8)].int()
        return _word_table(dtype, bytes_.device, where).index_select(0, bytes_).view(-1)[: stop - start]

    def count(self) -> Tensor:
        """How many bits are set: int64 scalar, on the mask's device."""
        ones = _bool_table(self.packed.device).view(torch.int8).view(256, 8).sum(1)
        total = torch.zeros((), dtype=torch.int64, device=self.packed.device)
        for start, stop in _blocks(self.packed):
            total += ones.index_select(0, self.packed[start:stop].int()).sum()
        return total

    def clear_(self, tensor: Tensor) -> None:
        """Set `tensor` to 0 where the mask is set."""
        if not tensor.is_contiguous():
            tensor.masked_fill_(self.unpack(), 0)
            return
        bits = as_words(tensor)
        for start, stop in _blocks(bits):
            bits[start:stop].bitwise_and_(self.words(start, stop, bits.dtype, where=False))

    def copy_(self, source: Tensor, into: Tensor) -> None:
        """Copy the bits of `source`, of the same dtype, into the tensor where the mask is set."""
        if not into.is_contiguous():
            into.copy_(torch.where(self.unpack(), source, into))
            return
        old, bits = as_words(source), as_words(into)
        for start, stop in _blocks(bits):
            # x ^= (x ^ y) & mask: two passes less than torch.where makes on a CPU
            changed = (bits[start:stop] ^ old[start:stop]).bitwise_and_(self.words(start, stop, bits.dtype))
            bits[start:stop].bitwise_xor_(changed)


def _blocks(flat: Tensor) -> Iterator[tuple[int, int]]:
    return blocks(flat.numel(), flat.device)


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
