"""Products of a few rows with many matrices on CPUs, each read where it lies: one C++ kernel.

A thread takes some columns of some matrices. All rows use these columns before the next ones are read.
"""

from __future__ import annotations

import functools
import logging

import torch

from .cpp_kernel import Kernel, compiled_or_none

log = logging.getLogger(__name__)

TYPES = {torch.float32: "float", torch.float64: "double"}
"""The dtypes that there is a kernel for, as C++ types."""

_SOURCE = """
#include <algorithm>
#include <cstdint>
#include <cstring>

// A product and a sum, rounded once. (Headers with vectors take ten times as long to compile as this.)
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t BYTES = 32;
#else
constexpr int64_t BYTES = 16;
#endif

using Real = REAL;
typedef Real Vec __attribute__((vector_size(BYTES)));
constexpr int64_t LANES = BYTES / sizeof(Real);
constexpr bool MANY = sizeof(Vec) > 32;  // registers: 32 instead of 16
constexpr int64_t TILE = MANY ? 8 : 4;   // rows in a tile
// Vectors of columns in a tile of N rows: sums enough to hide how long an addition takes, in registers.
template <int64_t N> constexpr int64_t WIDE = MANY ? (N > 4 ? 2 : N > 2 ? 4 : 8) : (N > 2 ? 2 : 4);
constexpr int64_t PANEL = WIDE<1> * LANES;
constexpr int64_t LEAST = 1 << 16;       // products of two numbers that are worth a thread
constexpr int64_t TERMS = 512;           // that are summed up one after the other, so that errors stay small

static inline Vec load(const Real* from, int64_t count) {
    Vec value = {};
    if (count == LANES) std::memcpy(&value, from, sizeof(Vec));
    else std::memcpy(&value, from, count * sizeof(Real));
    return value;
}

static inline void store(const Vec& value, Real* to, int64_t count) {
    if (count == LANES) std::memcpy(to, &value, sizeof(Vec));
    else std::memcpy(to, &value, count * sizeof(Real));
}

// sum[r][c] += sum_j x[r, j] * weight[j, c] for N rows and C vectors of columns, the last of `count` columns.
template <int64_t N, int64_t C>
static inline void add_terms(Vec (&sum)[N][C], const Real* x, int64_t x_step, const Real* weight,
                             int64_t terms, int64_t columns, int64_t count) {
    for (int64_t j = 0; j < terms; j++) {
        Vec w[C];
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++)
            w[c] = load(weight + j * columns + c * LANES, c + 1 < C ? LANES : count);
        #pragma GCC unroll 8
        for (int64_t r = 0; r < N; r++) {
            const Real h = x[r * x_step + j];
            #pragma GCC unroll 8
            for (int64_t c = 0; c < C; c++) sum[r][c] += h * w[c];
        }
    }
}

// out[r, c] = sum_j x[r, j] * weight[j, c], for as many.
template <int64_t N, int64_t C>
static inline void tile(const Real* x, int64_t x_step, const Real* weight, int64_t inner, int64_t columns,
                        Real* out, int64_t count) {
    Vec sum[N][C];
    #pragma GCC unroll 8
    for (int64_t r = 0; r < N; r++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) sum[r][c] = Vec{};
    }
    add_terms<N, C>(sum, x, x_step, weight, std::min(inner, TERMS), columns, count);
    for (int64_t j = TERMS; j < inner; j += TERMS) {
        Vec more[N][C];
        #pragma GCC unroll 8
        for (int64_t r = 0; r < N; r++) {
            #pragma GCC unroll 8
            for (int64_t c = 0; c < C; c++) more[r][c] = Vec{};
        }
        const Real* from = weight + j * columns;
        add_terms<N, C>(more, x + j, x_step, from, std::min(inner - j, TERMS), columns, count);
        #pragma GCC unroll 8
        for (int64_t r = 0; r < N; r++) {
            #pragma GCC unroll 8
            for (int64_t c = 0; c < C; c++) sum[r][c] += more[r][c];
        }
    }
    #pragma GCC unroll 8
    for (int64_t r = 0; r < N; r++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++)
            store(sum[r][c], out + r * columns + c * LANES, c + 1 < C ? LANES : count);
    }
}

// The same for N rows and some columns of a panel.
template <int64_t N>
static void panel(const Real* x, int64_t x_step, const Real* weight, int64_t inner, int64_t columns,
                  Real* out, int64_t width) {
    int64_t c = 0;
    for (; c + WIDE<N> * LANES <= width; c += WIDE<N> * LANES)
        tile<N, WIDE<N>>(x, x_step, weight + c, inner, columns, out + c, LANES);
    for (; c + LANES <= width; c += LANES) tile<N, 1>(x, x_step, weight + c, inner, columns, out + c, LANES);
    if (c == width) return;
    // What is left, as a whole vector if there is one: some of its columns are computed once more.
    const int64_t from = std::max<int64_t>(width - LANES, 0);
    tile<N, 1>(x, x_step, weight + from, inner, columns, out + from, width - from);
}

extern "C" void kernel(const REAL* x, int64_t addresses, REAL* out, int64_t blocks, int64_t rows,
                       int64_t inner, int64_t columns, int64_t x_jump, int64_t x_step, int64_t threads) {
    const int64_t* matrices = reinterpret_cast<const int64_t*>(addresses);
    const int64_t panels = (columns + PANEL - 1) / PANEL, units = blocks * panels;
    const int64_t work = blocks * inner * columns * (rows + 3);  // to read a matrix takes some rows' time
    threads = std::max(int64_t(1), std::min({threads, units, work / LEAST}));
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t block = unit / panels, first = unit % panels * PANEL;
        const int64_t width = std::min(PANEL, columns - first);
        const Real* weight = reinterpret_cast<const Real*>(matrices[block]) + first;
        const Real* from = x + block * x_jump;
        Real* to = out + block * rows * columns + first;
        for (int64_t r = 0; r < rows;) {
            const int64_t left = rows - r;
            #define ROWS_OF(N) \\
                panel<N>(from + r * x_step, x_step, weight, inner, columns, to + r * columns, width); \\
                r += N
            if (left >= TILE) { ROWS_OF(TILE); }
            else if (left >= 4) { ROWS_OF(4); }
            else if (left >= 2) { ROWS_OF(2); }
            else { ROWS_OF(1); }
            #undef ROWS_OF
        }
    }
}
"""


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a dtype, if it can be compiled.

    There is none for processors without wide vectors, on which it has not been compared with a library.
    """
    return dtype in TYPES and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel | None:
    """The compiled kernel for a dtype; None where there is none, with a warning if it cannot be compiled."""
    if not has_kernel(dtype):
        return None
    element = TYPES[dtype]
    arguments = [f"const {element}*", "int64_t", f"{element}*", *["int64_t"] * 7]
    source = _SOURCE.replace("REAL", element)
    return compiled_or_none(
        arguments, source, log=log, purpose="batched products", instead="weights are copied"
    )
