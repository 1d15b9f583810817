"""The recurrence as a loop of torch operators: without a kernel for the device, or without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan(v: Tensor, a: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """See :func:`.op.linear_scan`."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if v.numel() == 0:
        return out
    accumulate = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    carry = torch.zeros_like(v[0]) if initial is None else initial
    carry = carry.to(accumulate)
    order = range(v.shape[0] - 1, -1, -1) if reverse else range(v.shape[0])
    if accumulate == v.dtype:
        for t in order:
            carry = torch.addcmul(v[t], a[t].expand_as(carry), carry, out=out[t])
        return out
    for t in order:
        carry = torch.addcmul(v[t].to(accumulate), a[t].to(accumulate), carry)
        out[t].copy_(carry)
    return out
