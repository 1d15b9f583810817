"""All blocks of a chain as one C++ kernel: a few rows of the batch at a time, through all of them.

Weights are read where they lie. Threads share the rows and never wait for one another.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CannotRewrite
from ..recurrent.step_cpp import Argument, compiled, complete, real_type
from ..recurrent.step_cpp_library import LEAST
from ..recurrent.step_layout import row_size
from ..recurrent.step_program import ROWS, StepProgram
from ..recurrent.step_source import StepSource

Shape = tuple[int, ...]


class BlocksKernel:
    """The kernel of a step.

    Args:
        program: the step; values without rows are read where the blocks have them.
        dtype: of all values.
        backward: whether the last block is applied first.

    Raises:
        CannotRewrite: there is no kernel for this step, or no compiler.
    """

    def __init__(self, program: StepProgram, dtype: torch.dtype, *, backward: bool = False) -> None:
        real = real_type(dtype)
        pointers = [f"const {real}*", *[f"{real}*"] * (2 + len(program.emitted))]
        arguments = ["int64_t", *pointers, "int64_t", "int64_t", "int64_t"]
        self._keep, self._emitted = program.keep, len(program.emitted)
        self._run = compiled(arguments, blocks_source(program, dtype, backward=backward))

    def __call__(
        self, state: Tensor, addresses: Sequence[int], blocks: int, results: Sequence[Tensor]
    ) -> None:
        """Run all blocks, the last of which is number 0.

        Args:
            state: before the block that is applied first, ``[B, ...]``.
            addresses: of what the program's inputs are for each block, one input after the other.
            blocks: how many.
            results: of :func:`results_of`, to be filled; numbered like the blocks. State i is the one behind
                block i in a forward pass.
        """
        # Of states that are not kept, the one before and the one after a block.
        states = results[-1] if self._keep else state.new_empty((2, *state.shape))
        table = array("q", addresses)
        written = (results[0], states, *results[1 : 1 + self._emitted])
        sizes = (blocks, state.shape[0], torch.get_num_threads())
        self._run(table.buffer_info()[0], state.contiguous(), *written, *sizes)


def threads_for(rows: int) -> int:
    """How many threads share so many rows."""
    return max(1, min(torch.get_num_threads(), -(-rows // LEAST)))


def results_of(emitted: Sequence[Shape], keep: bool, state: Tensor, blocks: int) -> list[Tensor]:
    """Tensors for what is returned: the last state, what is emitted, and all states if they are kept.

    Args:
        emitted: the shapes of a row.
        keep: see above.
        state: the first one.
        blocks: how many there are.
    """
    values = [state.new_empty((blocks, state.shape[0], *shape)) for shape in emitted]
    kept = [state.new_empty((blocks + 1, *state.shape))] if keep else []
    return [torch.empty_like(state, memory_format=torch.contiguous_format), *values, *kept]


def blocks_source(program: StepProgram, dtype: torch.dtype, *, backward: bool = False) -> str:
    """C++ of all blocks; see :class:`BlocksKernel`.

    Raises:
        CannotRewrite: a step does something that has no translation.
    """
    shape = program.shape
    (state,) = program.carry
    inputs = [Argument(f"x{i}", shape(n)) for i, n in enumerate(program.inputs)]
    carry = Argument("y0", shape(state), steps=True)
    emitted = [Argument(f"e{i}", shape(n), steps=True) for i, n in enumerate(program.results[1])]
    first_are_rows = all(a.shape.index(ROWS) == 0 for a in (*inputs, carry, *emitted) if ROWS in a.shape)
    if not first_are_rows:
        raise CannotRewrite("the batch is not the first dimension")
    placed = {n: a.value() for n, a in zip((state, *program.inputs), (carry, *inputs), strict=True)}
    step = StepSource(program, placed, dtype)
    row = f"row * {row_size(carry.shape)}"
    first, last = ("0", "steps") if backward else ("steps", "0")
    before, after = ("t", "(t + 1)") if backward else ("(t + 1)", "t")
    if not program.keep:
        before, after = "(s % 2)", "((s + 1) % 2)"
    lines = [f"const int64_t t = {'s' if backward else 'steps - 1 - s'};"]
    lines.append(f"const Real* in_y0 = s == 0 ? first + {row} : {carry.here(before)};")
    lines.append(f"Real* out_y0 = s == steps - 1 ? last + {row} : {carry.here(after)};")
    for i, each in enumerate(inputs):
        lines.append(f"const Real* {each.name} = reinterpret_cast<const Real*>(table[{i} * steps + t]);")
        lines.append(f"const Real* in_{each.name} = {each.here()};")
    lines += [f"Real* out_{each.name} = {each.here()};" for each in emitted]
    names = ["first", "last", "y0", *(each.name for each in emitted)]
    parameters = ", ".join([f"const Real* {names[0]}", *(f"Real* {name}" for name in names[1:])])
    size = row_size(carry.shape)
    kept = f"""
    std::copy(first, first + batch * {size}, y0 + {first} * batch * {size});
    std::copy(last, last + batch * {size}, y0 + {last} * batch * {size});"""
    text = f"""
static void step(int64_t N, const int64_t* table, {parameters}, int64_t steps, int64_t s, int64_t batch,
                 int64_t row, Real* scratch) {{
{chr(10).join(lines)}
{step.text}
}}

extern "C" void kernel(int64_t addresses, {parameters}, int64_t steps, int64_t batch, int64_t threads) {{
    const int64_t* table = reinterpret_cast<const int64_t*>(addresses);
    for_steps<64>(steps, batch, threads, steps, {step.scratch},
        [&](int64_t rows, int64_t s, int64_t row, Real* scratch) {{
            step(rows, table, {", ".join(names)}, steps, s, batch, row, scratch);
        }},
        [](int64_t, int64_t, int64_t, int64_t, int64_t) {{}});{kept if program.keep else ""}
}}
"""
    return complete(text, dtype)


def addresses_of(tensors: Sequence[Tensor], rows: Sequence[int] | None) -> Sequence[int]:
    """Where the values are that each block has: in tensors of their own, or in ``rows`` of one.

    All have to be contiguous.
    """
    if rows is None:
        return [x.data_ptr() for x in tensors]
    (stack,) = tensors
    start, step = stack.data_ptr(), stack.stride(0) * stack.element_size()
    return [start + step * row for row in rows]
