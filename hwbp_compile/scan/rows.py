"""How kernels of the recurrence walk through their operands."""

from __future__ import annotations

from torch import Tensor


def rows_of(x: Tensor, columns: int) -> tuple[Tensor, int]:
    """``x`` with rows that are contiguous, and how far apart they lie."""
    if not x[0].is_contiguous():
        x = x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else columns


def coefficients_of(a: Tensor, v: Tensor, columns: int) -> tuple[Tensor, int, bool]:
    """Coefficients, how far their rows lie apart, and whether a row is a single number."""
    if a[0].numel() == 1:
        return a, a.stride(0) if a.shape[0] > 1 else 0, True
    return *rows_of(a.expand_as(v), columns), False
