"""The linear recurrence, written from its definition. Slow; everything else is compared with it."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan_naive(v: Tensor, a: Tensor, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    """See :func:`.op.linear_scan`.

    Half-precision inputs are accumulated in float32 and rounded once per element of the result.
    """
    accumulate = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    if v.shape[0] == 0:
        return torch.empty_like(v)
    u = torch.zeros_like(v[0]) if initial is None else initial
    u = u.to(accumulate)
    rows: dict[int, Tensor] = {}
    for t in reversed(range(v.shape[0])) if reverse else range(v.shape[0]):
        u = a[t].to(accumulate) * u + v[t].to(accumulate)
        rows[t] = u.to(v.dtype)
    return torch.stack([rows[t] for t in range(v.shape[0])])
