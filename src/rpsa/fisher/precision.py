"""Precision of products of float32 matrices: torch has two ways to say it, and may refuse to be asked in the old one.

It does once the new one (`torch.backends.fp32_precision`) was used, as trainers with `tf32` do on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def takes_tf32() -> bool:
    """Whether products of float32 matrices on CUDA are taken in less than float32."""
    precision = _old_way()
    return (
        torch.backends.cuda.matmul.fp32_precision != "ieee" if precision is None else precision != "highest"
    )


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """TF32 within, or within all of float32; afterwards as it was, in either way."""
    new_ways = [one.matmul for one in (torch.backends.cuda, torch.backends.mkldnn)]
    new_ways = [one for one in new_ways if hasattr(one, "fp32_precision")]  # torch >= 2.9
    before, old = [one.fp32_precision for one in new_ways], _old_way()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old or "highest")
        for one, precision in zip(new_ways, before, strict=True):
            one.fp32_precision = precision


def _old_way() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
