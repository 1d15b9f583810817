"""How kernels of the recurrence walk through their operands.

Each call of an operator to look at a tensor takes as long as a kernel, so sizes and strides are read instead.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_like(v: Tensor, whole: bool) -> Tensor:
    """Memory for a result: as many rows as ``v`` has, or one more."""
    if whole:
        return v.new_empty((v.shape[0] + 1, *v.shape[1:]))
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def same_for_all(terms: Tensor, coefficient: float) -> Tensor:
    """One coefficient for all rows, as a tensor."""
    one = (1,) * (terms.dim() - 1)
    return terms.new_full((1, *one), coefficient).expand(terms.shape[0], *one)


def rows_of(x: Tensor, columns: int) -> tuple[Tensor, int]:
    """``x`` with rows that are contiguous, and how far apart they lie."""
    if not _has_contiguous_rows(x):
        x = x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else columns


def coefficients_of(a: Tensor, v: Tensor, columns: int) -> tuple[Tensor, int, bool]:
    """Coefficients, how far their rows lie apart, and whether a row is a single number."""
    if a.numel() == a.shape[0]:
        return a, a.stride(0) if a.shape[0] > 1 else 0, True
    return *rows_of(a if a.shape == v.shape else a.expand_as(v), columns), False


def _has_contiguous_rows(x: Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
