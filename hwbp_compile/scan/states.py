"""``hwbp_compile::states``: all states along a residual path in one call, from the first on.

It is what a schedule calls, once an iteration. So it does not do what :func:`.op.linear_scan` does for
everybody, and takes half as long to call: the operator has no gradient, and does not ask whether its operands
fit, which is done when a graph is traced.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from . import cpp, loop, triton
from .op import check
from .rows import same_for_all

# Without coefficients all are one: the path is the identity. (Elsewhere None is zero.)
torch.library.define(
    "hwbp_compile::states",
    "(Tensor first, Tensor terms, Tensor? a) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def states(first: Tensor, terms: Tensor, a: Tensor | float) -> Tensor:
    """Return ``u[0] = first``, ``u[p + 1] = terms[p] + a[p] u[p]``, stacked: ``[T + 1, ...]``.

    Half precision is accumulated in float32 and rounded once per element. Not differentiable.

    Args:
        first: one state.
        terms: ``[T, ...]``, of its dtype.
        a: coefficients ``[T, ...]`` of the same dtype; one number for all rows, if it is a float.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    coefficients = a if isinstance(a, Tensor) else None if a == 1.0 else same_for_all(terms, a)
    check(terms, terms if coefficients is None else coefficients, first)
    result: Tensor = torch.ops.hwbp_compile.states.default(first, terms, coefficients)
    return result


@torch.library.impl("hwbp_compile::states", "default")
def _anywhere(first: Tensor, terms: Tensor, a: Tensor | None) -> Tensor:
    return loop.linear_scan(terms, a, first, False, True)


@torch.library.impl("hwbp_compile::states", "cpu")
def _cpu(first: Tensor, terms: Tensor, a: Tensor | None) -> Tensor:
    kernel = cpp.kernel(terms.dtype) if terms.numel() else None
    if kernel is None:
        return loop.linear_scan(terms, a, first, False, True)
    return cpp.linear_scan(kernel, terms, a, first, False, True)


@torch.library.impl("hwbp_compile::states", "cuda")
def _cuda(first: Tensor, terms: Tensor, a: Tensor | None) -> Tensor:
    kernel = triton.kernel() if terms.numel() else None
    if kernel is None:
        return loop.linear_scan(terms, a, first, False, True)
    return cast(Tensor, kernel(terms, a, first, False, True))


@torch.library.register_fake("hwbp_compile::states")
def _fake(first: Tensor, terms: Tensor, a: Tensor | None) -> Tensor:
    return terms.new_empty((terms.shape[0] + 1, *terms.shape[1:]))
