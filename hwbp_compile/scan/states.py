"""``hwbp_compile::states``: all states along a residual path in one call, from the first on.

It is what a schedule calls, once an iteration. So it does not do what :func:`.op.linear_scan` does for
everybody, and takes half as long to call: it has no gradient, and whether its operands fit is looked at when
a graph is traced, not in each step.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from . import cpp, loop, triton
from .op import check, linear_scan

torch.library.define(
    "hwbp_compile::states",
    "(Tensor first, Tensor terms, Tensor? a) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def states(first: Tensor, terms: Tensor, a: Tensor | float) -> Tensor:
    """Return ``u[0] = first``, ``u[p + 1] = terms[p] + a[p] u[p]``, stacked: ``[T + 1, ...]``.

    Half precision is accumulated in float32 and rounded once per element. Differentiable in all tensors.

    Args:
        first: one state.
        terms: ``[T, ...]``, of its dtype.
        a: coefficients ``[T, ...]`` of the same dtype; one number for all rows, if it is a float.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    coefficients = a if isinstance(a, Tensor) else None if a == 1.0 else _same(terms, a)
    check(terms, terms if coefficients is None else coefficients, first)
    tensors = [x for x in (first, terms, coefficients) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):  # a solver on its own
        later = linear_scan(terms, _same(terms, 1.0) if coefficients is None else coefficients, first)
        return torch.cat([first.unsqueeze(0), later])
    result: Tensor = torch.ops.hwbp_compile.states.default(first, terms, coefficients)
    return result


def _same(terms: Tensor, coefficient: float) -> Tensor:
    """One coefficient for all rows, as a tensor."""
    one = (1,) * (terms.dim() - 1)
    return terms.new_full((1, *one), coefficient).expand(terms.shape[0], *one)


@torch.library.impl("hwbp_compile::states", "default")
def _anywhere(first: Tensor, terms: Tensor, a: Tensor | None) -> Tensor:
    return loop.linear_scan(terms, _same(terms, 1.0) if a is None else a, first, False, True)


@torch.library.impl("hwbp_compile::states", "cpu")
def _cpu(first: Tensor, terms: Tensor, a: Tensor | None) -> Tensor:
    kernel = cpp.kernel(terms.dtype) if terms.numel() else None
    if kernel is None:
        return loop.linear_scan(terms, _same(terms, 1.0) if a is None else a, first, False, True)
    return cpp.linear_scan(kernel, terms, a, first, False, True)


@torch.library.impl("hwbp_compile::states", "cuda")
def _cuda(first: Tensor, terms: Tensor, a: Tensor | None) -> Tensor:
    kernel = triton.kernel() if terms.numel() else None
    coefficients = _same(terms, 1.0) if a is None else a
    if kernel is None:
        return loop.linear_scan(terms, coefficients, first, False, True)
    return cast(Tensor, kernel(terms, coefficients, first, False, True))


@torch.library.register_fake("hwbp_compile::states")
def _fake(first: Tensor, terms: Tensor, a: Tensor | None) -> Tensor:
    return terms.new_empty((terms.shape[0] + 1, *terms.shape[1:]))
