"""The exact backward pass of a chain of equal blocks as one operator.

It gives the cotangents of all states, and what gradients of parameters are computed from besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..chain import Chain
from ..errors import CannotRewrite
from ..passes.program import canonical_order, externals_of
from ..stage import SWEEP, stage
from ..system import State
from .limits import check_bytes, rows_within_limit
from .op import blocks_text, compile_blocks
from .program import Source, is_real, source_of, step_of

Places = Mapping[Node, tuple[int, int]]
"""Of nodes, in which stack they are which row."""


@dataclass(frozen=True)
class _Template:
    """One block of a chain."""

    template: tuple[Node, ...]
    entry: Node
    exit: Node
    leaves: tuple[Node, ...]


@dataclass(frozen=True)
class _Read:
    """What the blocks read at one place: where it lies, or a stack that is to be made of it."""

    source: Source
    is_stacked: bool

    @property
    def rows(self) -> tuple[int, ...] | None:
        return tuple(range(len(self.source.tensors))) if self.is_stacked else self.source.rows

    def values(self, value: Callable[[Node], Any], dtype: torch.dtype) -> list[Tensor]:
        found: list[Tensor] = [value(n) for n in self.source.tensors]
        if self.is_stacked:
            found = [torch.stack(found)]
        return [x if x.dtype == dtype else x.to(dtype) for x in found]


class Sweep:
    """A kernel for a chain.

    Args:
        chain: of blocks of one kind.

    Attributes:
        inputs: the nodes whose values it needs.
        places: once it is written, where in its results are nodes of the blocks.

    Raises:
        CannotRewrite: there is no kernel for this chain, or it is not expected to be faster.
    """

    places: Places

    def __init__(self, chain: Chain) -> None:
        if len(chain.blocks[0].entry) != 1:
            raise CannotRewrite("its state consists of several tensors")
        (first,) = chain.blocks[0].entry
        (blocks,) = chain.classes
        self._first, self._dtype, self._template = first, first.meta["val"].dtype, blocks.template
        self._reads = [_read(source_of(column)) for column in blocks.externals]
        check_bytes(rows_within_limit(first), self._sources, backward=True)
        self._orders = [canonical_order(block) for block in chain.blocks]
        self.inputs = tuple(dict.fromkeys([first, *(n for s in self._sources for n in s.tensors)]))
        self._text = ""

    @property
    def _sources(self) -> list[Source]:
        return [read.source for read in self._reads]

    def write(self, wanted: Iterable[Node]) -> None:
        """Write the kernel, which is not compiled yet.

        Args:
            wanted: nodes of the blocks whose values are used besides the states.

        Raises:
            CannotRewrite: a block does something that has no translation, or its rows are not apart.
        """
        orders, template = self._orders, self._template
        externals = tuple(externals_of(template))
        block = _Template(tuple(orders[0]), template.entry[0], template.exit[0], externals)
        index = {n: i for order in orders for i, n in enumerate(order)}
        emitted = _needed_for({orders[0][index[n]] for n in wanted if n in index}, block)
        step = step_of(block, self._sources, emitted, keep=True)
        rows = [read.rows for read in self._reads]
        self._text = blocks_text(step, self._dtype, len(orders), rows, backward=True)
        self.places = {
            order[index[t]]: (i, row) for i, t in enumerate(emitted) for row, order in enumerate(orders)
        }

    def compile(self) -> None:
        """Compile the kernel.

        Raises:
            CannotRewrite: it cannot be compiled.
        """
        compile_blocks(self._text)

    def __call__(self, value: Callable[[Node], Any]) -> tuple[State, list[Tensor]]:
        """The cotangents of all states, ``[blocks + 1, ...]``, and the stacks of ``places``."""
        values = [x for read in self._reads for x in read.values(value, self._dtype)]
        with stage(SWEEP):
            found = torch.ops.hwbp_compile.blocks(value(self._first), values, self._text)
        _, *emitted, states = found
        return (states,), emitted


def _read(source: Source) -> _Read:
    """Inputs of the graph are read where they lie; what is computed is stacked for other uses too."""
    given = source.rows is not None or all(n.op == "placeholder" for n in source.tensors)
    return _Read(source, not given and len(set(source.tensors)) > 1)


def _needed_for(roots: Iterable[Node], block: _Template) -> list[Node]:
    """What the kernel has to return for some nodes: of others than rows, what they are computed from."""
    inside = set(block.template)
    found: dict[Node, None] = {}
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if is_real(node, block.entry):
            found.setdefault(node)
        else:
            waiting.extend(n for n in node.all_input_nodes if n in inside)
    return [n for n in block.template if n in found and n is not block.exit]
