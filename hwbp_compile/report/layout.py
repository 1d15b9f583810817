"""Where each node of a graph stands in a drawing: as far to the right as its longest path is long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import networkx as nx

Lane = Literal["main", "below"]
GAP = 0.35
"""The space between neighbours, in units of the height of a node that computes one block."""
SWEEPS = 4


@dataclass(frozen=True, slots=True)
class Box:
    """A node's place: its column, its lower edge and its height."""

    column: int
    bottom: float
    height: float

    @property
    def middle(self) -> float:
        """The height at which edges arrive and leave."""
        return self.bottom + self.height / 2


def place(
    dag: nx.DiGraph,
    heights: Mapping[str, float],
    lane: Callable[[str], Lane],
    late: Callable[[str], bool] = lambda name: False,
) -> dict[str, Box]:
    """Place the nodes of ``dag``.

    Columns are the longest paths from a source; nodes that are ``late`` stand right before the first that
    reads them instead, where that is possible. In a column the nodes stand in the order of their
    neighbours, those of lane ``main`` around zero, the others below.
    """
    columns = _columns(dag, late)
    position = {name: float(i) for column in columns for i, name in enumerate(column)}
    for sweep in range(SWEEPS):
        neighbours = dag.predecessors if sweep % 2 == 0 else dag.successors
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wanted = {n: _mean([position[m] for m in neighbours(n)], position[n]) for n in column}
            column.sort(key=lambda n: (wanted[n], n))
            for i, name in enumerate(column):
                position[name] = i - (len(column) - 1) / 2
    boxes: dict[str, Box] = {}
    for number, column in enumerate(columns):
        main = [n for n in column if lane(n) == "main"]
        below = [n for n in column if lane(n) == "below"]
        middle = main or below
        top = _extent(middle, heights) / 2
        _stack(middle, number, -top, heights, boxes)
        if main:
            _stack(below, number, -top - 2 * GAP - _extent(below, heights), heights, boxes)
    return boxes


def _columns(dag: nx.DiGraph, late: Callable[[str], bool]) -> list[list[str]]:
    number = {name: i for i, names in enumerate(nx.topological_generations(dag)) for name in names}
    for name in reversed(list(nx.topological_sort(dag))):
        if late(name):
            number[name] = min((number[n] - 1 for n in dag.successors(name)), default=number[name])
    columns: list[list[str]] = [[] for _ in range(1 + max(number.values()))]
    for name in sorted(number):
        columns[number[name]].append(name)
    return columns


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _extent(names: list[str], heights: Mapping[str, float]) -> float:
    return sum(heights[n] for n in names) + GAP * max(len(names) - 1, 0)


def _stack(
    names: list[str], column: int, bottom: float, heights: Mapping[str, float], boxes: dict[str, Box]
) -> None:
    for name in names:
        boxes[name] = Box(column, bottom, heights[name])
        bottom += heights[name] + GAP
