"""``hwbp_compile::linear_scan``: the recurrence as one operator, whatever computes it on a device."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import cpp, loop, triton

torch.library.define(
    "hwbp_compile::linear_scan",
    "(Tensor v, Tensor a, Tensor? initial=None, bool reverse=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def linear_scan(v: Tensor, a: Tensor, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    """Return ``u`` with ``u[t] = a[t] * u[t - 1] + v[t]`` and ``u[-1] = initial`` (zero when None).

    This is the paper's CumSumProd: row ``t`` of the result holds the cotangent that has travelled
    along the residual path only.

    Args:
        v: ``[T, ...]``, the terms to accumulate; float16, bfloat16, float32 or float64.
        a: coefficients of the same dtype, ``[T, ...]`` and broadcastable to ``v``.
        initial: ``v.shape[1:]``, the value before the first row.
        reverse: from the last row to the first: ``u[t] = a[t] * u[t + 1] + v[t]``, ``u[T] = initial``.

    Returns:
        A contiguous tensor with the shape and dtype of ``v``. Half precision is accumulated in float32 and
        rounded once per element. Differentiable in all tensors. On a GPU a row of zeros stays zero whatever
        the coefficients are; on CPUs zero times infinity is not a number.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    result: Tensor = torch.ops.hwbp_compile.linear_scan.default(v, a, initial, reverse)
    return result


def check(v: Tensor, a: Tensor, initial: Tensor | None) -> None:
    """Raise ValueError for operands that do not fit: a kernel would read past their ends."""
    fits = (
        v.dim() > 0
        and a.dim() == v.dim()
        and a.shape[0] == v.shape[0]
        and all(n in (m, 1) for n, m in zip(a.shape[1:], v.shape[1:], strict=True))
        and (initial is None or initial.shape == v.shape[1:])
    )
    if not fits:
        start = "" if initial is None else f", initial {tuple(initial.shape)}"
        raise ValueError(
            "linear_scan needs v [T, ...], a [T, ...] that broadcasts to it and initial like a row of v, but "
            f"their shapes are v {tuple(v.shape)}, a {tuple(a.shape)}{start}."
        )
    tensors = [a] if initial is None else [a, initial]
    if not v.dtype.is_floating_point or any(x.dtype != v.dtype or x.device != v.device for x in tensors):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (v, *tensors))
        raise ValueError(f"linear_scan needs tensors of one floating-point dtype on one device, not {found}.")


@torch.library.impl("hwbp_compile::linear_scan", "default")
def _anywhere(v: Tensor, a: Tensor, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    check(v, a, initial)
    return loop.linear_scan(v, a, initial, reverse, False)


@torch.library.impl("hwbp_compile::linear_scan", "cpu")
def _cpu(v: Tensor, a: Tensor, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    check(v, a, initial)
    kernel = cpp.kernel(v.dtype) if v.numel() else None
    if kernel is None:
        return loop.linear_scan(v, a, initial, reverse, False)
    return cpp.linear_scan(kernel, v, a, initial, reverse, False)


@torch.library.impl("hwbp_compile::linear_scan", "cuda")
def _cuda(v: Tensor, a: Tensor, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    check(v, a, initial)
    kernel = triton.kernel() if v.numel() else None
    if kernel is None:
        return loop.linear_scan(v, a, initial, reverse, False)
    return cast(Tensor, kernel(v, a, initial, reverse, False))


@torch.library.register_fake("hwbp_compile::linear_scan")
def _fake(v: Tensor, a: Tensor, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    check(v, a, initial)
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, a, initial, reverse = inputs
    ctx.save_for_backward(a, initial, output)
    ctx.reverse = reverse


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The adjoint is the same recurrence, the other way, with coefficients moved by one row."""
    a, initial, u = ctx.saved_tensors
    if u.shape[0] == 0:
        none = None if initial is None else torch.zeros_like(initial)
        return gradient, torch.zeros_like(a), none, None
    start = torch.zeros_like(u[:1]) if initial is None else initial.unsqueeze(0)
    unused = torch.zeros_like(a[:1])
    if ctx.reverse:
        coefficients, before, first = torch.cat([unused, a[:-1]]), torch.cat([u[1:], start]), -1
    else:
        coefficients, before, first = torch.cat([a[1:], unused]), torch.cat([start, u[:-1]]), 0
    s = linear_scan(gradient, coefficients, None, not ctx.reverse)
    of_initial = None if initial is None else a[first] * s[first]
    return s, (s * before).sum_to_size(a.shape), of_initial, None


torch.library.register_autograd("hwbp_compile::linear_scan", _backward, setup_context=_setup)
