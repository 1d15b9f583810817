"""A recurrence on a CPU as one C++ kernel: all steps, a few rows of the batch at a time.

Rows of the batch are independent, so threads share them and never wait for one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _compat
from ..errors import CannotRewrite
from .step_cpp_gates import GATES
from .step_cpp_library import LEAST, LIBRARY, PADDING
from .step_cpp_unpacked import UNPACKED
from .step_layout import Value, placed_rows, row_size
from .step_program import ROWS, StepProgram
from .step_source import StepSource

_LARGE = 1 << 16
"""Elements of all weights from which on they are read from memory rather for many rows than for few."""
_SUMMED_AT_ONCE = 32
"""Rows, of one step or of several, from which on what is summed over rows takes its sums from memory."""
TYPES = {torch.float32: "float", torch.float64: "double"}


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
        rows = f" + row * {row_size(self.shape)}" if ROWS in self.shape else ""
        return f"{self.name} + {step} * {self.step}{rows}"

    @property
    def step(self) -> str:
        """How far it is from one step to the next."""
        size = row_size(self.shape) if self.steps else 0
        return f"batch * {size}" if ROWS in self.shape else str(size)


class CppRecurrence:
    """The kernel of a program.

    Raises:
        CannotRewrite: there is no kernel for this step, or no compiler.
    """

    def __init__(self, program: StepProgram, dtype: torch.dtype, *, reverse: bool) -> None:
        real = real_type(dtype)
        self.program = program
        self._reverse = reverse
        source, step = recurrence_source(program, dtype, reverse=reverse)
        self._workspace, self._sums = step.workspace, step.summed
        self._batch_dims = [
            [Argument("", program.shape(n)).batch_dim for n in nodes]
            for nodes in (program.inputs, program.shared)
        ]
        read = len(program.inputs) + len(program.shared)
        written = len(program.carry) + len(program.emitted) + len(self._workspace) + 1
        arguments = [*[f"const {real}*"] * read, *[f"{real}*"] * written, *["int64_t"] * 4]
        self._run = compiled(arguments, source)

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
            padded = first.new_empty(x.numel() + PADDING)
            padded[: x.numel()].view(moved.shape).copy_(moved)
            read.append(padded)
        emitted = results[n : n + len(self.program.emitted)]
        group = max(_SUMMED_AT_ONCE * min(threads, batch) // max(batch, 1), 1)
        workspace = [first.new_empty(group * batch * size) for size in self._workspace]
        sums = first.new_zeros(threads, sum(map(math.prod, self._sums)))
        self._run(*read, *states, *emitted, *workspace, sums, steps, batch, threads, group)
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
    workspace = [Argument(f"w{i}", (ROWS, size), True) for i, size in enumerate(step.workspace)]
    before, after = ("(t + 1)", "t") if reverse else ("t", "(t + 1)")
    if not program.keep:
        before, after = "(s % 2)", "((s + 1) % 2)"
    lines = [f"const int64_t t = {'steps - 1 - s' if reverse else 's'};"]
    lines += [f"const Real* in_{a.name} = {a.here(before)};" for a in carry]
    lines += [f"Real* out_{a.name} = {a.here(after)};" for a in carry]
    lines += [f"const Real* in_{a.name} = {a.here()};" for a in (*inputs, *shared)]
    lines += [f"Real* out_{a.name} = {a.here()};" for a in emitted]
    lines += [f"Real* out_{a.name} = {a.here('(s % group)')};" for a in workspace]
    here = "\n".join(lines)
    jumps = [(a, "-" if reverse else "") for a in (*carry, *inputs, *shared, *emitted)]
    jumps += [(a, "") for a in workspace]
    jump = "\n".join(f"const int64_t jump_{a.name} = {sign}({a.step});" for a, sign in jumps)
    pointers = [f"const Real* {a.name}" for a in (*inputs, *shared)]
    pointers += [f"Real* {a.name}" for a in (*carry, *emitted, *workspace)]
    names = ", ".join(a.name for a in (*inputs, *shared, *carry, *emitted, *workspace))
    parameters = ", ".join(pointers)
    size = sum(map(math.prod, step.summed))
    packs = list(step.packs.values())
    pack = [f"const Real* in_{a.name} = {a.name};" for a in shared]
    pack += [f"std::vector<Real> {name}({size});" for name, size in packs]
    pack += [statement.format(f"{name}.data()") for statement, (name, _) in step.packs.items()]
    packed = "".join(f"const Real* {name}, " for name, _ in packs)
    pass_packed = "".join(f"{name}.data(), " for name, _ in packs)
    many_rows = sum(math.prod(n.meta["val"].shape) for n in program.shared) > _LARGE
    text = f"""
static void step(int64_t N, {packed}{parameters}, int64_t steps, int64_t s, int64_t batch, int64_t group,
                 int64_t row, Real* scratch) {{
{here}
{step.text}
}}

static void add({parameters}, int64_t steps, int64_t s, int64_t times, int64_t batch, int64_t group,
                int64_t row, int64_t count, Real* sums) {{
{here}
{jump}
{step.sums}
}}

extern "C" void kernel({parameters}, Real* sums, int64_t steps, int64_t batch, int64_t threads,
                       int64_t group) {{
{chr(10).join(pack)}
for_steps<{"64" if many_rows else "TILE"}>(steps, batch, threads, group, {step.scratch},
[&](int64_t rows, int64_t s, int64_t row, Real* scratch) {{
step(rows, {pass_packed}{names}, steps, s, batch, group, row, scratch);
}},
[&](int64_t part, int64_t s, int64_t times, int64_t row, int64_t count) {{
add({names}, steps, s, times, batch, group, row, count, sums + part * {size});
}});
}}
"""
    return complete(text, dtype), step


def complete(text: str, dtype: torch.dtype) -> str:
    """With what all kernels have in common before it."""
    names = {"REAL": real_type(dtype), "PADDING": str(PADDING), "FEWEST_ROWS": str(LEAST)}
    source = LIBRARY + UNPACKED + GATES + text
    for name, value in names.items():
        source = source.replace(name, value)
    return source


def real_type(dtype: torch.dtype) -> str:
    """What a dtype is called in C++.

    Raises:
        CannotRewrite: there are no kernels for it.
    """
    if dtype not in TYPES:
        raise CannotRewrite(f"there is no kernel for {dtype}")
    return TYPES[dtype]


def compiled(argument_types: Sequence[str], source: str) -> Callable[..., None]:
    """See :func:`.._compat.load_cpp_kernel`.

    Raises:
        CannotRewrite: it cannot be compiled.
    """
    try:
        return _compat.load_cpp_kernel(argument_types, source)
    except Exception as error:  # a missing compiler shows itself in many ways
        first = (str(error).strip().splitlines() or [""])[0]
        raise CannotRewrite(f"the kernel cannot be compiled: {type(error).__name__}: {first}") from error
