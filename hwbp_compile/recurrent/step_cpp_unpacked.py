"""C++ of products with matrices that each step has of its own: read where they lie, as packing one takes as
long as a few rows' product with it."""

from __future__ import annotations

UNPACKED = """
// out[r, c] = start[r, c] + sum_j x[r, j] * weight[c, j] for N rows and C columns; what is summed lies side
// by side in both factors.
template <int64_t N, int64_t C, int64_t K, bool START>
static inline void dots_tile(const Real* x, int64_t x_step, const Real* weight, int64_t weight_step,
                             const Real* start, int64_t start_step, Real* out, int64_t out_step) {
    constexpr int64_t whole = K / LANES * LANES, rest = K - whole;
    Vec sum[N][C];
    #pragma GCC unroll 8
    for (int64_t r = 0; r < N; r++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) sum[r][c] = Vec(0);
    }
    #define TERMS_AT(J, COUNT) \\
        Vec w[C]; \\
        _Pragma("GCC unroll 8") \\
        for (int64_t c = 0; c < C; c++) w[c] = Vec::loadu(weight + c * weight_step + J, COUNT); \\
        _Pragma("GCC unroll 8") \\
        for (int64_t r = 0; r < N; r++) { \\
            const Vec h = Vec::loadu(x + r * x_step + J, COUNT); \\
            _Pragma("GCC unroll 8") \\
            for (int64_t c = 0; c < C; c++) sum[r][c] = at::vec::fmadd(h, w[c], sum[r][c]); \\
        }
    for (int64_t j = 0; j < whole; j += LANES) { TERMS_AT(j, LANES) }
    if constexpr (rest > 0) { TERMS_AT(whole, rest) }
    #undef TERMS_AT
    #pragma GCC unroll 8
    for (int64_t r = 0; r < N; r++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) {
            const Real total = at::vec::vec_reduce_all<Real>([](Vec& a, Vec& b) { return a + b; }, sum[r][c]);
            out[r * out_step + c] = START ? start[r * start_step + c] + total : total;
        }
    }
}

// The same for N rows and all W columns.
template <int64_t N, int64_t K, int64_t W, bool START>
static void dots_rows(const Real* x, int64_t x_step, const Real* weight, int64_t weight_step,
                      const Real* start, int64_t start_step, Real* out, int64_t out_step) {
    constexpr int64_t C = 4, whole = W / C * C;
    for (int64_t c = 0; c < whole; c += C)
        dots_tile<N, C, K, START>(x, x_step, weight + c * weight_step, weight_step, START ? start + c : start,
                                  start_step, out + c, out_step);
    for (int64_t c = whole; c < W; c++)
        dots_tile<N, 1, K, START>(x, x_step, weight + c * weight_step, weight_step, START ? start + c : start,
                                  start_step, out + c, out_step);
}

// out[r, c] = start[r, c] + sum_j x[r, j] * weight[j, c] for N rows and all W columns.
template <int64_t N, int64_t K, int64_t W, bool START>
static void plain_rows(const Real* x, int64_t x_step, const Real* weight, int64_t weight_step,
                       const Real* start, int64_t start_step, Real* out, int64_t out_step) {
    constexpr int64_t C = WIDE<N>, wide = W / (C * LANES) * C * LANES, whole = W / LANES * LANES;
    #define COLUMNS_AT(VECTORS, COUNT, AT) \\
        tile<N, VECTORS, K, START, COUNT, false>(x, x_step, weight + AT, weight_step, \\
                                                 START ? start + AT : start, start_step, out + AT, out_step)
    for (int64_t c = 0; c < wide; c += C * LANES) COLUMNS_AT(C, LANES, c);
    for (int64_t c = wide; c < whole; c += LANES) COLUMNS_AT(1, LANES, c);
    if constexpr (whole < W) COLUMNS_AT(1, W - whole, whole);
    #undef COLUMNS_AT
}

// Either of them for any number of rows. TRANSPOSED: weight[c, j] is at c * weight_step + j.
template <int64_t K, int64_t W, bool START, bool TRANSPOSED>
static void unpacked_product(int64_t rows, const Real* x, int64_t x_step, const Real* weight,
                             int64_t weight_step, const Real* start, int64_t start_step, Real* out,
                             int64_t out_step) {
    constexpr int64_t MOST = TRANSPOSED && !MANY ? 2 : 4;  // as many sums as there are registers for
    for (int64_t r = 0; r < rows;) {
        const int64_t left = rows - r;
        #define ROWS_OF(N) \\
            if constexpr (TRANSPOSED) \\
                dots_rows<N, K, W, START>(x + r * x_step, x_step, weight, weight_step, \\
                                          START ? start + r * start_step : start, start_step, \\
                                          out + r * out_step, out_step); \\
            else \\
                plain_rows<N, K, W, START>(x + r * x_step, x_step, weight, weight_step, \\
                                           START ? start + r * start_step : start, start_step, \\
                                           out + r * out_step, out_step); \\
            r += N
        if (left >= MOST) { ROWS_OF(MOST); }
        else if (left >= 2) { ROWS_OF(2); }
        else { ROWS_OF(1); }
        #undef ROWS_OF
    }
}
"""
