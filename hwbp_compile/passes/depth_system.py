"""A chain of a joint graph as a system: stacked externals, and one program for each class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..chain import BlockClass, Chain
from ..residual import Coefficient, ResidualPath
from ..system import Rows, State
from .batch import Stacked, rows_of
from .program import BlockProgram, externals_of
from .rows import gather, interleave
from .split import split


class DepthSystem:
    """The cotangents of a chain of blocks.

    Args:
        chain: what the passes found.
        value: the value of a node outside of the chain, or of the chain's first entry.
    """

    def __init__(self, chain: Chain, value: Callable[[Node], Any]) -> None:
        self._chain = chain
        self._value = value
        self._stacks: dict[tuple[Node, ...], Any] = {}
        self._splits = [split(c.template) for c in chain.classes]
        self.blocks = len(chain.blocks)
        self.first: State = tuple(value(n) for n in chain.blocks[0].entry)
        self.residual = self._residual()
        self.later = self._later()

    def block_vjp(self, w: State, blocks: Rows) -> State:
        """``J_p w[p]`` for all ``blocks``: one batched program for each class among them."""
        wanted = set(blocks)
        results: list[tuple[list[int], State]] = []
        for i, each in enumerate(self._chain.classes):
            members = set(each.members)
            at = [row for row, p in enumerate(blocks) if p in members]
            if not at:
                continue
            program = self._program(i, [p for p in each.members if p in wanted])
            rows = tuple(self._enter(gather(c, at), len(at)) for c in w)
            results.append((at, self._leave(program.block_vjp(rows), len(at))))
        return tuple(
            interleave([(at, state[i]) for at, state in results], len(wanted)) for i in range(len(w))
        )

    def _program(self, index: int, members: list[int]) -> BlockProgram:
        each = self._chain.classes[index]
        rows = [each.members.index(p) for p in members]
        columns = dict(zip(externals_of(each.template), each.externals, strict=True))
        return BlockProgram(
            each.template, self._splits[index], lambda node: self._external(columns[node], rows), len(members)
        )

    def _external(self, column: tuple[Node, ...], rows: list[int]) -> Any:
        nodes = tuple(column[i] for i in rows)
        if nodes not in self._stacks:
            value = self._value(nodes[0])
            shared = len(nodes) == 1 or all(n is nodes[0] for n in nodes) or not isinstance(value, Tensor)
            self._stacks[nodes] = value if shared else Stacked(torch.stack([self._value(n) for n in nodes]))
        return self._stacks[nodes]

    @staticmethod
    def _enter(rows: Tensor, members: int) -> Any:
        """A single block is evaluated as it stands, without the first dimension."""
        return rows.squeeze(0) if members == 1 else Stacked(rows)

    def _leave(self, values: tuple[Any, ...], members: int) -> State:
        return tuple(rows_of(v, x, members) for v, x in zip(values, self.first, strict=True))

    def _each_class(self, evaluate: Callable[[BlockProgram], Any]) -> list[tuple[BlockClass, Any]]:
        return [
            (each, evaluate(self._program(i, list(each.members))))
            for i, each in enumerate(self._chain.classes)
        ]

    def _later(self) -> tuple[Tensor | None, ...]:
        parts = self._each_class(BlockProgram.direct)
        out: list[Tensor | None] = []
        for i, like in enumerate(self.first):
            if all(values[i] is None for _, values in parts):
                out.append(None)
                continue
            rows = [(list(c.members), rows_of(v[i], like, len(c.members))) for c, v in parts]
            out.append(interleave(rows, self.blocks))
        return tuple(out)

    def _residual(self) -> ResidualPath:
        parts = self._each_class(BlockProgram.residual)
        size = len(self.first)
        return ResidualPath(
            tuple(tuple(self._coefficient(parts, i, j) for j in range(size)) for i in range(size))
        )

    def _coefficient(self, parts: list[tuple[BlockClass, Any]], i: int, j: int) -> Coefficient:
        entries = [values[i][j] for _, values in parts]
        if all(e is None for e in entries):
            return None
        if all(isinstance(e, float) and e == entries[0] for e in entries):
            return entries[0]
        like = self.first[i]

        def rows(entry: Any, members: int) -> Tensor:
            if isinstance(entry, float):
                entry = torch.full_like(like, entry)
            return rows_of(entry, like, members)

        return interleave([(list(c.members), rows(v[i][j], len(c.members))) for c, v in parts], self.blocks)
