"""The recurrence on CPUs: one C++ kernel, compiled when it is first needed and cached as Inductor's are.

Columns are independent. Each thread takes a stretch of them and walks down the rows, with the previous row of
its stretch in cache, so that every element is read and written once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from .rows import coefficients_of, rows_of

log = logging.getLogger(__name__)

Kernel = Callable[..., None]

_TYPES = {
    torch.float32: ("float", "float"),
    torch.float64: ("double", "double"),
    torch.bfloat16: ("c10::BFloat16", "float"),
    torch.float16: ("c10::Half", "float"),
}
"""The C++ types of the elements and of the accumulator."""

_SOURCE = """
#include <algorithm>
#include <cstdint>
#include <vector>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

using Element = ELEMENT;
using Wide = ACCUMULATOR;

constexpr int64_t STRETCH = 2048;

// One stretch of columns. `a` has one number per row if it is `uniform`.
static void walk(const Element* v, const Element* a, const Element* initial, Element* u,
                 int64_t rows, int64_t columns, int64_t v_step, int64_t a_step, int64_t u_step,
                 bool uniform, bool reverse) {
    Wide carry[STRETCH];
    for (int64_t i = 0; i < columns; i++) carry[i] = initial ? static_cast<Wide>(initial[i]) : Wide(0);
    for (int64_t s = 0; s < rows; s++) {
        const int64_t t = reverse ? rows - 1 - s : s;
        const Element* __restrict vt = v + t * v_step;
        const Element* __restrict at = a + t * a_step;
        Element* __restrict ut = u + t * u_step;
        if (uniform) {
            const Wide factor = static_cast<Wide>(*at);
            #pragma GCC ivdep
            for (int64_t i = 0; i < columns; i++) {
                carry[i] = factor * carry[i] + static_cast<Wide>(vt[i]);
                ut[i] = static_cast<Element>(carry[i]);
            }
        } else {
            #pragma GCC ivdep
            for (int64_t i = 0; i < columns; i++) {
                carry[i] = static_cast<Wide>(at[i]) * carry[i] + static_cast<Wide>(vt[i]);
                ut[i] = static_cast<Element>(carry[i]);
            }
        }
    }
}

extern "C" void kernel(const ELEMENT* v, const ELEMENT* a, const ELEMENT* initial, ELEMENT* u,
                       int64_t has_initial, int64_t rows, int64_t columns, int64_t v_step, int64_t a_step,
                       int64_t uniform, int64_t reverse, int64_t threads) {
    // Whole cache lines per thread: 64 columns are at least two of them.
    const int64_t share = std::min(STRETCH, ((columns + threads - 1) / threads + 63) / 64 * 64);
    const int64_t shares = (columns + share - 1) / share;
    #pragma omp parallel for num_threads(threads) if (shares > 1)
    for (int64_t i = 0; i < shares; i++) {
        const int64_t first = i * share;
        walk(v + first, uniform ? a : a + first, has_initial ? initial + first : nullptr, u + first, rows,
             std::min(share, columns - first), v_step, a_step, columns, uniform, reverse);
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
    try:
        return _compat.load_cpp_kernel([*pointers, *["int64_t"] * 8], source)
    except Exception as error:  # a missing compiler shows itself in many ways
        log.warning(
            "The C++ kernel of the linear scan cannot be compiled, so a slow loop takes its place (%s: %s).",
            type(error).__name__,
            str(error).strip().splitlines()[0] if str(error).strip() else "no message",
        )
        return None


def linear_scan(kernel: Kernel, v: Tensor, a: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """See :func:`.op.linear_scan`; ``v`` is not empty."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    rows, columns = v.shape[0], v[0].numel()
    terms, term_step = rows_of(v, columns)
    coefficients, step, uniform = coefficients_of(a, v, columns)
    start: Any = out if initial is None else initial.contiguous()
    kernel(
        terms, coefficients, start, out, int(initial is not None), rows, columns, term_step, step,
        int(uniform), int(reverse), torch.get_num_threads(),
    )  # fmt: skip
    return out
