"""The recurrence on GPUs: Triton kernels.

Columns are independent. A program takes a few of them and walks down the rows tile by tile; inside of a tile
the rows are combined as a tree, since maps ``u -> a u + v`` compose to such maps. Where there are too few
columns to fill a GPU, all tiles are worked on at once: first each is summed up as one such map, then a walk
over these maps tells what each tile begins with.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..launching import on_device_of
from .rows import coefficients_of, rows_like, rows_of, same_for_all

log = logging.getLogger(__name__)

_TILE = 64
"""Rows of a tile."""
_COLUMNS = 16
"""Columns of a program: 64 bytes of float32, and as many programs as there can be."""
_FEW = 1024
"""Programs that leave a part of a GPU idle."""
_MANY_TILES = 32
"""Tiles from which on it pays to work on all of them at once. That reads everything twice, and Python takes
some 100 us to launch each of its three kernels, where one kernel works on a tile in 2."""
_MOST_TILES = 65535
"""The second size that CUDA allows of a grid."""


@functools.cache
def kernel() -> Callable[..., Any] | None:
    """The kernel; None without Triton, with a warning if it is there and broken."""
    try:
        import triton
        import triton.language as tl
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return None
        log.warning("A slow loop takes the place of the linear scan's kernel, as Triton fails: %r", error)
        return None

    @triton.jit
    def compose(a_1, v_1, a_2, v_2):  # type: ignore[no-untyped-def]
        # Nothing stays nothing, however large the coefficients' product has become.
        return a_1 * a_2, tl.where(v_1 == 0, v_2, a_2 * v_1 + v_2)

    @triton.jit
    def tile_of(  # type: ignore[no-untyped-def]
        v, a, first, rows, columns, v_step, a_step, c,
        UNIFORM: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
        TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        # Up to each row of a tile: the product of the coefficients, and the result from zero.
        s = first + tl.arange(0, TILE)
        t = s
        if REVERSE:
            t = rows - 1 - s
        t = t.to(tl.int64)
        here = (s < rows)[:, None] & (c < columns)[None, :]
        terms = tl.load(v + t[:, None] * v_step + c[None, :], here, 0).to(WIDE)
        # Past the end there is the identity, so that a tile's last row is its result.
        if UNIFORM:
            one = tl.load(a + t * a_step, s < rows, 1).to(WIDE)
            factors = tl.broadcast_to(one[:, None], (TILE, COLUMNS))
        else:
            factors = tl.load(a + t[:, None] * a_step + c[None, :], here, 1).to(WIDE)
        product, total = tl.associative_scan((factors, terms), 0, compose)
        return product, total, t, here

    @triton.jit
    def last_of(x, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        last = (tl.arange(0, TILE) == TILE - 1)[:, None]
        return tl.sum(tl.where(last, x, tl.zeros_like(x)), 0)

    @triton.jit
    def sum_up(  # type: ignore[no-untyped-def]
        v, a, products, totals, rows, columns, v_step, a_step,
        UNIFORM: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
        TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        # Each program: one tile as one map.
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        number = tl.program_id(1)
        product, total, _, _ = tile_of(
            v, a, number * TILE, rows, columns, v_step, a_step, c, UNIFORM, REVERSE, WIDE, TILE, COLUMNS
        )
        at = number.to(tl.int64) * columns + c
        tl.store(products + at, last_of(product, TILE), c < columns)
        tl.store(totals + at, last_of(total, TILE), c < columns)

    @triton.jit
    def walk(  # type: ignore[no-untyped-def]
        v, a, initial, u, rows, columns, v_step, a_step, length,
        UNIFORM: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr,
        WIDE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        # Each program: so many rows (a length), each stretch from an initial row of its own.
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        carry = tl.zeros((COLUMNS,), WIDE)
        if HAS_INITIAL:
            at = tl.program_id(1).to(tl.int64) * columns + c
            carry = tl.load(initial + at, c < columns, 0).to(WIDE)
        if WHOLE:
            # The result begins with the first program's initial row.
            if tl.program_id(1) == 0:
                tl.store(u + c, carry.to(u.dtype.element_ty), c < columns)
            u += columns
        begin = tl.program_id(1) * length
        for first in range(begin, tl.minimum(begin + length, rows), TILE):
            product, total, t, here = tile_of(
                v, a, first, rows, columns, v_step, a_step, c, UNIFORM, REVERSE, WIDE, TILE, COLUMNS
            )
            found = tl.where(carry[None, :] == 0, total, product * carry[None, :] + total)
            tl.store(u + t[:, None] * columns + c[None, :], found.to(u.dtype.element_ty), here)
            carry = last_of(found, TILE)

    # Triton looks up names that a kernel uses among the globals of its module.
    globals().update(tl=tl, compose=compose, tile_of=tile_of, last_of=last_of)
    wide = {torch.float64: tl.float64}

    def run(v: Tensor, a: Tensor | None, initial: Tensor | None, reverse: bool, whole: bool) -> Tensor:
        out = rows_like(v, whole)
        rows = v.shape[0]
        columns = v.numel() // rows
        terms, step = rows_of(v, columns)
        factors, factor_step, uniform = coefficients_of(same_for_all(v, 1.0) if a is None else a, v, columns)
        programs, tiles = triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _TILE)
        kind = wide.get(v.dtype, tl.float32)
        given = (rows, columns, step, factor_step)
        start = out if initial is None else initial.contiguous()
        has_start = initial is not None
        with on_device_of(v):
            if programs >= _FEW or not _MANY_TILES <= tiles <= _MOST_TILES:
                walk[programs, 1](
                    terms, factors, start, out, *given, tiles * _TILE,
                    uniform, has_start, reverse, whole, kind, _TILE, _COLUMNS,
                )  # fmt: skip
                return out
            dtype = torch.promote_types(v.dtype, torch.float32)
            products, totals = v.new_empty((2, tiles, columns), dtype=dtype)
            sum_up[programs, tiles](
                terms, factors, products, totals, *given, uniform, reverse, kind, _TILE, _COLUMNS
            )
            # What each tile begins with, the first from the initial row.
            starts = v.new_empty((tiles + 1, columns), dtype=dtype)
            walk[programs, 1](
                totals, products, start, starts, tiles, columns, columns, columns,
                triton.cdiv(tiles, _TILE) * _TILE, False, has_start, False, True, kind, _TILE, _COLUMNS,
            )  # fmt: skip
            walk[programs, tiles](
                terms, factors, starts, out, *given, _TILE,
                uniform, True, reverse, whole, kind, _TILE, _COLUMNS,
            )  # fmt: skip
        return out

    return run
