"""Values of a step as tiles, which a GPU keeps in registers: where each element of a value is.

A tile holds some neighbouring elements of a value for a few rows of the batch. A value is a tensor of numbers
that tell its elements' places, so that torch's own view operators say where a view's elements are. Its
dimension of rows has size 1. A tile is used as a whole; where a view needs a part of one, it is made anew in
two (:class:`NeedsCut`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CannotRewrite

COLUMNS = 1 << 20
"""A place in a tile is its number times this, plus the column."""
MOST_TILES = 256
"""Of one value; more would make a kernel that takes long to compile."""


class NeedsCut(Exception):
    """A value's tiles have to end at some place along their dimension."""

    def __init__(self, node: Node, place: int) -> None:
        self.node, self.place = node, place


@dataclass(frozen=True, slots=True)
class Tile:
    """Some elements of a value along one dimension: a variable of shape ``[rows, width]``, padded."""

    name: str
    width: int
    node: Node
    start: int
    """Where in the value's dimension it begins."""
    is_bool: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """A tensor that a kernel reads: its name, and whether it differs between the rows or the steps."""

    name: str
    has_rows: bool
    per_step: bool


@dataclass(frozen=True, slots=True)
class Value:
    """Where the elements are: in tiles, or in memory, numbered as they lie there (for one row and step)."""

    places: Tensor
    memory: Memory | None = None

    def view(self, places: Tensor) -> Value:
        """Some of its elements in another arrangement."""
        return Value(places, self.memory)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring elements of a value.

    ``tile``: all of a tile if ``step`` is 1, its only element repeated if it is 0. Without: in memory, from
    ``first`` on with distance ``step``.
    """

    width: int
    tile: int | None
    first: int
    step: int

    def part(self, start: int, width: int) -> Run:
        """So many elements of it."""
        return Run(width, self.tile, self.first + start * self.step, self.step)


def lane_of(values: Sequence[Value], shape: Sequence[int]) -> int:
    """The dimension of a result along which most operands have neighbouring elements."""
    rank = len(shape)
    large = [d for d in range(rank) if shape[d] > 1]
    for value in values:
        places = value.places.expand(tuple(shape))
        for d in reversed(large):
            first, second = places.select(d, 0).flatten()[0], places.select(d, 1).flatten()[0]
            if second - first == 1:
                return d
    return large[-1] if large else max(rank - 1, 0)


def runs_of(value: Value, line: Tensor) -> list[Run]:
    """A line of places, taken apart."""
    places: list[int] = line.tolist()
    found: list[Run] = []
    i = 0
    while i < len(places):
        step = places[i + 1] - places[i] if i + 1 < len(places) else 0
        end = i + 1
        in_tile = value.memory is None
        while end < len(places) and places[end] - places[end - 1] == step:
            if in_tile and (places[end] // COLUMNS != places[i] // COLUMNS):
                break
            end += 1
        if in_tile and step not in (0, 1):
            end, step = i + 1, 0
        found.append(Run(end - i, places[i] // COLUMNS if in_tile else None, places[i], step))
        i = end
    return found


def checked(run: Run, tiles: Sequence[Tile]) -> Run:
    """The same run, if it takes a whole tile or repeats a single element.

    Raises:
        NeedsCut: it takes a part of one.
    """
    if run.tile is None:
        return run
    tile, column = tiles[run.tile], run.first % COLUMNS
    if tile.width == 1:
        return Run(run.width, run.tile, run.first, 0)
    if column:
        raise NeedsCut(tile.node, tile.start + column)
    if run.step == 0 or run.width < tile.width:
        raise NeedsCut(tile.node, tile.start + 1 if run.step == 0 else tile.start + run.width)
    return run


def aligned(
    lines: Sequence[list[Run]], tiles: Sequence[Tile], widest: int, cuts: Collection[int] = ()
) -> Iterator[tuple[int, tuple[Run, ...]]]:
    """Pieces of equal width of several lines, none wider than ``widest``, each with where it begins.

    Raises:
        NeedsCut: a tile would have to be in two pieces.
    """
    ends: set[int] = {0, *cuts}
    for line in lines:
        position = 0
        for run in line:
            position += run.width
            ends.add(position)
    for start, end in pairwise(sorted(ends)):
        ends.update(range(start + widest, end, widest))
    rest = [iter(line) for line in lines]
    current: list[tuple[Run, int]] = [(next(runs), 0) for runs in rest]
    for start, end in pairwise(sorted(ends)):
        pieces = []
        for i, runs in enumerate(rest):
            run, begin = current[i]
            if begin + run.width <= start:
                run, begin = current[i] = (next(runs), begin + run.width)
            rigid = run.tile is not None and run.step != 0
            if rigid and (start, end) != (begin, begin + run.width):
                tile = tiles[run.tile]  # type: ignore[index]
                raise NeedsCut(tile.node, tile.start + (end if start == begin else start) - begin)
            pieces.append(run.part(start - begin, end - start))
        yield start, tuple(pieces)


def lines_along(places: Tensor, lane: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """All lines along a dimension, with their indices in the other ones.

    Raises:
        CannotRewrite: there are too many.
    """
    moved = places.movedim(lane, -1) if places.dim() else places.reshape(1)
    others = moved.shape[:-1]
    if others.numel() > MOST_TILES:
        raise CannotRewrite("a value of too many pieces for a kernel")
    for index in product(*map(range, others)):
        yield index, moved[index]


def one_row(arguments: Any, rows: int) -> Any:
    """A view's arguments, with 1 for the size of the batch."""
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(one_row(a, rows) for a in arguments)
    return 1 if type(arguments) is int and arguments == rows else arguments


def tile_places(tile: int, width: int) -> Tensor:
    """The places of all elements of a tile."""
    return torch.arange(width) + tile * COLUMNS
