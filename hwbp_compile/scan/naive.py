"""The linear recurrence, written from its definition. Slow; everything else is compared with it."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan_naive(v: Tensor, a: Tensor, initial: Tensor | None = None) -> Tensor:
    """Return ``u`` with ``u[t] = a[t] * u[t - 1] + v[t]`` and ``u[-1] = initial`` (zero when None).

    Args:
        v: ``[T, ...]``, the terms to accumulate.
        a: coefficients, ``[T, ...]`` and broadcastable to ``v``.
        initial: ``v.shape[1:]``.

    Half-precision inputs are accumulated in float32 and rounded once per element of the result.
    """
    accumulate = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    rows = []
    u = torch.zeros_like(v[0], dtype=accumulate) if initial is None and v.shape[0] else initial
    for t in range(v.shape[0]):
        assert u is not None
        u = a[t].to(accumulate) * u.to(accumulate) + v[t].to(accumulate)
        rows.append(u.to(v.dtype))
    return torch.stack(rows) if rows else torch.empty_like(v)
