"""A recurrence on a CPU as one C++ kernel: all steps, a few rows of the batch at a time.

Rows of the batch are independent, so threads share them and never wait for one another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _compat
from ..errors import CannotRewrite
from .step_layout import Value, compact, row_size
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
constexpr int64_t WIDE = sizeof(Vec) > 32 ? 4 : 2;  // vectors of columns in a tile, as many as fit
constexpr int64_t ROWS = 4;      // rows of the batch in a tile

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
    constexpr int64_t wide = W / (WIDE * LANES) * WIDE * LANES, whole = W / LANES * LANES;
    #define TILE(C, COUNT, AT) \\
        tile<N, C, K, START, COUNT>(x, x_step, weight + AT, weight_step, START ? start + AT : start, \\
                                    start_step, out + AT, out_step)
    for (int64_t c = 0; c < wide; c += WIDE * LANES) TILE(WIDE, LANES, c);
    for (int64_t c = wide; c < whole; c += LANES) TILE(1, LANES, c);
    if constexpr (whole < W) TILE(1, W - whole, whole);
    #undef TILE
}

// Calls f(number of rows as a constant, step, first row, scratch) for all steps in order, and in each of
// them for ROWS rows at a time. Rows are independent: each thread takes some of them through all steps.
template <typename F>
static void for_steps(int64_t steps, int64_t batch, int64_t threads, int64_t scratch_size, F f) {
    const int64_t groups = (batch + ROWS - 1) / ROWS, parts = std::max<int64_t>(std::min(threads, groups), 1);
    #pragma omp parallel for num_threads(parts) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = groups * part / parts * ROWS;
        const int64_t end = std::min(groups * (part + 1) / parts * ROWS, batch);
        std::vector<Real> scratch(ROWS * scratch_size + PADDING);
        for (int64_t s = 0; s < steps; s++) {
            for (int64_t row = first; row < end; row += ROWS) {
                const int64_t count = std::min(ROWS, end - row);
                if (count == 4) f(std::integral_constant<int64_t, 4>(), s, row, scratch.data());
                else if (count == 3) f(std::integral_constant<int64_t, 3>(), s, row, scratch.data());
                else if (count == 2) f(std::integral_constant<int64_t, 2>(), s, row, scratch.data());
                else f(std::integral_constant<int64_t, 1>(), s, row, scratch.data());
            }
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
    steps: bool
    """Whether there is one for each step."""

    @property
    def size(self) -> int:
        """Elements of a row."""
        return row_size(self.shape)

    def here(self, step: str) -> str:
        """The address of the first row's elements at a step."""
        rows = ROWS in self.shape
        along = f" + {step} * {'batch * ' if rows else ''}{self.size}" if self.steps else ""
        return f"{self.name}{along}{f' + row * {self.size}' if rows else ''}"

    def value(self, at: str) -> Value:
        """The elements, where ``at`` is a variable with the address."""
        return Value(f"({at} + r * {self.size})" if ROWS in self.shape else at, compact(self.shape))


class CppRecurrence:
    """The kernel of a program.

    Raises:
        CannotRewrite: there is no kernel for this step, or no compiler.
    """

    def __init__(self, program: StepProgram, dtype: torch.dtype, *, reverse: bool) -> None:
        if dtype not in _TYPES:
            raise CannotRewrite(f"there is no kernel for {dtype}")
        self.program = program
        source = recurrence_source(program, dtype, reverse=reverse)
        count = len(program.inputs) + len(program.shared)
        arguments = [
            *[f"const {_TYPES[dtype]}*"] * count,
            *[f"{_TYPES[dtype]}*"] * (len(program.carry) + len(program.emitted)),
            *["int64_t"] * 3,
        ]
        try:
            self._run: Callable[..., None] = _compat.load_cpp_kernel(arguments, source)
        except Exception as error:  # a missing compiler shows itself in many ways
            raise CannotRewrite(f"the kernel cannot be compiled: {error!r}") from error

    def emitted_shapes(self) -> list[tuple[int, ...]]:
        """Of what is emitted in each step, without the batch, which is the first dimension."""
        (outputs,) = next(n for n in self.program.graph.nodes if n.op == "output").args
        return [self.program.shape(n)[1:] for n in outputs[len(self.program.carry) :]]

    def __call__(
        self,
        states: Sequence[Tensor],
        emitted: Sequence[Tensor],
        inputs: Sequence[Tensor],
        shared: Sequence[Tensor],
    ) -> None:
        """Fill in ``states``, ``[T + 1, B, ...]`` each, from its first (if reverse its last) row on.

        Also ``emitted``, ``[T, B, ...]`` each.
        """
        steps, batch = states[0].shape[0] - 1, states[0].shape[1]
        dtype = states[0].dtype
        read = [x.to(dtype).contiguous() for x in inputs]
        weights = []
        for x in shared:
            padded = x.new_empty(x.numel() + _PADDING, dtype=dtype)
            padded[: x.numel()].view(x.shape).copy_(x)
            weights.append(padded)
        self._run(*read, *weights, *states, *emitted, steps, batch, torch.get_num_threads())


def recurrence_source(program: StepProgram, dtype: torch.dtype, *, reverse: bool) -> str:
    """C++ of the whole recurrence.

    Raises:
        CannotRewrite: a step does something that has no translation.
    """
    shape = program.shape
    inputs = [Argument(f"x{i}", shape(n), True) for i, n in enumerate(program.inputs)]
    shared = [Argument(f"s{i}", shape(n), False) for i, n in enumerate(program.shared)]
    carry = [Argument(f"y{i}", shape(n), True) for i, n in enumerate(program.carry)]
    (outputs,) = next(n for n in program.graph.nodes if n.op == "output").args
    emitted = [Argument(f"e{i}", shape(n), True) for i, n in enumerate(outputs[len(carry) :])]
    for each in (*inputs, *shared, *carry):
        if ROWS in each.shape[1:]:
            raise CannotRewrite("the batch is not the first dimension of something that a step reads")
    if any(ROWS not in each.shape for each in carry):
        raise CannotRewrite("the state has no dimension for the batch")
    before, after = ("t + 1", "t") if reverse else ("t", "t + 1")
    lines = [f"const Real* in_{a.name} = {a.here(f'({before})')};" for a in carry]
    lines += [f"Real* out_{a.name} = {a.here(f'({after})')};" for a in carry]
    lines += [f"const Real* in_{a.name} = {a.here('t')};" for a in (*inputs, *shared)]
    lines += [f"Real* out_{a.name} = {a.here('t')};" for a in emitted]
    nodes = (*program.carry, *program.inputs, *program.shared)
    placed = {n: a.value(f"in_{a.name}") for n, a in zip(nodes, (*carry, *inputs, *shared), strict=True)}
    results = [a.value(f"out_{a.name}") for a in (*carry, *emitted)]
    source = StepSource(program.graph, placed, results, dtype)
    pointers = [f"const Real* {a.name}" for a in (*inputs, *shared)]
    pointers += [f"Real* {a.name}" for a in (*carry, *emitted)]
    names = [a.name for a in (*inputs, *shared, *carry, *emitted)]
    text = f"""
template <int64_t N>
static void step({", ".join(pointers)}, int64_t t, int64_t batch, int64_t row, Real* scratch) {{
{chr(10).join(lines)}
{source.text}
}}

extern "C" void kernel({", ".join(pointers)}, int64_t steps, int64_t batch, int64_t threads) {{
for_steps(steps, batch, threads, {source.scratch}, [&](auto rows, int64_t s, int64_t row, Real* scratch) {{
const int64_t t = {"steps - 1 - s" if reverse else "s"};
step<decltype(rows)::value>({", ".join(names)}, t, batch, row, scratch);
}});
}}
"""
    return (_PRELUDE + text).replace("REAL", _TYPES[dtype]).replace("PADDING", str(_PADDING))
