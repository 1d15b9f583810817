"""``hwbp_compile::blocks``: equal blocks, each applied to the result of the one before, by one kernel.

What they do stands in a text, so that code which was compiled in another process finds the kernel again.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .. import _compat
from ..errors import CannotRewrite
from ..recurrent.step_program import StepProgram
from .kernel_cpp import BlocksKernel, Shape, addresses_of, blocks_source, results_of
from .step_text import program_of

log = logging.getLogger(__name__)

torch.library.define(
    "hwbp_compile::blocks",
    "(Tensor state, Tensor[] values, str text) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def blocks_text(
    step: Sequence[Any],
    dtype: torch.dtype,
    blocks: int,
    rows: Sequence[Sequence[int] | None],
    *,
    backward: bool = False,
) -> str:
    """What the operator is told beside tensors, if there is a kernel; it is not compiled yet.

    Args:
        step: of :func:`.step_text.encoded`.
        dtype: of all values.
        blocks: how many there are.
        rows: per input of the step, the rows of one tensor that the blocks read, the last block's first; None
            where each block reads a tensor of its own.
        backward: whether the last block is applied first, as in a backward pass.

    Raises:
        CannotRewrite: a block does something that has no translation.
    """
    # Without quotation marks and backslashes, which not all generated code would hold as they are.
    text = json.dumps([step, str(dtype).removeprefix("torch."), blocks, rows, backward]).replace('"', "'")
    with _compat.outside_of_tracing():
        blocks_source(_of(text).program, dtype, backward=backward)
    return text


def compile_blocks(text: str) -> None:
    """Compile the kernel of a text now.

    Raises:
        CannotRewrite: it cannot be compiled.
    """
    with _compat.outside_of_tracing():
        kernel = _of(text).kernel
    if isinstance(kernel, str):
        raise CannotRewrite(kernel)


class _Blocks:
    """What a text tells."""

    def __init__(self, text: str) -> None:
        step, dtype, self.blocks, self.rows, self.backward = json.loads(text.replace("'", '"'))
        self.program: StepProgram = program_of(step)
        self.dtype: torch.dtype = getattr(torch, dtype)

    @functools.cached_property
    def kernel(self) -> BlocksKernel | str:
        """Compiled; or why there is none."""
        try:
            return BlocksKernel(self.program, self.dtype, backward=self.backward)
        except CannotRewrite as refusal:
            return refusal.reason

    @functools.cached_property
    def _emitted(self) -> list[Shape]:
        return [self.program.shape(n)[1:] for n in self.program.results[1]]

    def results(self, state: Tensor) -> list[Tensor]:
        """Tensors for what the operator returns."""
        return results_of(self._emitted, self.program.keep, state, self.blocks)

    @functools.cached_property
    def step(self) -> GraphModule:
        """One block, by torch's operators."""
        return GraphModule(torch.nn.Module(), self.program.graph)

    def read(self, values: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The tensors of each input."""
        found, start = [], 0
        for rows in self.rows:
            end = start + (self.blocks if rows is None else 1)
            found.append(values[start:end])
            start = end
        return found


@functools.lru_cache(maxsize=256)
def _of(text: str) -> _Blocks:
    return _Blocks(text)


@torch.library.impl("hwbp_compile::blocks", "CPU")
def _run(state: Tensor, values: list[Tensor], text: str) -> list[Tensor]:
    known = _of(text)
    values = [x if x.is_contiguous() else x.contiguous() for x in values]
    kernel = known.kernel
    if isinstance(kernel, str):  # where the code was compiled there was a compiler
        _warn_once(kernel)
        return _by_operators(known, state, known.read(values))
    places = zip(known.read(values), known.rows, strict=True)
    addresses = [a for tensors, rows in places for a in addresses_of(tensors, rows)]
    results = known.results(state)
    kernel(state, addresses, known.blocks, results)
    return results


@torch.library.register_fake("hwbp_compile::blocks")
def _fake(state: Tensor, values: list[Tensor], text: str) -> list[Tensor]:
    return _of(text).results(state)


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("A chain of blocks runs one operator after the other: %s.", reason)


def _by_operators(known: _Blocks, state: Tensor, read: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    types = [n.meta["val"].dtype for n in known.program.inputs]
    states, emitted = [state], []
    with torch.no_grad(), _compat.without_autocast(state.device):
        order = range(known.blocks) if known.backward else reversed(range(known.blocks))
        for i in order:
            own = [
                (tensors[i] if rows is None else tensors[0][rows[i]]).to(dtype)
                for tensors, rows, dtype in zip(read, known.rows, types, strict=True)
            ]
            state, *others = known.step(state, *own)
            states.append(state)
            emitted.append(others)
        if not known.backward:
            states, emitted = states[::-1], emitted[::-1]
        columns = [torch.stack(column) for column in zip(*emitted, strict=True)]
        kept = [torch.stack(states)] if known.program.keep else []
        return [state.clone(memory_format=torch.contiguous_format), *columns, *kept]
