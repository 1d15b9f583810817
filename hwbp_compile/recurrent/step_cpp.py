"""A recurrence on a CPU as one C++ kernel: all steps, a few rows of the batch at a time.

Rows of the batch are independent, so threads share them and never wait for one another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _compat
from ..errors import CannotRewrite
from .step_layout import Value, placed_rows, row_size
from .step_program import ROWS, StepProgram
from .step_source import StepSource

log = logging.getLogger(__name__)

_TYPES = {torch.float32: "float", torch.float64: "double"}
_PADDING = 16
"""Elements that may be read, not used, past the end of a weight."""

_PRELUDE = """
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
constexpr int64_t ROWS = MANY ? 8 : 4;    // rows of the batch in a tile
constexpr int64_t LEAST = 2;              // rows that are worth a thread
// Vectors of columns in a tile of N rows, as many as fit.
template <int64_t N> constexpr int64_t WIDE = MANY ? (N > 4 ? 2 : 4) : 2;

// out[r, c] = start[r, c] + sum_j x[r, j] * weight[j, c] for N rows and C vectors of columns, the last of
// which has `count` columns. Rows are *_step elements apart.
template <int64_t N, int64_t C, int64_t K, bool START, int64_t count>
static inline void tile(const Real* x, int64_t x_step, const Real* weight, int64_t weight_step,
                        const Real* start, int64_t start_step, Real* out, int64_t out_step) {
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
        for (int64_t c = 0; c < C; c++) w[c] = Vec::loadu(weight + j * weight_step + c * LANES);
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

// The same for W columns.
template <int64_t N, int64_t K, int64_t W, bool START>
static void product(const Real* x, int64_t x_step, const Real* weight, int64_t weight_step, const Real* start,
                    int64_t start_step, Real* out, int64_t out_step) {
    constexpr int64_t C = WIDE<N>, wide = W / (C * LANES) * C * LANES, whole = W / LANES * LANES;
    #define TILE(COLUMNS, COUNT, AT) \\
        tile<N, COLUMNS, K, START, COUNT>(x, x_step, weight + AT, weight_step, START ? start + AT : start, \\
                                    start_step, out + AT, out_step)
    for (int64_t c = 0; c < wide; c += C * LANES) TILE(C, LANES, c);
    for (int64_t c = wide; c < whole; c += LANES) TILE(1, LANES, c);
    if constexpr (whole < W) TILE(1, W - whole, whole);
    #undef TILE
}

// sums[m, k] += sum_r a[r, m] * b[r, k] for M rows and C vectors of columns of the sums, see tile().
template <int64_t M, int64_t C, int64_t K, int64_t count>
static inline void add_tile(const Real* a, int64_t a_step, const Real* b, int64_t b_step, int64_t rows,
                            Real* sums) {
    Vec sum[M][C];
    #pragma GCC unroll 8
    for (int64_t m = 0; m < M; m++) {
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++)
            sum[m][c] = Vec::loadu(sums + m * K + c * LANES, c + 1 < C ? LANES : count);
    }
    for (int64_t r = 0; r < rows; r++) {
        Vec w[C];
        #pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++)
            w[c] = Vec::loadu(b + r * b_step + c * LANES, c + 1 < C ? LANES : count);
        #pragma GCC unroll 8
        for (int64_t m = 0; m < M; m++) {
            const Vec x(a[r * a_step + m]);
            #pragma GCC unroll 8
            for (int64_t c = 0; c < C; c++) sum[m][c] = at::vec::fmadd(x, w[c], sum[m][c]);
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
static void add_columns(const Real* a, int64_t a_step, const Real* b, int64_t b_step, int64_t rows,
                        Real* sums) {
    constexpr int64_t C = WIDE<4>, wide = K / (C * LANES) * C * LANES, whole = K / LANES * LANES;
    for (int64_t c = 0; c < wide; c += C * LANES)
        add_tile<M, C, K, LANES>(a, a_step, b + c, b_step, rows, sums + c);
    for (int64_t c = wide; c < whole; c += LANES)
        add_tile<M, 1, K, LANES>(a, a_step, b + c, b_step, rows, sums + c);
    if constexpr (whole < K) add_tile<M, 1, K, K - whole>(a, a_step, b + whole, b_step, rows, sums + whole);
}

// The same for all.
template <int64_t M, int64_t K>
static void add_product(const Real* a, int64_t a_step, const Real* b, int64_t b_step, int64_t rows,
                        Real* sums) {
    constexpr int64_t whole = M / 4 * 4;
    for (int64_t m = 0; m < whole; m += 4)
        add_columns<4, K>(a + m, a_step, b, b_step, rows, sums + m * K);
    for (int64_t m = whole; m < M; m++) add_columns<1, K>(a + m, a_step, b, b_step, rows, sums + m * K);
}

// sums[k] += sum_r x[r, k]
template <int64_t K>
static void add_rows(const Real* x, int64_t step, int64_t rows, Real* sums) {
    constexpr int64_t whole = K / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES) {
        Vec sum = Vec::loadu(sums + c);
        for (int64_t r = 0; r < rows; r++) sum = sum + Vec::loadu(x + r * step + c);
        sum.store(sums + c);
    }
    for (int64_t c = whole; c < K; c++)
        for (int64_t r = 0; r < rows; r++) sums[c] += x[r * step + c];
}

// Rows are independent: each thread takes some of them through all steps, ROWS at a time. Calls
// f(number of rows as a constant, step, first row, scratch), and g(part, step, first row, number of rows)
// after each step.
template <typename F, typename G>
static void for_steps(int64_t steps, int64_t batch, int64_t threads, int64_t scratch_size, F f, G g) {
    const int64_t groups = (batch + LEAST - 1) / LEAST;
    const int64_t parts = std::max<int64_t>(std::min(threads, groups), 1);
    #pragma omp parallel for num_threads(parts) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = groups * part / parts * LEAST;
        const int64_t end = std::min(groups * (part + 1) / parts * LEAST, batch);
        std::vector<Real> scratch(ROWS * scratch_size + PADDING);
        for (int64_t s = 0; s < steps; s++) {
            for (int64_t row = first; row < end;) {
                const int64_t left = end - row;
                const int64_t count = left >= ROWS ? ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                if (count == ROWS) f(std::integral_constant<int64_t, ROWS>(), s, row, scratch.data());
                else if (count == 4) f(std::integral_constant<int64_t, 4>(), s, row, scratch.data());
                else if (count == 2) f(std::integral_constant<int64_t, 2>(), s, row, scratch.data());
                else f(std::integral_constant<int64_t, 1>(), s, row, scratch.data());
                row += count;
            }
            g(part, s, first, end - first);
        }
    }
}
"""


@dataclass(frozen=True, slots=True)
class Argument:
    """How a kernel walks through one of its tensors."""

    name: str
    shape: tuple[int, ...]
    """Of one step."""
    steps: bool = False
    """Whether there is one for each step."""

    @property
    def batch_dim(self) -> int:
        """Which dimension the batch is; a kernel is given it as the first."""
        return self.shape.index(ROWS) if ROWS in self.shape else 0

    def value(self) -> Value:
        """Where a row's elements are, from the variable ``in_`` on."""
        moved = [d for d in self.shape if d != ROWS]
        rows = placed_rows(f"in_{self.name}", [ROWS, *moved] if ROWS in self.shape else moved)
        return Value(rows.base, rows.where.movedim(0, self.batch_dim)) if self.batch_dim else rows

    def here(self, step: str = "t") -> str:
        """The address of the first row's elements at a step."""
        size = row_size(self.shape)
        rows = ROWS in self.shape
        along = f" + {step} * {'batch * ' if rows else ''}{size}" if self.steps else ""
        return f"{self.name}{along}{f' + row * {size}' if rows else ''}"


class CppRecurrence:
    """The kernel of a program.

    Raises:
        CannotRewrite: there is no kernel for this step, or no compiler.
    """

    def __init__(self, program: StepProgram, dtype: torch.dtype, *, reverse: bool) -> None:
        if dtype not in _TYPES:
            raise CannotRewrite(f"there is no kernel for {dtype}")
        self.program = program
        self._reverse = reverse
        source, step = recurrence_source(program, dtype, reverse=reverse)
        self._workspace, self._sums = step.workspace, step.summed
        self._batch_dims = [
            [Argument("", program.shape(n)).batch_dim for n in nodes]
            for nodes in (program.inputs, program.shared)
        ]
        real = _TYPES[dtype]
        read = len(program.inputs) + len(program.shared)
        written = len(program.carry) + len(program.emitted) + len(self._workspace) + 1
        arguments = [*[f"const {real}*"] * read, *[f"{real}*"] * written, *["int64_t"] * 3]
        try:
            self._run: Callable[..., None] = _compat.load_cpp_kernel(arguments, source)
        except Exception as error:  # a missing compiler shows itself in many ways
            first = (str(error).strip().splitlines() or [""])[0]
            raise CannotRewrite(f"the kernel cannot be compiled: {type(error).__name__}: {first}") from error

    def results(self, initial: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Tensors for what is returned: states, ``[T + 1, B, ...]`` or the last ones, emitted, sums."""
        _, emitted, sums = self.program.results
        shapes = [(steps, initial[0].shape[0], *self.program.shape(n)[1:]) for n in emitted]
        shapes += [self.program.shape(n) for n in sums]
        states = [(steps + 1, *x.shape) if self.program.keep else tuple(x.shape) for x in initial]
        return [initial[0].new_empty(shape) for shape in (*states, *shapes)]

    def __call__(
        self, initial: Sequence[Tensor], inputs: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> list[Tensor]:
        """Run all steps; returns what :meth:`results` says."""
        steps, first = inputs[0].shape[0], initial[0]
        batch, threads = first.shape[0], torch.get_num_threads()
        results = self.results(initial, steps)
        n, keep = len(initial), self.program.keep
        states = results[:n] if keep else [x.new_empty((2, *x.shape)) for x in initial]
        for all_, x in zip(states, initial, strict=True):
            all_[steps if keep and self._reverse else 0] = x
        read = []
        for x, dim in zip(inputs, self._batch_dims[0], strict=True):
            moved = x.movedim(1 + dim, 1) if dim else x
            read.append(moved.to(first.dtype).contiguous())
        for x, dim in zip(shared, self._batch_dims[1], strict=True):
            moved = x.movedim(dim, 0) if dim else x
            padded = first.new_empty(x.numel() + _PADDING)
            padded[: x.numel()].view(moved.shape).copy_(moved)
            read.append(padded)
        emitted = results[n : n + len(self.program.emitted)]
        workspace = [first.new_empty(batch * size) for size in self._workspace]
        sums = first.new_zeros(threads, sum(map(math.prod, self._sums)))
        self._run(*read, *states, *emitted, *workspace, sums, steps, batch, threads)
        if not keep:
            results[:n] = [x[steps % 2].clone() for x in states]
        totals = sums.sum(0).split([math.prod(shape) for shape in self._sums])
        for total, shape, result in zip(totals, self._sums, results[n + len(emitted) :], strict=True):
            found = total.view(shape)
            result.copy_(found if tuple(result.shape) == shape else found.transpose(-1, -2))
        return results


def recurrence_source(program: StepProgram, dtype: torch.dtype, *, reverse: bool) -> tuple[str, StepSource]:
    """C++ of the whole recurrence, and of its step.

    Raises:
        CannotRewrite: a step does something that has no translation.
    """
    shape = program.shape
    inputs = [Argument(f"x{i}", shape(n), True) for i, n in enumerate(program.inputs)]
    shared = [Argument(f"s{i}", shape(n)) for i, n in enumerate(program.shared)]
    carry = [Argument(f"y{i}", shape(n), True) for i, n in enumerate(program.carry)]
    emitted = [Argument(f"e{i}", shape(n), True) for i, n in enumerate(program.results[1])]
    if any(each.shape[:1] != (ROWS,) for each in carry):
        raise CannotRewrite("the batch is not the first dimension of the state")
    nodes = (*program.carry, *program.inputs, *program.shared)
    given = (*carry, *inputs, *shared)
    placed = {n: a.value() for n, a in zip(nodes, given, strict=True)}
    step = StepSource(program, placed, dtype)
    workspace = [Argument(f"w{i}", (ROWS, size)) for i, size in enumerate(step.workspace)]
    before, after = ("(t + 1)", "t") if reverse else ("t", "(t + 1)")
    if not program.keep:
        before, after = "(s % 2)", "((s + 1) % 2)"
    lines = [f"const Real* in_{a.name} = {a.here(before)};" for a in carry]
    lines += [f"Real* out_{a.name} = {a.here(after)};" for a in carry]
    lines += [f"const Real* in_{a.name} = {a.here()};" for a in (*inputs, *shared)]
    lines += [f"Real* out_{a.name} = {a.here()};" for a in (*emitted, *workspace)]
    here = "\n".join([f"const int64_t t = {'steps - 1 - s' if reverse else 's'};", *lines])
    pointers = [f"const Real* {a.name}" for a in (*inputs, *shared)]
    pointers += [f"Real* {a.name}" for a in (*carry, *emitted, *workspace)]
    names = ", ".join(a.name for a in (*inputs, *shared, *carry, *emitted, *workspace))
    parameters = ", ".join(pointers)
    size = sum(map(math.prod, step.summed))
    text = f"""
template <int64_t N>
static void step({parameters}, int64_t steps, int64_t s, int64_t batch, int64_t row, Real* scratch) {{
{here}
{step.text}
}}

static void add({parameters}, int64_t steps, int64_t s, int64_t batch, int64_t row, int64_t count,
                Real* sums) {{
{here}
{step.sums}
}}

extern "C" void kernel({parameters}, Real* sums, int64_t steps, int64_t batch, int64_t threads) {{
for_steps(steps, batch, threads, {step.scratch},
[&](auto rows, int64_t s, int64_t row, Real* scratch) {{
step<decltype(rows)::value>({names}, steps, s, batch, row, scratch);
}},
[&](int64_t part, int64_t s, int64_t row, int64_t count) {{
add({names}, steps, s, batch, row, count, sums + part * {size});
}});
}}
"""
    return (_PRELUDE + text).replace("REAL", _TYPES[dtype]).replace("PADDING", str(_PADDING)), step
