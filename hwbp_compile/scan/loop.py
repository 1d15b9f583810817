"""The recurrence as a loop of torch operators: without a kernel for the device, or without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import rows_like, same_for_all


def linear_scan(v: Tensor, a: Tensor | None, initial: Tensor | None, reverse: bool, whole: bool) -> Tensor:
    """See :func:`.op.linear_scan` and, for ``whole`` and no coefficients, :func:`.cpp.linear_scan`."""
    a = same_for_all(v, 1.0) if a is None else a
    result = out = rows_like(v, whole)
    carry = v.new_zeros(v.shape[1:]) if initial is None else initial
    if whole:
        result[0].copy_(carry)
        out = result[1:]
    if v.numel() == 0:
        return result
    accumulate = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    carry = carry.to(accumulate)
    order = range(v.shape[0] - 1, -1, -1) if reverse else range(v.shape[0])
    if accumulate == v.dtype:
        for t in order:
            carry = torch.addcmul(v[t], a[t].expand_as(carry), carry, out=out[t])
        return result
    for t in order:
        carry = torch.addcmul(v[t].to(accumulate), a[t].to(accumulate), carry)
        out[t].copy_(carry)
    return result
