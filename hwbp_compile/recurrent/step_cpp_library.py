"""The C++ that all kernels of recurrences have in common: products of a few rows, and the loop over time."""

from __future__ import annotations

PADDING = 16
"""Elements that may be read, not used, past the end of a weight."""
LEAST = 2
"""Rows that are worth a thread."""

LIBRARY = """
#include <torch/csrc/inductor/cpp_prefix.h>
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

using Real = REAL;
using Vec = at::vec::Vectorized<Real>;
constexpr int64_t LANES = Vec::size();
constexpr bool MANY = sizeof(Vec) > 32;   // registers: 32 instead of 16
constexpr int64_t TILE = MANY ? 8 : 4;    // rows of the batch in a tile
constexpr int64_t LEAST = FEWEST_ROWS;    // rows that are worth a thread
// Vectors of columns in a tile of N rows, as many as fit.
template <int64_t N> constexpr int64_t WIDE = MANY ? (N > 4 ? 2 : 4) : 2;

// Weights are packed: PANEL columns after PANEL columns, the last ones filled up with zeros, so that a tile
// reads them without a gap.
constexpr int64_t PANEL = WIDE<1> * LANES;
template <int64_t K, int64_t W> constexpr int64_t PACKED = (W + PANEL - 1) / PANEL * PANEL * K;

template <int64_t K, int64_t W>
static void pack(const Real* weight, int64_t row_step, int64_t column_step, Real* packed) {
    for (int64_t c = 0; c < W; c += PANEL)
        for (int64_t j = 0; j < K; j++)
            for (int64_t i = 0; i < PANEL; i++)
                *packed++ = c + i < W ? weight[j * row_step + (c + i) * column_step] : Real(0);
}

// out[r, c] = start[r, c] + sum_j x[r, j] * weight[j, c] for N rows and C vectors of columns, the last of
// which has `count` columns. Rows are *_step elements apart; those of a packed weight are a panel's, a
// constant, and have all columns.
template <int64_t N, int64_t C, int64_t K, bool START, int64_t count, bool IS_PACKED>
static inline void tile(const Real* x, int64_t x_step, const Real* weight, int64_t weight_step,
                        const Real* start, int64_t start_step, Real* out, int64_t out_step) {
    const int64_t step = IS_PACKED ? PANEL : weight_step;
    Vec sum[N][C];
    #pragma GCC unroll 8
    for (int64_t r = 0; r < N; r++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) {
            const int64_t n = c + 1 < C ? LANES : count;
            sum[r][c] = START ? Vec::loadu(start + r * start_step + c * LANES, n) : Vec(0);
        }
    }
    for (int64_t j = 0; j < K; j++) {
        Vec w[C];
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++)
            w[c] = Vec::loadu(weight + j * step + c * LANES, IS_PACKED || c + 1 < C ? LANES : count);
        #pragma GCC unroll 8
        for (int64_t r = 0; r < N; r++) {
            const Vec h(x[r * x_step + j]);
            #pragma GCC unroll 8
            for (int64_t c = 0; c < C; c++) sum[r][c] = at::vec::fmadd(h, w[c], sum[r][c]);
        }
    }
    #pragma GCC unroll 8
    for (int64_t r = 0; r < N; r++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) {
            const int64_t n = c + 1 < C ? LANES : count;
            sum[r][c].store(out + r * out_step + c * LANES, n);
        }
    }
}

// The same for N rows and all columns of a panel.
template <int64_t N, int64_t K, bool START, int64_t COLUMNS>
static void panel_product(const Real* x, int64_t x_step, const Real* weight, const Real* start,
                          int64_t start_step, Real* out, int64_t out_step) {
    constexpr int64_t C = WIDE<N>, whole = COLUMNS / (C * LANES) * C * LANES, rest = COLUMNS - whole;
    #define COLUMNS_OF(VECTORS, COUNT, AT) \\
        tile<N, VECTORS, K, START, COUNT, true>(x, x_step, weight + AT, PANEL, START ? start + AT : start, \\
                                                start_step, out + AT, out_step)
    for (int64_t c = 0; c < whole; c += C * LANES) COLUMNS_OF(C, LANES, c);
    if constexpr (rest > 0) {
        constexpr int64_t VECTORS = (rest + LANES - 1) / LANES;
        COLUMNS_OF(VECTORS, rest - (VECTORS - 1) * LANES, whole);
    }
    #undef COLUMNS_OF
}

// The same for any number of rows.
template <int64_t K, bool START, int64_t COLUMNS>
static void rows_product(int64_t rows, const Real* x, int64_t x_step, const Real* weight, const Real* start,
                         int64_t start_step, Real* out, int64_t out_step) {
    for (int64_t r = 0; r < rows;) {
        const int64_t left = rows - r;
        #define ROWS_OF(N) \\
            panel_product<N, K, START, COLUMNS>(x + r * x_step, x_step, weight, \\
                                                START ? start + r * start_step : start, start_step, \\
                                                out + r * out_step, out_step); \\
            r += N
        if (left >= TILE) { ROWS_OF(TILE); }
        else if (left >= 4) { ROWS_OF(4); }
        else if (left >= 2) { ROWS_OF(2); }
        else { ROWS_OF(1); }
        #undef ROWS_OF
    }
}

// The same for all W columns: all rows use a panel before the next one is read.
template <int64_t K, int64_t W, bool START>
static void product(int64_t rows, const Real* x, int64_t x_step, const Real* weight, const Real* start,
                    int64_t start_step, Real* out, int64_t out_step) {
    constexpr int64_t whole = W / PANEL * PANEL;
    for (int64_t c = 0; c < whole; c += PANEL)
        rows_product<K, START, PANEL>(rows, x, x_step, weight + c * K, START ? start + c : start, start_step,
                                      out + c, out_step);
    if constexpr (whole < W)
        rows_product<K, START, W - whole>(rows, x, x_step, weight + whole * K, START ? start + whole : start,
                                          start_step, out + whole, out_step);
}

// Rows of several steps: those of one step are `step` elements apart, the steps `jump`.
struct Rows {
    const Real* first;
    int64_t step, jump;
    const Real* at(int64_t time, int64_t row) const { return first + time * jump + row * step; }
    Rows column(int64_t c) const { return {first + c, step, jump}; }
};

// sums[m, k] += sum_r a[r, m] * b[r, k] over `rows` rows of each of `times` steps, for M rows and C vectors
// of columns of the sums, see tile().
template <int64_t M, int64_t C, int64_t K, int64_t count>
static inline void add_tile(const Rows& a, const Rows& b, int64_t times, int64_t rows, Real* sums) {
    Vec sum[M][C];
    #pragma GCC unroll 8
    for (int64_t m = 0; m < M; m++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++)
            sum[m][c] = Vec::loadu(sums + m * K + c * LANES, c + 1 < C ? LANES : count);
    }
    for (int64_t t = 0; t < times; t++) {
        for (int64_t r = 0; r < rows; r++) {
            Vec w[C];
            #pragma GCC unroll 8
            for (int64_t c = 0; c < C; c++)
                w[c] = Vec::loadu(b.at(t, r) + c * LANES, c + 1 < C ? LANES : count);
            #pragma GCC unroll 8
            for (int64_t m = 0; m < M; m++) {
                const Vec x(a.at(t, r)[m]);
                #pragma GCC unroll 8
                for (int64_t c = 0; c < C; c++) sum[m][c] = at::vec::fmadd(x, w[c], sum[m][c]);
            }
        }
    }
    #pragma GCC unroll 8
    for (int64_t m = 0; m < M; m++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++)
            sum[m][c].store(sums + m * K + c * LANES, c + 1 < C ? LANES : count);
    }
}

// The same for M rows and all K columns.
template <int64_t M, int64_t K>
static void add_columns(const Rows& a, const Rows& b, int64_t times, int64_t rows, Real* sums) {
    constexpr int64_t C = WIDE<4>, wide = K / (C * LANES) * C * LANES, whole = K / LANES * LANES;
    for (int64_t c = 0; c < wide; c += C * LANES)
        add_tile<M, C, K, LANES>(a, b.column(c), times, rows, sums + c);
    for (int64_t c = wide; c < whole; c += LANES)
        add_tile<M, 1, K, LANES>(a, b.column(c), times, rows, sums + c);
    if constexpr (whole < K) add_tile<M, 1, K, K - whole>(a, b.column(whole), times, rows, sums + whole);
}

// The same for all.
template <int64_t M, int64_t K>
static void add_product(const Rows& a, const Rows& b, int64_t times, int64_t rows, Real* sums) {
    constexpr int64_t whole = M / 4 * 4;
    for (int64_t m = 0; m < whole; m += 4)
        add_columns<4, K>(a.column(m), b, times, rows, sums + m * K);
    for (int64_t m = whole; m < M; m++) add_columns<1, K>(a.column(m), b, times, rows, sums + m * K);
}

// sums[k] += sum_r x[r, k]
template <int64_t K>
static void add_rows(const Rows& x, int64_t times, int64_t rows, Real* sums) {
    constexpr int64_t whole = K / LANES * LANES;
    for (int64_t t = 0; t < times; t++) {
        for (int64_t r = 0; r < rows; r++) {
            const Real* from = x.at(t, r);
            for (int64_t c = 0; c < whole; c += LANES)
                (Vec::loadu(sums + c) + Vec::loadu(from + c)).store(sums + c);
            for (int64_t c = whole; c < K; c++) sums[c] += from[c];
        }
    }
}

// Rows are independent: each thread takes some of them, LEAST or more, through all steps, CHUNK at a time.
// Calls f(number of rows, step, first row, scratch), and after every `group` steps, or fewer at the end,
// g(part, first of the steps, number of steps, first row, number of rows).
template <int64_t CHUNK, typename F, typename G>
static void for_steps(int64_t steps, int64_t batch, int64_t threads, int64_t group, int64_t scratch_size, F f,
                      G g) {
    const int64_t groups = (batch + LEAST - 1) / LEAST;
    const int64_t parts = std::max<int64_t>(std::min(threads, groups), 1);
    #pragma omp parallel for num_threads(parts) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = groups * part / parts * LEAST;
        const int64_t end = std::min(groups * (part + 1) / parts * LEAST, batch);
        std::vector<Real> scratch(std::min(CHUNK, end - first) * scratch_size + PADDING);
        for (int64_t s = 0; s < steps; s++) {
            for (int64_t row = first; row < end; row += CHUNK)
                f(std::min(CHUNK, end - row), s, row, scratch.data());
            if ((s + 1) % group == 0 || s + 1 == steps)
                g(part, s - s % group, s % group + 1, first, end - first);
        }
    }
}
"""
