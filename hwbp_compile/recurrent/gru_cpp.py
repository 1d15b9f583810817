"""A GRU's forward pass on CPUs, for layers so small that the library's time goes into calling operators.

The products with the inputs are one large product outside. The kernel walks the steps: for a few rows of the
batch at a time it multiplies the state with the recurrent weights and applies the gates.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .cpp_rows import Kernel, compile_kernel

_SOURCE = """
static inline Vec sigmoid(Vec x) { return Vec(1) / (Vec(1) + x.neg().exp()); }

// h' = (1 - z) n + z h for one row; `x` and `s` are the input's and the state's part of the three gates.
static void gates(const Real* x, const Real* s, const Real* h, Real* next, int64_t hidden) {
    for (int64_t i = 0; i < hidden; i += LANES) {
        const int64_t n = std::min(LANES, hidden - i);
        const auto load = [n](const Real* from) { return Vec::loadu(from, n); };
        const Vec r = sigmoid(load(x + i) + load(s + i));
        const Vec z = sigmoid(load(x + hidden + i) + load(s + hidden + i));
        const Vec c = (load(x + 2 * hidden + i) + r * load(s + 2 * hidden + i)).tanh();
        const Vec old = load(h + i);
        (c + z * (old - c)).store(next + i, n);
    }
}

template <int64_t N>
static void walk(const Real* x, const Real* weight, const Real* bias, const Real* initial, Real* y,
                 int64_t steps, int64_t batch, int64_t hidden, Real* scratch) {
    const int64_t width = 3 * hidden;
    const Real* h = initial;
    for (int64_t t = 0; t < steps; t++) {
        product<N>(h, weight, bias, 0, scratch, hidden, width);
        Real* next = y + t * batch * hidden;
        const Real* inputs = x + t * batch * width;
        for (int64_t r = 0; r < N; r++)
            gates(inputs + r * width, scratch + r * width, h + r * hidden, next + r * hidden, hidden);
        h = next;
    }
}

extern "C" void kernel(const Real* x, const Real* weight, const Real* bias, const Real* initial, Real* y,
                       int64_t steps, int64_t batch, int64_t hidden, int64_t threads) {
    for_rows(batch, threads, ROWS * 3 * hidden, [&](auto rows, int64_t row, Real* scratch) {
        walk<decltype(rows)::value>(x + row * 3 * hidden, weight, bias, initial + row * hidden,
                                    y + row * hidden, steps, batch, hidden, scratch);
    });
}
"""


WIDEST = 256
"""Hidden units up to which the kernel is as fast as the library's operators or faster."""


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel | None:
    """The compiled kernel; None where there is none for the dtype or it cannot be compiled."""
    return compile_kernel(_SOURCE, dtype, inputs=4, numbers=4)


def forward(run: Kernel, x: Tensor, h: Tensor, weights: list[Tensor]) -> Tensor:
    """The outputs ``[T, B, H]`` of a GRU for ``x`` ``[T, B, I]`` from the initial state ``h`` ``[B, H]``."""
    steps, batch, _ = x.shape
    hidden = h.shape[1]
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases if biases else (None, x.new_zeros(3 * hidden))
    from_x = torch.nn.functional.linear(x, w_ih, b_ih).contiguous()
    y = x.new_empty(steps, batch, hidden)
    transposed = w_hh.t().contiguous()
    threads = torch.get_num_threads()
    run(from_x, transposed, b_hh.contiguous(), h.contiguous(), y, steps, batch, hidden, threads)
    return y
