"""The recurrence on GPUs: one Triton kernel.

Columns are independent. Each program takes a few of them and walks down the rows tile by tile; inside of a
tile the rows are combined as a tree, since maps ``u -> a u + v`` compose to such maps.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .rows import coefficients_of, rows_of

log = logging.getLogger(__name__)

_TILE = 64
"""Rows of a tile."""
_COLUMNS = 16
"""Columns of a program: 64 bytes of float32, and as many programs as there can be."""


@functools.cache
def kernel() -> Callable[..., Any] | None:
    """The kernel; None without Triton, with a warning if it is there and broken."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None
    except Exception as error:
        log.warning("A slow loop takes the place of the linear scan's kernel, as Triton fails: %r", error)
        return None

    @triton.jit
    def compose(a_1, v_1, a_2, v_2):  # type: ignore[no-untyped-def]
        # Nothing stays nothing, however large the coefficients' product has become.
        return a_1 * a_2, tl.where(v_1 == 0, v_2, a_2 * v_1 + v_2)

    @triton.jit
    def walk(  # type: ignore[no-untyped-def]
        v, a, initial, u, rows, columns, v_step, a_step,
        UNIFORM: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
        TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = c < columns
        carry = tl.zeros((COLUMNS,), WIDE)
        if HAS_INITIAL:
            carry = tl.load(initial + c, inside, 0).to(WIDE)
        for first in range(0, rows, TILE):
            s = first + tl.arange(0, TILE)
            t = s
            if REVERSE:
                t = rows - 1 - s
            t = t.to(tl.int64)
            here = (s < rows)[:, None] & inside[None, :]
            terms = tl.load(v + t[:, None] * v_step + c[None, :], here, 0).to(WIDE)
            # Past the end there is the identity, so that a tile's last row is its result.
            if UNIFORM:
                one = tl.load(a + t * a_step, s < rows, 1).to(WIDE)
                factors = tl.broadcast_to(one[:, None], (TILE, COLUMNS))
            else:
                factors = tl.load(a + t[:, None] * a_step + c[None, :], here, 1).to(WIDE)
            product, total = tl.associative_scan((factors, terms), 0, compose)
            found = tl.where(carry[None, :] == 0, total, product * carry[None, :] + total)
            tl.store(u + t[:, None] * columns + c[None, :], found.to(u.dtype.element_ty), here)
            last = (tl.arange(0, TILE) == TILE - 1)[:, None]
            carry = tl.sum(tl.where(last, found, tl.zeros_like(found)), 0)

    # Triton looks up names that a kernel uses among the globals of its module.
    globals().update(tl=tl, compose=compose)
    wide = {torch.float64: tl.float64}

    def run(v: Tensor, a: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        rows, columns = v.shape[0], v[0].numel()
        terms, step = rows_of(v, columns)
        factors, factor_step, uniform = coefficients_of(a, v, columns)
        start = out if initial is None else initial.contiguous()
        grid = (triton.cdiv(columns, _COLUMNS),)
        # Triton launches on the current device, whatever the tensors'.
        with torch.cuda.device(v.device) if v.is_cuda else nullcontext():
            walk[grid](
                terms, factors, start, out, rows, columns, step, factor_step,
                uniform, initial is not None, reverse, wide.get(v.dtype, tl.float32), _TILE, _COLUMNS,
            )  # fmt: skip
        return out

    return run
