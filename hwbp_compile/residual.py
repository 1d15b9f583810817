"""``ResidualPath``: K as a small matrix of diagonal operators, the part of a block that composes cheaply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import networkx as nx
import torch
from torch import Tensor

Coefficient: TypeAlias = Tensor | float | None
"""One diagonal operator: None is zero, a float the same multiple for all blocks and elements (1.0 is the
identity), a tensor ``[blocks, ...]`` an elementwise factor broadcastable to the stacked state."""


def multiply(a: Coefficient, b: Coefficient) -> Coefficient:
    """The product of two diagonal operators."""
    if a is None or b is None:
        return None
    if isinstance(a, float) and a == 1.0:
        return b
    if isinstance(b, float) and b == 1.0:
        return a
    return a * b


def add(a: Coefficient, b: Coefficient) -> Coefficient:
    """The sum of two diagonal operators."""
    if a is None:
        return b
    if b is None:
        return a
    return a + b


def apply(a: Coefficient, x: Tensor) -> Tensor | None:
    """The operator applied to ``x``; None for zero."""
    if a is None:
        return None
    return x if isinstance(a, float) and a == 1.0 else a * x


def add_values(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a + b`` where None is zero."""
    if a is None:
        return b
    return a if b is None else a + b


@dataclass(frozen=True, eq=False)
class ResidualPath:
    """``K`` for every block of a chain: ``entries[i][j]`` maps component ``j`` of ``w[p]`` to component
    ``i`` of ``w[p + 1]``. See :data:`Coefficient`."""

    entries: tuple[tuple[Coefficient, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.entries) for row in self.entries):
            raise ValueError("A ResidualPath must be a square matrix of coefficients.")

    @property
    def size(self) -> int:
        """The number of components of the state."""
        return len(self.entries)

    @property
    def is_zero(self) -> bool:
        """Whether no path is left at all."""
        return all(entry is None for row in self.entries for entry in row)

    @cached_property
    def diagonal(self) -> tuple[Coefficient, ...]:
        """The coefficients that scans read, in each iteration; those that are tensors are made once."""
        return tuple(
            _once(e) if isinstance(e, Tensor) else e for e in (r[i] for i, r in enumerate(self.entries))
        )

    def map(self, f: Callable[[Coefficient], Coefficient]) -> ResidualPath:
        """Apply ``f`` to every entry that is not zero."""
        return ResidualPath(tuple(tuple(None if e is None else f(e) for e in row) for row in self.entries))

    def scaled(self, factor: float) -> ResidualPath:
        """``factor * K``; exactly zero when the factor is."""
        return self.map(lambda e: None if factor == 0.0 else multiply(float(factor), e))

    def rows(self, index: slice) -> ResidualPath:
        """The coefficients of some of the blocks."""
        return self.map(lambda e: e[index] if isinstance(e, Tensor) else e)

    def compose(self, inner: ResidualPath) -> ResidualPath:
        """``self`` after ``inner``, for the same blocks."""
        size = self.size

        def entry(i: int, j: int) -> Coefficient:
            total: Coefficient = None
            for m in range(size):
                total = add(total, multiply(self.entries[i][m], inner.entries[m][j]))
            return total

        return ResidualPath(tuple(tuple(entry(i, j) for j in range(size)) for i in range(size)))

    def apply(self, w: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """``K w`` on stacked rows; a component that no path reaches is None."""
        out: list[Tensor | None] = []
        for row in self.entries:
            total: Tensor | None = None
            for entry, x in zip(row, w, strict=True):
                total = add_values(total, None if x is None else apply(entry, x))
            out.append(total)
        return tuple(out)

    def split_triangular(self) -> tuple[ResidualPath, ResidualPath, tuple[int, ...]]:
        """Split ``K`` into a part that can be scanned one component after the other, and the rest.

        Returns ``(scannable, rest, order)``: components in ``order`` depend on themselves and on earlier
        ones only. ``rest`` is zero unless components exchange their roles in a cycle.
        """
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(self.size))
        graph.add_edges_from(
            (j, i)
            for i in range(self.size)
            for j in range(self.size)
            if i != j and self.entries[i][j] is not None
        )
        cyclic = {node: n for n, part in enumerate(nx.strongly_connected_components(graph)) for node in part}

        def kept(i: int, j: int) -> bool:
            # Inside a cycle only the edges towards higher components stay; any choice is exact in the limit.
            return i == j or cyclic[i] != cyclic[j] or i > j

        scannable = ResidualPath(
            tuple(
                tuple(e if kept(i, j) else None for j, e in enumerate(row))
                for i, row in enumerate(self.entries)
            )
        )
        rest = ResidualPath(
            tuple(
                tuple(None if kept(i, j) else e for j, e in enumerate(row))
                for i, row in enumerate(self.entries)
            )
        )
        graph.remove_edges_from([(j, i) for j, i in graph.edges if not kept(i, j)])
        order = tuple(nx.lexicographical_topological_sort(graph))
        return scannable, rest, order


def _once(x: Tensor) -> Tensor:
    # Inductor hands each operator a copy of its own of what it can fuse, and takes away copies that seem to
    # do nothing; a slice of a concatenation it hands on as it is.
    return torch.cat([x.new_ones((1, *x.shape[1:])), x])[1:]
