"""A cell run over time as a system: saved values of all steps at once, and one program for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..passes.batch import Stacked, rows_of
from ..passes.linear_ops import nodes_in
from ..passes.program import BlockProgram
from ..passes.replay import Replay
from ..residual import Coefficient, ResidualPath
from ..system import Rows, State
from .cell_graph import CellGraph


class CellReplay(Replay[Node]):
    """Evaluates a cell's graph for all steps at once, in the order of time.

    Args:
        given: what is known, by node: ``Stacked`` over the steps, or a tensor that all share.
        steps: how many there are.
    """

    def __init__(self, given: Mapping[Node, Any], steps: int) -> None:
        super().__init__()
        self._values.update(given)
        self.steps = steps

    def give(self, node: Node, value: Any) -> None:
        """Add to what is known."""
        self._values[node] = value

    def give_total(self, node: Node, value: Tensor) -> None:
        """Add a sum over the steps to what is known."""
        self._totals[node] = value

    def node(self, key: Node) -> Node:
        """The key is the node."""
        return key

    def operands(self, key: Node) -> list[Node]:
        """The nodes among its arguments."""
        return list(nodes_in((key.args, key.kwargs)))

    def is_leaf(self, key: Node) -> bool:
        """Whether it is known."""
        return key in self._values

    def leaf(self, key: Node) -> Any:
        """What was given."""
        return self._values[key]

    def members(self, key: Node) -> int:
        """All steps."""
        return self.steps


class TimeSystem:
    """The cotangents of a cell's states. Block p is the step at time ``T - 1 - p``.

    Args:
        cell: one step.
        replay: what is known of all steps.
        steps: their number, T.
        first: the cotangent of the last state.
        later: cotangents that reach the other states directly, from the last but one to the initial one;
            stacked ``[T, ...]``, None for none.
    """

    def __init__(
        self, cell: CellGraph, replay: CellReplay, steps: int, first: State, later: tuple[Tensor | None, ...]
    ) -> None:
        self._cell = cell
        self._replay = replay
        self._backwards: dict[Node, Any] = {}
        self.blocks = steps
        self.first = first
        self.later = later
        self.residual = self._residual()

    def block_vjp(self, w: State, blocks: Rows) -> State:
        """``J_p w[p]`` for all ``blocks`` at once."""
        program = self._program(blocks)
        values = program.block_vjp(tuple(Stacked(c) for c in w))
        return tuple(rows_of(v, x, blocks.count) for v, x in zip(values, self.first, strict=True))

    def _program(self, blocks: Rows) -> BlockProgram:
        def external(node: Node) -> Any:
            value = self._backward_in_time(node)
            return Stacked(value.value[blocks.index]) if isinstance(value, Stacked) else value

        return BlockProgram(self._cell.block, self._cell.split, external, blocks.count)

    def _backward_in_time(self, node: Node) -> Any:
        if node not in self._backwards:
            value = self._replay.value(node)
            self._backwards[node] = Stacked(value.value.flip(0)) if isinstance(value, Stacked) else value
        return self._backwards[node]

    def _residual(self) -> ResidualPath:
        parts = self._program(Rows(0, self.blocks)).residual()

        def coefficient(entry: Any, like: Tensor) -> Coefficient:
            return entry if entry is None or isinstance(entry, float) else rows_of(entry, like, self.blocks)

        return ResidualPath(
            tuple(tuple(coefficient(e, x) for e in row) for row, x in zip(parts, self.first, strict=True))
        )
