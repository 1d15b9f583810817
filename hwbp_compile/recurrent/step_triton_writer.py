"""What is written of a kernel so far, and how its values are named, loaded and stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .step_program import ROWS
from .step_tiles import (
    COLUMNS,
    Memory,
    Run,
    Tile,
    Value,
    aligned,
    checked,
    lane_of,
    lines_along,
    runs_of,
    tile_places,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kernel is laid out.

    Args:
        rows: of the batch, that a program takes. With one row, products are sums of products; with 16 or more
            they are left to the matrix units.
        widest: elements of a tile.
        hold: whether the weights stay in registers.
        wide: Triton's name of the type that is computed in.
        narrow: of the type that the matrix units are given.
        precision: Triton's name for what they do with float32.
        types: that numbers may be converted between, as all are computed in one.
    """

    rows: int
    widest: int
    hold: bool
    wide: str
    narrow: str
    precision: str
    types: frozenset[torch.dtype]


class Writer:
    """The statements of a kernel, and the values that a step's nodes have in it.

    Args:
        shape: the kernel's.
        cuts: per node, where its tiles have to end.
    """

    def __init__(self, shape: Shape, cuts: Mapping[Node, Set[int]]) -> None:
        self.shape, self._cuts = shape, defaultdict(set, cuts)
        self.before: list[str] = []
        """Statements before the first step."""
        self.ahead: list[str] = []
        """Statements of a step that load what the next one reads."""
        self.lines: list[str] = []
        """The other statements of a step."""
        self.last: list[str] = []
        """Statements that end a step: what was made becomes what the next one begins with."""
        self.after: list[str] = []
        """Statements after the last step."""
        self.values: dict[Node, Any] = {}
        """Per node its value, or a list of them."""
        self._tiles: list[Tile] = []
        self._names = 0
        self._once: dict[Any, str] = {}

    # Names and tiles

    def new_name(self, prefix: str = "v") -> str:
        """A variable that there is not yet."""
        self._names += 1
        return f"{prefix}_{self._names}"

    def assign(self, expression: str, prefix: str = "v") -> str:
        """A new variable of a step."""
        name = self.new_name(prefix)
        self.lines.append(f"{name} = {expression}")
        return name

    def once(self, key: Any) -> tuple[str, bool]:
        """The variable of a key, and whether it is new."""
        new = key not in self._once
        if new:
            self._once[key] = self.new_name(key[0])
        return self._once[key], new

    def tile(self, tile: Tile) -> Tensor:
        """The places of a new tile's elements."""
        self._tiles.append(tile)
        return tile_places(len(self._tiles) - 1, tile.width)

    def name_at(self, place: int) -> str:
        """The variable of the tile in which a place is."""
        return self._tiles[place // COLUMNS].name

    def padded(self, width: int) -> int:
        """The size of a tile of so many elements in Triton: a power of two, which matrix units can use."""
        power = 1 << (width - 1).bit_length()
        return power if width == 1 or self.shape.rows == 1 else max(power, 16)

    def spread(self, expression: str, width: int) -> str:
        """The expression as a tile of this width."""
        rows = f"{self.shape.rows}, " if self.shape.rows > 1 else ""
        return f"tl.broadcast_to({expression}, ({rows}{self.padded(width)},))"

    # Values in pieces

    def empty(self, shape: Sequence[int], operands: Sequence[Value]) -> tuple[int, Tensor]:
        """The dimension along which a result has its tiles, and room for its places."""
        return lane_of(operands, shape), torch.zeros(tuple(shape), dtype=torch.int64)

    def put(self, places: Tensor, lane: int, index: tuple[int, ...], tile: Tile) -> None:
        """Let a tile hold the elements of a line of a value from its start on."""
        moved = places.movedim(lane, -1) if places.dim() else places.view(1)
        moved[index][tile.start : tile.start + tile.width] = self.tile(tile)

    def runs(self, value: Value, line: Tensor) -> list[Run]:
        """A line of a value, taken apart into whole tiles or stretches of memory."""
        return [checked(run, self._tiles) for run in runs_of(value, line)]

    def aligned(
        self, lines: Sequence[list[Run]], node: Node | None = None
    ) -> Iterator[tuple[int, tuple[Run, ...]]]:
        """Pieces of equal width of several lines, to become tiles of a node, each with where it begins."""
        return aligned(lines, self._tiles, self.shape.widest, () if node is None else self._cuts[node])

    def operand(self, run: Run, value: Value) -> tuple[str, bool]:
        """An expression that broadcasts to a piece of a value, and whether it is a truth value."""
        if value.memory is not None:
            one = Run(1, None, run.first, 0) if run.step == 0 else run
            return self._from_memory(one, value.memory), False
        tile = self.tile_of(run)
        return tile.name, tile.is_bool

    def tile_of(self, run: Run) -> Tile:
        """The tile that a run takes, or repeats."""
        assert run.tile is not None
        return self._tiles[run.tile]

    def whole(self, run: Run) -> str:
        """An expression of the shape of a tile, for a run in tiles."""
        name = self.tile_of(run).name
        return self.spread(name, run.width) if run.step == 0 and run.width > 1 else name

    def combined(self, expression: str, pieces: Sequence[Run]) -> str:
        """A variable for what is computed of pieces: a whole tile, though each may repeat one element."""
        width = pieces[0].width
        repeated = width > 1 and all(run.step == 0 for run in pieces)
        return self.assign(self.spread(expression, width) if repeated else expression)

    def in_tiles(self, node: Node, value: Value | None = None) -> Value:
        """A node's value, loaded if it is in memory."""
        value = self.values[node] if value is None else value
        if value.memory is None:
            return value
        lane, found = self.empty(value.places.shape, [value])
        for index, line in lines_along(value.places, lane):
            for start, (run,) in self.aligned([runs_of(value, line)], node):
                name = self.assign(self.spread(self.operand(run, value)[0], run.width))
                self.put(found, lane, index, Tile(name, run.width, node, start))
        return Value(found)

    # Memory

    def mask(self, width: int, has_rows: bool) -> str:
        """The argument that keeps a load or store inside of its tensor; empty if it is."""
        padded = self.padded(width)
        masks = ["inside"] if has_rows and self.shape.rows > 1 else []
        masks += [f"(c{padded} < {width})"] if padded != width else []
        return f", {' & '.join(masks)}" if masks else ""

    def load(self, run: Run, memory: Memory) -> str:
        """An expression that reads a piece of a tensor."""
        address = f"p_{memory.name} + {run.first} + c{self.padded(run.width)} * {run.step}"
        mask = self.mask(run.width, memory.has_rows)
        return f"tl.load({address}{mask and mask + ', 0'}).to({self.shape.wide})"

    def _from_memory(self, run: Run, memory: Memory) -> str:
        """A tile that is loaded: for each step while the step before is computed, or before the first."""
        name, new = self.once(("m", run, memory))
        if new:
            self.before.append(f"{name} = {self.load(run, memory)}")
            if memory.per_step:
                self.ahead.append(f"n_{name} = {self.load(run, memory)}")
                self.last.append(f"{name} = n_{name}")
        return name

    def storing(self, name: str, target: str, first: int, step: int, width: int) -> str:
        """The statement that writes a tile to neighbouring elements of a row, ``step`` apart."""
        at = f"p_{target} + {first} + c{self.padded(width)} * {step}"
        return f"tl.store({at}, {name}.to({target}.dtype.element_ty){self.mask(width, True)})"

    def store(self, node: Node, target: str, lines: list[str]) -> None:
        """Write a node's value to where a step's, of one row, begins."""
        value, shape = self.in_tiles(node), rowless(node)
        places = value.places.expand(shape)
        to = torch.arange(places.numel()).view(shape)
        lane = lane_of([value], shape)
        for (_, line), (_, where) in zip(lines_along(places, lane), lines_along(to, lane), strict=True):
            position, step = int(where[0]), int(where[1] - where[0]) if len(where) > 1 else 1
            for run in self.runs(value, line):
                lines.append(self.storing(self.whole(run), target, position, step, run.width))
                position += run.width * step


def has_rows(node: Node) -> bool:
    """Whether a value differs between the rows of the batch."""
    return ROWS in node.meta["val"].shape


def rowless(node: Node | Tensor) -> tuple[int, ...]:
    """The shape of a value, for one row of the batch."""
    shape = node.shape if isinstance(node, Tensor) else node.meta["val"].shape
    return tuple(1 if n == ROWS else n for n in shape)
