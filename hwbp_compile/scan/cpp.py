"""The recurrence on CPUs: one C++ kernel, compiled when it is first needed and cached as Inductor's are.

Columns are independent. Each thread takes a stretch of them and walks down the rows, with the previous row of
its stretch in cache, so that every element is read and written once.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from ..cpp_kernel import Kernel, compiled_or_none
from .rows import coefficients_of, rows_like, rows_of

log = logging.getLogger(__name__)

_TYPES = {
    torch.float32: ("float", "float"),
    torch.float64: ("double", "double"),
    torch.bfloat16: ("c10::BFloat16", "float"),
    torch.float16: ("c10::Half", "float"),
}
"""The C++ types of the elements and of the accumulator."""

_ONES, _OF_ROWS, _FULL = range(3)
"""What a coefficient is: one, a number for each row, or for each of its columns."""

_SOURCE = """
#include <algorithm>
#include <cstdint>
#include <vector>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

using Element = ELEMENT;
using Wide = ACCUMULATOR;

constexpr int64_t STRETCH = 2048;
// Elements per thread: to wake another one takes as long as some tens of thousands.
constexpr int64_t LEAST = 1 << 16;

// What a coefficient is: one, a number for each row, or for each of its columns.
enum Coefficients : int64_t { ONES = 0, OF_ROWS = 1, FULL = 2 };

// One stretch of columns. Where there is an `edge`, it gets the initial row.
static void walk(const Element* v, const Element* a, const Element* initial, Element* u, Element* edge,
                 int64_t rows, int64_t columns, int64_t v_step, int64_t a_step, int64_t u_step,
                 int64_t kind, bool reverse) {
    Wide carry[STRETCH];
    for (int64_t i = 0; i < columns; i++) carry[i] = initial ? static_cast<Wide>(initial[i]) : Wide(0);
    if (edge) for (int64_t i = 0; i < columns; i++) edge[i] = static_cast<Element>(carry[i]);
    for (int64_t s = 0; s < rows; s++) {
        const int64_t t = reverse ? rows - 1 - s : s;
        const Element* __restrict vt = v + t * v_step;
        Element* __restrict ut = u + t * u_step;
        if (kind == FULL) {
            const Element* __restrict at = a + t * a_step;
            #pragma GCC ivdep
            for (int64_t i = 0; i < columns; i++) {
                carry[i] = static_cast<Wide>(at[i]) * carry[i] + static_cast<Wide>(vt[i]);
                ut[i] = static_cast<Element>(carry[i]);
            }
        } else {
            const Wide factor = kind == ONES ? Wide(1) : static_cast<Wide>(a[t * a_step]);
            #pragma GCC ivdep
            for (int64_t i = 0; i < columns; i++) {
                carry[i] = factor * carry[i] + static_cast<Wide>(vt[i]);
                ut[i] = static_cast<Element>(carry[i]);
            }
        }
    }
}

extern "C" void kernel(const ELEMENT* v, const ELEMENT* a, const ELEMENT* initial, ELEMENT* u,
                       int64_t kind, int64_t has_initial, int64_t rows, int64_t columns, int64_t v_step,
                       int64_t a_step, int64_t reverse, int64_t whole, int64_t threads) {
    Element* edge = whole ? u : nullptr;
    if (whole) u += columns;
    threads = std::max(int64_t(1), std::min(threads, rows * columns / LEAST));
    // Whole cache lines per thread: 64 columns are at least two of them.
    const int64_t share = std::min(STRETCH, ((columns + threads - 1) / threads + 63) / 64 * 64);
    const int64_t shares = (columns + share - 1) / share;
    threads = std::min(threads, shares);
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < shares; i++) {
        const int64_t first = i * share;
        walk(v + first, kind == FULL ? a + first : a, has_initial ? initial + first : nullptr, u + first,
             edge ? edge + first : nullptr, rows, std::min(share, columns - first), v_step, a_step, columns,
             kind, reverse);
    }
}
"""


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel | None:
    """The compiled kernel for a dtype; None, with a warning, where it cannot be compiled."""
    if dtype not in _TYPES:
        return None
    element, accumulator = _TYPES[dtype]
    source = _SOURCE.replace("ELEMENT", element).replace("ACCUMULATOR", accumulator)
    pointers = [f"const {element}*"] * 3 + [f"{element}*"]
    arguments = [*pointers, *["int64_t"] * 9]
    return compiled_or_none(
        arguments, source, log=log, purpose="the linear scan", instead="a slow loop takes its place"
    )


def linear_scan(
    kernel: Kernel, v: Tensor, a: Tensor | None, initial: Tensor | None, reverse: bool, whole: bool
) -> Tensor:
    """See :func:`.op.linear_scan`; ``v`` is not empty; without ``a`` all coefficients are one.

    With ``whole`` (and not in reverse) the result begins with the initial row.
    """
    out = rows_like(v, whole)
    rows = v.shape[0]
    columns = v.numel() // rows
    terms, term_step = rows_of(v, columns)
    start: Any = out if initial is None else initial.contiguous()
    coefficients, step, kind = out, 0, _ONES
    if a is not None:
        coefficients, step, uniform = coefficients_of(a, v, columns)
        kind = _OF_ROWS if uniform else _FULL
    kernel(
        terms, coefficients, start, out, kind, int(initial is not None), rows, columns, term_step,
        step, int(reverse), int(whole), torch.get_num_threads(),
    )  # fmt: skip
    return out
