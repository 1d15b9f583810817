"""Exact backpropagation through time on CPUs, for a state that passes a diagonal and one matrix.

    u[t] = b[t] + k[t] * u[t + 1] + (c[t] * [u[t + 1], u[t + 1], ...]) @ weight,        t = T - 1 .. 0

This is a GRU's backward pass once the coefficients of its gates are known, which are computed for all steps
at once. The sweep itself does nothing that could be done outside of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .cpp_rows import Kernel, compile_kernel

_SOURCE = """
template <int64_t N>
static void walk(const Real* k, const Real* c, const Real* weight, const Real* b, const Real* last, Real* u,
                 int64_t steps, int64_t batch, int64_t hidden, int64_t inner, Real* scratch) {
    Real* scaled = scratch;
    Real* start = scratch + N * inner;
    for (int64_t r = 0; r < N; r++)
        std::copy_n(last + r * hidden, hidden, u + (steps * batch + r) * hidden);
    for (int64_t t = steps - 1; t >= 0; t--) {
        const Real* after = u + (t + 1) * batch * hidden;
        for (int64_t r = 0; r < N; r++) {
            const Real* row = after + r * hidden;
            const Real* factors = c + (t * batch + r) * inner;
            for (int64_t g = 0; g < inner; g += hidden)
                for (int64_t i = 0; i < hidden; i++) scaled[r * inner + g + i] = factors[g + i] * row[i];
            const Real* here = k + (t * batch + r) * hidden;
            const Real* direct = b + (t * batch + r) * hidden;
            for (int64_t i = 0; i < hidden; i++) start[r * hidden + i] = direct[i] + here[i] * row[i];
        }
        product<N>(scaled, weight, start, hidden, u + t * batch * hidden, inner, hidden);
    }
}

extern "C" void kernel(const Real* k, const Real* c, const Real* weight, const Real* b, const Real* last,
                       Real* u, int64_t steps, int64_t batch, int64_t hidden, int64_t inner,
                       int64_t threads) {
    for_rows(batch, threads, ROWS * (inner + hidden), [&](auto rows, int64_t row, Real* scratch) {
        const int64_t at = row * hidden;
        walk<decltype(rows)::value>(k + at, c + row * inner, weight, b + at, last + at, u + at, steps, batch,
                                    hidden, inner, scratch);
    });
}
"""

torch.library.define(
    "hwbp_compile::recurrent_sweep",
    "(Tensor k, Tensor c, Tensor weight, Tensor b, Tensor last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel | None:
    """The compiled kernel; None where there is none for the dtype or it cannot be compiled."""
    return compile_kernel(_SOURCE, dtype, inputs=5, numbers=5)


def recurrent_sweep(k: Tensor, c: Tensor, weight: Tensor, b: Tensor, last: Tensor) -> Tensor:
    """Solve the recurrence above; on a CPU and where :func:`kernel` gives one.

    Args:
        k: the diagonal, ``[T, B, H]``.
        c: the coefficients in front of the matrix, ``[T, B, G * H]``.
        weight: ``[G * H, H]``.
        b: what joins each state, ``[T, B, H]``.
        last: ``u[T]``, ``[B, H]``.

    Returns:
        ``u``, ``[T + 1, B, H]``.
    """
    result: Tensor = torch.ops.hwbp_compile.recurrent_sweep.default(k, c, weight, b, last)
    return result


@torch.library.impl("hwbp_compile::recurrent_sweep", "cpu")
def _cpu(k: Tensor, c: Tensor, weight: Tensor, b: Tensor, last: Tensor) -> Tensor:
    run = kernel(k.dtype)
    assert run is not None, "the operator is used only where there is a kernel"
    steps, batch, hidden = k.shape
    u = k.new_empty(steps + 1, batch, hidden)
    inputs = [x.contiguous() for x in (k, c, weight, b, last)]
    run(*inputs, u, steps, batch, hidden, weight.shape[0], torch.get_num_threads())
    return u


@torch.library.register_fake("hwbp_compile::recurrent_sweep")
def _fake(k: Tensor, c: Tensor, weight: Tensor, b: Tensor, last: Tensor) -> Tensor:
    return k.new_empty((k.shape[0] + 1, *k.shape[1:]))
