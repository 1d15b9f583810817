"""``hwbp_compile::linear_scan``: the recurrence as one operator, so that a compiled graph stays small."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("hwbp_compile::linear_scan", mutates_args=())
def linear_scan(v: Tensor, a: Tensor, initial: Tensor | None = None) -> Tensor:
    """Return ``u`` with ``u[t] = a[t] * u[t - 1] + v[t]`` and ``u[-1] = initial`` (zero when None).

    This is the paper's CumSumProd: row ``t`` of the result holds the cotangent that has travelled
    along the residual path only.

    Args:
        v: ``[T, ...]``, the terms to accumulate; any floating dtype.
        a: coefficients, ``[T, ...]`` and broadcastable to ``v``.
        initial: ``v.shape[1:]``, the value before the first row.

    Returns:
        A contiguous tensor with the shape and dtype of ``v``. Half precision is accumulated in float32.
    """
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if v.numel() == 0:
        return out
    a = a.expand_as(v)
    if v.dtype in (torch.float16, torch.bfloat16):
        carry = torch.zeros_like(v[0], dtype=torch.float32) if initial is None else initial.float()
        for row, coefficient, term in zip(out, a, v, strict=True):
            carry = torch.addcmul(term.float(), coefficient.float(), carry)
            row.copy_(carry)
        return out
    if initial is None:
        out[0].copy_(v[0])
    else:
        torch.addcmul(v[0], a[0], initial.to(v.dtype), out=out[0])
    for t in range(1, v.shape[0]):
        torch.addcmul(v[t], a[t], out[t - 1], out=out[t])
    return out


@linear_scan.register_fake
def _(v: Tensor, a: Tensor, initial: Tensor | None = None) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)
