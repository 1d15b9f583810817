"""Triton for a whole recurrence, written from the graph of one step.

Each program takes a few rows of the batch through all steps. States stay in registers, and so do the weights
if they are few. What the next step reads is loaded while a step is computed.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CannotRewrite
from ..passes.linear_ops import op_name
from .step_operators import RESHAPES, VIEWS
from .step_program import ROWS, StepProgram
from .step_tiles import (
    Memory,
    NeedsCut,
    Run,
    Tile,
    Value,
    aligned,
    checked,
    lane_of,
    lines_along,
    one_row,
    runs_of,
    tile_places,
)
from .step_triton_operators import LIBRARY, POINTWISE, REDUCTIONS, TRUTH, constant

_MOST_CUTS = 200


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
    """

    rows: int
    widest: int
    hold: bool
    wide: str
    narrow: str
    precision: str


def recurrence_source(program: StepProgram, shape: Shape, *, reverse: bool) -> str:
    """A module with the function ``kernel``.

    Its arguments: the inputs, what the steps share (matrices column by column), the initial states, then
    where to write the states (all, the initial one first, or the last ones) and what is emitted; the number
    of steps, of rows, and a zero of which the compiler knows nothing. What there is for each step is given
    from the first step to be run on.

    Raises:
        CannotRewrite: the step does something that is not written here, or mixes the rows of the batch.
    """
    cuts: dict[Node, set[int]] = defaultdict(set)
    for _ in range(_MOST_CUTS):
        try:
            return _Source(program, shape, reverse, cuts).text
        except NeedsCut as needed:
            if needed.place in cuts[needed.node]:
                break
            cuts[needed.node].add(needed.place)
    raise CannotRewrite("the step takes its values apart in too many ways for a kernel")


_ROW = ["row = tl.program_id(0)"]
_ROWS = ["row = (tl.program_id(0) * {0} + tl.arange(0, {0}))[:, None]", "inside = row < batch"]


class _Source:
    def __init__(self, program: StepProgram, shape: Shape, reverse: bool, cuts: dict[Node, set[int]]) -> None:
        self._program, self._shape, self._cuts = program, shape, cuts
        self._tiles: list[Tile] = []
        self._names = 0
        self._before: list[str] = []
        self._next: list[str] = []
        self._lines: list[str] = []
        self._after: list[str] = []
        self._last: list[str] = []
        self._loaded: dict[tuple[Any, ...], str] = {}
        self._values: dict[Node, Any] = {}
        self._step = "-" if reverse else "+"
        following, emitted, _ = program.results
        for prefix, nodes, per_step in (("x", program.inputs, True), ("s", program.shared, False)):
            for i, node in enumerate(nodes):
                self._values[node] = self._placed(node, Memory(f"{prefix}{i}", _has_rows(node), per_step))
        if any(program.shape(n)[:1] != (ROWS,) for n in program.carry):
            raise CannotRewrite("the batch is not the first dimension of the state")
        for i, node in enumerate(program.carry):
            self._values[node] = self._state(node, i)
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._check(node)
                self._write(node)
        for i, node in enumerate(emitted):
            self._store(node, f"e{i}", self._lines)
        for i, (node, state) in enumerate(zip(following, program.carry, strict=True)):
            self._follow(node, state)
            if program.keep:
                self._store(node, f"y{i}", self._lines)
            else:
                self._store(state, f"y{i}", self._after)

    # The whole

    @property
    def text(self) -> str:
        """The module."""
        program, rows = self._program, self._shape.rows
        inputs = [f"x{i}" for i in range(len(program.inputs))]
        states = [f"y{i}" for i in range(len(program.carry))]
        emitted = [f"e{i}" for i in range(len(program.emitted))]
        shared = [f"s{i}" for i in range(len(program.shared))]
        initial = [f"h{i}" for i in range(len(program.carry))]
        sizes = {
            name: _row_size(program.shape(node))
            for names, nodes in (
                (inputs, program.inputs),
                (shared, program.shared),
                (initial, program.carry),
                (states, program.carry),
                (emitted, program.results[1]),
            )
            for name, node in zip(names, nodes, strict=True)
        }
        batched = [n for n, node in zip(shared, program.shared, strict=True) if _has_rows(node)]
        batched += [n for n, node in zip(inputs, program.inputs, strict=True) if _has_rows(node)]
        batched += [*initial, *states, *emitted]
        steps = [*inputs, *emitted, *(states if program.keep else ())]
        across = "" if rows == 1 else "[None, :]"
        lines = [
            *(line.format(rows) for line in (_ROW if rows == 1 else _ROWS)),
            *(f"p_{n} = {n} + row * {sizes[n]}" for n in batched),
            *(f"p_{n} = {n}" for n in (*shared, *inputs) if n not in batched),
            *(f"c{w} = tl.arange(0, {w}){across}" for w in _powers(self._shape.widest)),
            *self._before,
            "for step in range(steps):",
        ]
        size = {n: f"batch * {sizes[n]}" if n in batched else str(sizes[n]) for n in steps}
        # In the last step, that step's own inputs are loaded once more.
        body = ["ahead = (step + 1 < steps).to(tl.int32)"]
        body += [f"p_{n} {self._step}= ahead * ({size[n]})" for n in inputs]
        body += [f"p_{n} {self._step}= {size[n]}" for n in (states if program.keep else ())]
        if not self._shape.hold:
            body += [f"p_{n} += still" for n in shared]
        body += [*self._next, *self._lines]
        body += [*self._last, *(f"p_{n} {self._step}= {size[n]}" for n in emitted)]
        lines += [f"    {line}" for line in body]
        lines += self._after
        names = [*inputs, *shared, *initial, *states, *emitted, "steps", "batch", "still"]
        function = "\n".join(f"    {line}" for line in lines)
        never = 'do_not_specialize=["steps", "batch", "still"]'
        return f"{LIBRARY}\n\n@triton.jit({never})\ndef kernel({', '.join(names)}):\n{function}\n"

    def _placed(self, node: Node, memory: Memory) -> Value:
        """A tensor in memory: the batch first, else without gaps, matrices column by column."""
        where = self._program.shape(node)
        shape = [n for n in where if n != ROWS]
        places = torch.arange(math.prod(shape))
        if is_matrix(where) and node in self._program.shared:
            return Value(places.view(*shape[:-2], shape[-1], shape[-2]).mT, memory)
        places = places.view(shape)
        return Value(places.unsqueeze(where.index(ROWS)) if ROWS in where else places, memory)

    def _state(self, node: Node, number: int) -> Value:
        """The state that a step begins with: loaded before the first, then what the last one made."""
        places = self._placed(node, Memory(f"h{number}", True, False))
        lane, found = self._empty(places.places.shape, [places])
        for index, line in lines_along(places.places, lane):
            runs = runs_of(places, line)
            for start, (run,) in self._aligned([runs], node):
                name = self._new_name("h")
                self._before.append(f"{name} = {self._load(run, Memory(f'h{number}', True, False))}")
                if self._program.keep:
                    self._before.append(self._storing(name, f"y{number}", run.first, run.step, run.width))
                self._put(found, lane, index, Tile(name, run.width, node, start))
        return Value(found)

    def _follow(self, node: Node, state: Node) -> None:
        """Make what a step returned the state of the next one."""
        made, before = self._in_tiles(self._values[node], state), self._values[state]
        made = made.view(made.places.expand(before.places.shape))
        lane = lane_of([before], before.places.shape)
        for (_, new), (_, old) in zip(
            lines_along(made.places, lane), lines_along(before.places, lane), strict=True
        ):
            lines = [self._runs(made, new), self._runs(before, old)]
            for _, (a, b) in aligned(lines, self._tiles, self._shape.widest):
                old_name, width = self._tiles[_tile(b)].name, b.width
                # All are read before the first is overwritten.
                self._lines.append(f"n_{old_name} = {self._spread(self._tile_of(a), width)}")
                self._last.append(f"{old_name} = n_{old_name}")

    def _store(self, node: Node, target: str, lines: list[str]) -> None:
        """Write a value to where a step's, of one row, begins."""
        value = self._in_tiles(self._values[node], node)
        shape = tuple(1 if n == ROWS else n for n in node.meta["val"].shape)
        places = value.places.expand(shape)
        to = torch.arange(places.numel()).view(shape)
        lane = lane_of([value], shape)
        for (_, line), (_, where) in zip(lines_along(places, lane), lines_along(to, lane), strict=True):
            position, step = int(where[0]), int(where[1] - where[0]) if len(where) > 1 else 1
            for run in runs_of(value, line):
                good = checked(run, self._tiles)
                lines.append(self._storing(self._tile_of(good), target, position, step, run.width))
                position += run.width * step

    def _storing(self, name: str, target: str, first: int, step: int, width: int) -> str:
        padded = self._padded(width)
        at = f"p_{target} + {first} + c{padded} * {step}"
        return f"tl.store({at}, {name}.to({target}.dtype.element_ty){self._mask(width, True)})"

    def _mask(self, width: int, has_rows: bool) -> str:
        padded = self._padded(width)
        masks = ["inside"] if has_rows and self._shape.rows > 1 else []
        masks += [f"(c{padded} < {width})"] if padded != width else []
        return f", {' & '.join(masks)}" if masks else ""

    # Values

    def _padded(self, width: int) -> int:
        power = 1 << (width - 1).bit_length()
        return power if width == 1 or self._shape.rows == 1 else max(power, 16)

    def _new_name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}_{self._names}"

    def _empty(self, shape: Sequence[int], operands: Sequence[Value]) -> tuple[int, Tensor]:
        return lane_of(operands, shape), torch.zeros(tuple(shape), dtype=torch.int64)

    def _put(self, places: Tensor, lane: int, index: tuple[int, ...], tile: Tile) -> None:
        """Let a tile hold the elements of a line of a value from its start on."""
        self._tiles.append(tile)
        moved = places.movedim(lane, -1) if places.dim() else places.view(1)
        moved[index][tile.start : tile.start + tile.width] = tile_places(len(self._tiles) - 1, tile.width)

    def _load(self, run: Run, memory: Memory) -> str:
        address = f"p_{memory.name} + {run.first} + c{self._padded(run.width)} * {run.step}"
        mask = self._mask(run.width, memory.has_rows)
        return f"tl.load({address}{mask and mask + ', 0'}).to({self._shape.wide})"

    def _from_memory(self, run: Run, memory: Memory) -> str:
        """A tile that is loaded: for each step while the step before is computed, or before the first."""
        key = (run, memory)
        if key not in self._loaded:
            name = self._loaded[key] = self._new_name("m")
            self._before.append(f"{name} = {self._load(run, memory)}")
            if memory.per_step:
                self._next.append(f"n_{name} = {self._load(run, memory)}")
                self._last.append(f"{name} = n_{name}")
        return self._loaded[key]

    def _tile_of(self, run: Run) -> str:
        assert run.tile is not None
        name = self._tiles[run.tile].name
        if run.step == 0 and run.width > 1:
            return self._spread(name, run.width)
        return name

    def _operand(self, run: Run, value: Value) -> tuple[str, bool]:
        """An expression that broadcasts to a piece of a value, and whether it is a truth value."""
        if value.memory is not None:
            one = Run(1, None, run.first, 0) if run.step == 0 else run
            return self._from_memory(one, value.memory), False
        assert run.tile is not None
        tile = self._tiles[run.tile]
        return tile.name, tile.is_bool

    def _aligned(self, lines: Sequence[list[Run]], node: Node) -> Iterator[tuple[int, tuple[Run, ...]]]:
        return aligned(lines, self._tiles, self._shape.widest, self._cuts[node])

    def _runs(self, value: Value, line: Tensor) -> list[Run]:
        return [checked(run, self._tiles) for run in runs_of(value, line)]

    def _in_tiles(self, value: Value, node: Node) -> Value:
        """The value, loaded if it is in memory."""
        if value.memory is None:
            return value
        lane, found = self._empty(value.places.shape, [value])
        for index, line in lines_along(value.places, lane):
            for start, (run,) in self._aligned([runs_of(value, line)], node):
                name = self._new_name("v")
                self._lines.append(f"{name} = {self._spread(self._operand(run, value)[0], run.width)}")
                self._put(found, lane, index, Tile(name, run.width, node, start))
        return Value(found)

    def _spread(self, expression: str, width: int) -> str:
        rows = f"{self._shape.rows}, " if self._shape.rows > 1 else ""
        return f"tl.broadcast_to({expression}, ({rows}{self._padded(width)},))"

    # Operators

    def _check(self, node: Node) -> None:
        values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
        for value in values:
            if not isinstance(value, Tensor):
                raise CannotRewrite(f"{node.target} makes no tensor", node)
            # The choice between two constants is one of integers in some of torch's formulas.
            chosen = op_name(node) == "aten::where" and value.dtype in (torch.int64, torch.int32)
            if not (chosen or value.is_floating_point() or value.dtype == torch.bool):
                raise CannotRewrite(f"{node.target} makes values of another type", node)
            merged = any(size != ROWS and size % ROWS == 0 and size for size in value.shape)
            if merged or sum(size == ROWS for size in value.shape) > 1:
                raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)

    def _write(self, node: Node) -> None:
        name = op_name(node)
        if node.target is operator.getitem:
            self._values[node] = self._values[node.args[0]][node.args[1]]  # type: ignore[index]
        elif name in VIEWS:
            self._values[node] = self._view(node)
        elif name in POINTWISE:
            self._values[node] = self._pointwise(node, name)
        elif name in REDUCTIONS:
            (source, dims) = self._reduced(node)
            size = self._count(source, dims)
            scale = f" * {1 / size!r}" if name == "aten::mean" else ""
            self._values[node] = self._reduce(node, source, dims, REDUCTIONS[name], scale)
        elif name == "aten::var_mean":
            self._values[node] = self._var_mean(node)
        elif name in ("aten::mm", "aten::bmm"):
            self._values[node] = self._product(node, node.args[0], node.args[1], None)
        elif name in ("aten::addmm", "aten::baddbmm") and not node.kwargs:
            self._values[node] = self._product(node, node.args[1], node.args[2], node.args[0])
        elif name == "aten::cat":
            self._values[node] = self._cat(node)
        else:
            raise CannotRewrite(f"{node.target} has no translation into a kernel", node)

    def _view(self, node: Node) -> Any:
        source: Any = node.args[0]
        value = self._values[source]
        if op_name(node) in ("prims::convert_element_type", "aten::_to_copy"):
            target = node.meta["val"].dtype
            if source.meta["val"].dtype == torch.bool and target != torch.bool:
                return self._elementwise(node, [value], lambda x: f"({x}).to({self._shape.wide})", False)
            return value
        view: Any = torch.ops.aten.reshape.default if op_name(node) in RESHAPES else node.target
        if op_name(node) in ("aten::clone", "aten::contiguous", "aten::detach", "aten::alias"):
            return value
        try:
            found = view(value.places, *one_row(node.args[1:], ROWS), **node.kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CannotRewrite(f"{node.target} mixes the rows of the batch", node) from error
        results = node.meta["val"] if isinstance(found, (tuple, list)) else [node.meta["val"]]
        several = found if isinstance(found, (tuple, list)) else [found]
        for part, result in zip(several, results, strict=True):
            if tuple(part.shape) != tuple(1 if n == ROWS else n for n in result.shape):
                raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)
        parts = [value.view(part) for part in several]
        return parts if isinstance(found, (tuple, list)) else parts[0]

    def _pointwise(self, node: Node, name: str) -> Value:
        write, returns_bool = POINTWISE[name], name in TRUTH
        nodes = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)]
        order = {n: i for i, n in enumerate(dict.fromkeys(nodes))}

        def formula(*names: str) -> str:
            def given(a: Any) -> Any:
                return names[order[a]] if isinstance(a, Node) else constant(a)

            args = [given(a) for a in node.args]
            return write(
                *args, **{k: v if not isinstance(v, Node) else given(v) for k, v in node.kwargs.items()}
            )

        if name == "aten::where" and node.meta["val"].dtype == torch.bool:
            raise CannotRewrite(f"{node.target} chooses between truth values", node)
        is_bool = returns_bool or node.meta["val"].dtype == torch.bool
        return self._elementwise(node, [self._values[n] for n in order], formula, is_bool)

    def _elementwise(self, node: Node, values: Sequence[Value], formula: Any, is_bool: bool) -> Value:
        shape = tuple(1 if n == ROWS else n for n in node.meta["val"].shape)
        lane, found = self._empty(shape, values)
        spread = [v.places.expand(shape) for v in values]
        lines = [list(lines_along(p, lane)) for p in spread]
        for several in zip(*lines, strict=True):
            index = several[0][0]
            runs = [self._runs(v, line) for v, (_, line) in zip(values, several, strict=True)]
            if all(len(r) == 1 and r[0].step == 0 for r in runs) and shape and shape[lane] > 1:
                # Constant along the lane: one element stands for all.
                tile = self._computed(node, values, [r[0].part(0, 1) for r in runs], formula, 0, is_bool)
                self._tiles.append(replace(tile, width=1))
                moved = found.movedim(lane, -1)
                moved[index][:] = tile_places(len(self._tiles) - 1, 1)
                continue
            for start, pieces in self._aligned(runs, node):
                self._put(found, lane, index, self._computed(node, values, pieces, formula, start, is_bool))
        return Value(found)

    def _computed(
        self,
        node: Node,
        values: Sequence[Value],
        pieces: Sequence[Run],
        formula: Any,
        start: int,
        is_bool: bool,
    ) -> Tile:
        name = self._new_name("v")
        names = []
        for value, run, operand in zip(values, pieces, self._tensor_operands(node), strict=True):
            expression, truth = self._operand(run, value)
            if operand is not None and operand.meta["val"].dtype == torch.bool and not truth:
                expression = f"({expression} != 0)"
            names.append(expression)
        self._lines.append(f"{name} = {formula(*names)}")
        if all(run.step == 0 and run.width > 1 for run in pieces):
            self._lines[-1] = f"{name} = {self._spread(formula(*names), pieces[0].width)}"
        return Tile(name, pieces[0].width, node, start, is_bool)

    @staticmethod
    def _tensor_operands(node: Node) -> list[Node]:
        return list(dict.fromkeys(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)))

    # Reductions

    def _reduced(self, node: Node) -> tuple[Value, list[int]]:
        source: Any = node.args[0]
        value, rank = self._in_tiles(self._values[source], source), source.meta["val"].dim()
        given: Any = node.args[1] if len(node.args) > 1 else None
        if given is None or given == []:
            given = list(range(rank))
        dims = [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]
        if any(source.meta["val"].shape[d] == ROWS for d in dims):
            raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)
        return value, dims

    @staticmethod
    def _count(value: Value, dims: Sequence[int]) -> int:
        size = math.prod(value.places.shape[d] for d in dims)
        if not size:
            raise CannotRewrite("a reduction of nothing")
        return size

    def _reduce(
        self,
        node: Node,
        value: Value,
        dims: Sequence[int],
        how: tuple[str, str, str, str],
        scale: str = "",
        each: Any = None,
        meta: Tensor | None = None,
    ) -> Value:
        """``each`` element of the value, reduced over some dimensions."""
        neutral, join, along, repeated = how
        shape = value.places.shape
        lane = lane_of([value], shape)
        kept = [d for d in range(len(shape)) if d not in dims]
        result = torch.zeros([shape[d] for d in kept], dtype=torch.int64)
        moved = value.places.permute(*kept, *dims)
        across = lane in kept
        out_lane = kept.index(lane) if across else 0
        lines = result.movedim(out_lane, -1) if across else result.unsqueeze(-1)
        source = moved.movedim(out_lane, len(kept) - 1) if across else moved
        for index in product(*map(range, lines.shape[:-1])):
            here = source[index]
            if across:
                rows = [self._runs(value, line) for line in here.reshape(here.shape[0], -1).t()]
                for start, pieces in self._aligned(rows, node):
                    terms = [self._each(each, self._operand(p, value)[0], index) for p in pieces]
                    name = self._new_name("v")
                    joined = functools.reduce(lambda a, b: join.format(a, b), terms)
                    self._lines.append(f"{name} = ({joined}){scale}")
                    tile = Tile(name, pieces[0].width, node, start)
                    self._tiles.append(tile)
                    places = tile_places(len(self._tiles) - 1, tile.width)
                    lines[index][start : start + tile.width] = places
                continue
            order = [d for d in dims if d != lane]
            by_lane = here.permute(*[list(dims).index(d) for d in (*order, lane)])
            parts = []
            for line in by_lane.reshape(-1, by_lane.shape[-1]):
                for run in self._runs(value, line):
                    expression = self._each(each, self._operand(run, value)[0], index)
                    if run.step == 0:
                        parts.append(repeated.format(expression, run.width))
                        continue
                    if self._padded(run.width) != run.width:
                        columns = f"c{self._padded(run.width)} < {run.width}"
                        expression = f"tl.where({columns}, {expression}, {neutral})"
                    parts.append(along.format(expression, 0 if self._shape.rows == 1 else 1))
            name = self._new_name("v")
            self._lines.append(f"{name} = ({functools.reduce(lambda a, b: join.format(a, b), parts)}){scale}")
            self._tiles.append(Tile(name, 1, node, 0))
            lines[index][:] = tile_places(len(self._tiles) - 1, 1)
        shape = (node.meta["val"] if meta is None else meta).shape
        return Value(result.view([1 if n == ROWS else n for n in shape]))

    @staticmethod
    def _each(each: Any, expression: str, index: tuple[int, ...]) -> str:
        return expression if each is None else str(each(expression, index))

    def _var_mean(self, node: Node) -> list[Value]:
        value, dims = self._reduced(node)
        size = self._count(value, dims)
        correction: Any = node.kwargs.get("correction", 1)
        if lane_of([value], value.places.shape) not in dims:
            raise CannotRewrite(f"{node.target} over a dimension that is unrolled has no translation", node)
        meta = node.meta["val"]
        mean = self._reduce(node, value, dims, REDUCTIONS["aten::mean"], f" * {1 / size!r}", meta=meta[1])
        kept = [d for d in range(value.places.dim()) if d not in dims]
        flat = mean.places.reshape([value.places.shape[d] for d in kept])

        def square(expression: str, index: tuple[int, ...]) -> str:
            of = self._tiles[int(flat[index]) // (1 << 20)].name
            return f"(({expression} - {of}) * ({expression} - {of}))"

        left = size - correction
        scale = f" * {1 / left!r}" if left > 0 else ' * float("nan")'
        var = self._reduce(node, value, dims, REDUCTIONS["aten::sum"], scale, square, meta[0])
        return [var, mean]

    def _cat(self, node: Node) -> Value:
        parts: Any = node.args[0]
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if node.meta["val"].shape[dim] == ROWS or any(p.meta["val"].dtype == torch.bool for p in parts):
            raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)
        shape = [1 if n == ROWS else n for n in node.meta["val"].shape]
        dim %= len(shape)
        values = []
        for part in parts:
            places = self._in_tiles(self._values[part], part).places
            size = [*shape]
            size[dim] = places.shape[dim]
            values.append(places.expand(size))
        return Value(torch.cat(values, dim))

    # Products

    def _product(self, node: Node, a: Any, b: Any, bias: Any) -> Value:
        """``a @ b`` for a value with rows and a weight: ``[rows, K] @ [K, N]``, or the transposed."""
        x, weight = self._values[a], self._values[b]
        transposed = not _has_rows(a)
        if transposed:
            x, weight = weight, x
            x, weight = x.view(x.places.transpose(-1, -2)), weight.view(weight.places.transpose(-1, -2))
        rows = b if transposed else a
        if weight.memory is None or weight.memory.per_step or weight.memory.has_rows:
            raise CannotRewrite(
                f"{node.target} of two values that both differ between the rows or steps", node
            )
        if rows.meta["val"].shape[-1 if transposed else -2] != ROWS:
            raise CannotRewrite(f"{node.target} of two values that both differ between the rows", node)
        shape = [1 if n == ROWS else n for n in node.meta["val"].shape]
        if transposed:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        found = torch.zeros(shape, dtype=torch.int64)
        many = len(shape) == 3
        width = shape[-1]
        added = None
        if bias is not None:
            value = self._values[bias]
            places = value.places.expand([1 if n == ROWS else n for n in node.meta["val"].shape])
            added = value.view(places.transpose(-1, -2) if transposed else places)
        for m in range(shape[0] if many else 1):
            x_line = (x.places[m] if many else x.places)[0]
            w = weight.places[m] if many else weight.places
            out = (found[m] if many else found)[0]
            bias_runs: list[list[Run]] = []
            if added is not None:
                bias_runs = [self._runs(added, (added.places[m] if many else added.places)[0])]
            whole = [Run(width, None, 0, 0)]
            for start, pieces in self._aligned([whole, *bias_runs], node):
                size = pieces[0].width
                plus = self._operand(pieces[1], added)[0] if added is not None else ""
                name = self._multiply(x, x_line, w[:, start : start + size], weight.memory, plus)
                self._tiles.append(Tile(name, size, node, start))
                out[start : start + size] = tile_places(len(self._tiles) - 1, size)
        return Value(found.transpose(-1, -2) if transposed else found)

    def _multiply(self, x: Value, line: Tensor, weight: Tensor, memory: Memory, plus: str) -> str:
        """The variable of a line's product with some columns of a weight."""
        factors: list[tuple[int, str, Tensor]] = []
        position = 0
        for _, (run,) in aligned([self._runs(x, line)], self._tiles, self._shape.widest):
            if x.memory is None and run.step == 0 and run.width > 1:
                raise CannotRewrite(
                    "a product with a value that is the same in a whole row has no translation"
                )
            expression, _ = self._operand(run, x)
            part = weight[position : position + run.width]
            factors.append((self._padded_inner(run.width), self._column(expression, run.width), part))
            position += run.width
        name = self._new_name("v")
        if self._shape.rows == 1:
            terms: dict[int, list[str]] = defaultdict(list)
            for padded, column, part in factors:
                terms[padded].append(f"{column} * {self._weight(part, memory)}")
            total = [f"tl.sum({' + '.join(each)}, 0)" for each in terms.values()]
            self._lines.append(f"{name} = {' + '.join([*total, *([plus] if plus else [])])}")
            return name
        columns = self._padded(weight.shape[1])
        if columns == 1:
            raise CannotRewrite("a product with a single column has no translation")
        start = f"tl.zeros(({self._shape.rows}, {columns}), tl.float32)"
        self._lines.append(f"{name} = {' + '.join([start, *([plus] if plus else [])])}")
        for _, column, part in factors:
            w = self._weight(part, memory)
            self._lines.append(
                f"{name} = tl.dot({column}, {w}, {name}, input_precision='{self._shape.precision}')"
            )
        return name

    def _padded_inner(self, width: int) -> int:
        power = 1 << (width - 1).bit_length()
        return power if self._shape.rows == 1 else max(power, 16)

    def _column(self, expression: str, width: int) -> str:
        """A tile as the left factor of a product; past its end are zeros, whatever was computed there."""
        key = ("column", expression, width)
        if key not in self._loaded:
            name = self._loaded[key] = self._new_name("k")
            padded = self._padded(width)
            clean = expression if padded == width else f"tl.where(c{padded} < {width}, {expression}, 0.0)"
            if self._shape.rows == 1:
                self._lines.append(f"{name} = ({clean})[:, None]")
            else:
                if padded == 1:
                    clean = f"tl.where(c16 < 1, tl.broadcast_to({clean}, ({self._shape.rows}, 16)), 0.0)"
                self._lines.append(f"{name} = ({clean}).to({self._shape.narrow})")
        return self._loaded[key]

    def _weight(self, places: Tensor, memory: Memory) -> str:
        """A weight's tile ``[K, N]``, padded with zeros."""
        rows, columns = places.shape
        first = int(places[0, 0])
        down = int(places[1, 0]) - first if rows > 1 else 0
        right = int(places[0, 1]) - first if columns > 1 else 0
        expected = first + torch.arange(rows)[:, None] * down + torch.arange(columns) * right
        if not torch.equal(expected, places):
            raise CannotRewrite("a weight that is put together in a kernel has no translation")
        key = (memory, first, down, right, rows, columns)
        if self._shape.hold and key in self._loaded:
            return self._loaded[key]
        height, width = self._padded_inner(rows), self._padded(columns)
        masks = [f"(tl.arange(0, {height})[:, None] < {rows})"] if height != rows else []
        masks += [f"(tl.arange(0, {width})[None, :] < {columns})"] if width != columns else []
        masked = f", {' & '.join(masks)}, 0" if masks else ""
        at = f"tl.arange(0, {height})[:, None] * {down} + tl.arange(0, {width})[None, :] * {right}"
        address = f"p_{memory.name} + {first} + {at}"
        kind = self._shape.wide if self._shape.rows == 1 else self._shape.narrow
        name = self._new_name("w")
        line = f"{name} = tl.load({address}{masked}).to({kind})"
        if self._shape.hold:
            self._loaded[key] = name
            self._before.append(line)
        else:
            # One after the other: all loaded at once are more than there are registers.
            self._lines += ["tl.debug_barrier()", line]
        return name


def _tile(run: Run) -> int:
    assert run.tile is not None
    return run.tile


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether what all steps share is read column by column: its products are then summed within threads."""
    return len(shape) > 1 and ROWS not in shape


def _has_rows(node: Node) -> bool:
    return ROWS in node.meta["val"].shape


def _row_size(shape: Sequence[int]) -> int:
    return math.prod(n for n in shape if n != ROWS)


def _powers(widest: int) -> list[int]:
    return [1 << i for i in range(widest.bit_length())]
