"""What C++ kernels over time have in common: a few rows of the batch times a weight, in registers.

Rows of the batch are independent, so threads share them and never wait for one another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from .. import _compat

log = logging.getLogger(__name__)

Kernel = Callable[..., None]

_TYPES = {torch.float32: "float", torch.float64: "double"}

_PRELUDE = """
#include <torch/csrc/inductor/cpp_prefix.h>
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

using Real = REAL;
using Vec = at::vec::Vectorized<Real>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t WIDE = 2;      // vectors of columns in a tile
constexpr int64_t ROWS = 4;      // rows of the batch in a tile

// out[r, c] = start[r * start_step + c] + sum_j h[r, j] * weight[j, c] for N rows and C vectors of columns.
template <int64_t N, int64_t C>
static inline void tile(const Real* h, const Real* weight, const Real* start, int64_t start_step, Real* out,
                        int64_t inner, int64_t width) {
    Vec sum[N][C];
    #pragma GCC unroll 8
    for (int64_t r = 0; r < N; r++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) sum[r][c] = Vec::loadu(start + r * start_step + c * LANES);
    }
    for (int64_t j = 0; j < inner; j++) {
        Vec w[C];
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) w[c] = Vec::loadu(weight + j * width + c * LANES);
        #pragma GCC unroll 8
        for (int64_t r = 0; r < N; r++) {
            const Vec x(h[r * inner + j]);
            #pragma GCC unroll 8
            for (int64_t c = 0; c < C; c++) sum[r][c] = at::vec::fmadd(x, w[c], sum[r][c]);
        }
    }
    #pragma GCC unroll 8
    for (int64_t r = 0; r < N; r++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) sum[r][c].store(out + r * width + c * LANES);
    }
}

// The same for all columns.
template <int64_t N>
static void product(const Real* h, const Real* weight, const Real* start, int64_t start_step, Real* out,
                    int64_t inner, int64_t width) {
    int64_t c = 0;
    for (; c + WIDE * LANES <= width; c += WIDE * LANES)
        tile<N, WIDE>(h, weight + c, start + c, start_step, out + c, inner, width);
    for (; c + LANES <= width; c += LANES)
        tile<N, 1>(h, weight + c, start + c, start_step, out + c, inner, width);
    for (; c < width; c++) {
        for (int64_t r = 0; r < N; r++) {
            Real sum = start[r * start_step + c];
            for (int64_t j = 0; j < inner; j++) sum += h[r * inner + j] * weight[j * width + c];
            out[r * width + c] = sum;
        }
    }
}

// Calls f(number of rows as a constant, first row, scratch) for ROWS rows at a time.
template <typename F>
static void for_rows(int64_t batch, int64_t threads, int64_t scratch_size, F f) {
    const int64_t groups = (batch + ROWS - 1) / ROWS;
    #pragma omp parallel for num_threads(std::min(threads, groups)) if (groups > 1 && threads > 1)
    for (int64_t g = 0; g < groups; g++) {
        const int64_t row = g * ROWS, count = std::min(ROWS, batch - row);
        std::vector<Real> scratch(scratch_size);
        if (count == 4) f(std::integral_constant<int64_t, 4>(), row, scratch.data());
        else if (count == 3) f(std::integral_constant<int64_t, 3>(), row, scratch.data());
        else if (count == 2) f(std::integral_constant<int64_t, 2>(), row, scratch.data());
        else f(std::integral_constant<int64_t, 1>(), row, scratch.data());
    }
}
"""


def compile_kernel(source: str, dtype: torch.dtype, *, inputs: int, numbers: int) -> Kernel | None:
    """Compile ``kernel(inputs..., output, numbers...)``; None where it is not for this dtype or cannot be."""
    if dtype not in _TYPES:
        return None
    real = _TYPES[dtype]
    arguments = [*[f"const {real}*"] * inputs, f"{real}*", *["int64_t"] * numbers]
    try:
        return _compat.load_cpp_kernel(arguments, (_PRELUDE + source).replace("REAL", real))
    except Exception as error:  # a missing compiler shows itself in many ways
        log.info("A C++ kernel for recurrent layers cannot be compiled, so slower ways are taken: %r", error)
        return None
