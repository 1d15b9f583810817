"""Matrix products of a kernel: sums of products for one row of the batch, matrix units for many."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CannotRewrite
from .step_program import ROWS
from .step_tiles import Memory, Run, Tile, Value
from .step_triton_writer import Writer, has_rows, rowless


def product(writer: Writer, node: Node, a: Any, b: Any, bias: Any = None) -> Value:
    """``bias + a @ b`` for a value with rows and a weight: ``[rows, K] @ [K, N]``, or the transposed."""
    x, weight = writer.values[a], writer.values[b]
    transposed = not has_rows(a)
    if transposed:
        x, weight = _transposed(weight), _transposed(x)
    if weight.memory is None or weight.memory.per_step or weight.memory.has_rows:
        raise CannotRewrite(f"{node.target} of two values that both differ between the rows or steps", node)
    if (b if transposed else a).meta["val"].shape[-1 if transposed else -2] != ROWS:
        raise CannotRewrite(f"{node.target} of two values that both differ between the rows", node)
    result = Value(torch.zeros(rowless(node), dtype=torch.int64))
    added = None
    if bias is not None:
        value = writer.values[bias]
        added = value.view(value.places.expand(rowless(node)))
    if transposed:
        result, added = _transposed(result), None if added is None else _transposed(added)
    several = [_matrices(v) for v in (result, x, weight, *([] if added is None else [added]))]
    for out, of_x, w, *start in zip(*several, strict=True):
        lines = [[Run(out.shape[-1], None, 0, 0)], *(writer.runs(added, s[0]) for s in start if added)]
        for first, pieces in writer.aligned(lines, node):
            width = pieces[0].width
            plus = writer.operand(pieces[1], added)[0] if added is not None else ""
            columns = w[:, first : first + width]
            name = _multiply(writer, writer.runs(x, of_x[0]), x, columns, weight.memory, plus)
            out[0][first : first + width] = writer.tile(Tile(name, width, node, first))
    return _transposed(result) if transposed else result


def _transposed(value: Value) -> Value:
    return value.view(value.places.mT)


def _matrices(value: Value) -> list[Tensor]:
    """Views of the places, a matrix each."""
    return list(value.places) if value.places.dim() == 3 else [value.places]


def _multiply(writer: Writer, line: list[Run], x: Value, weight: Tensor, memory: Memory, plus: str) -> str:
    """The variable of a line's product with some columns of a weight."""
    shape = writer.shape
    factors: list[tuple[str, Tensor]] = []
    position = 0
    for _, (run,) in writer.aligned([line]):
        if run.step == 0 and run.width > 1:
            raise CannotRewrite("a product with a value that is the same in a whole row has no translation")
        expression, _ = writer.operand(run, x)
        factors.append((_column(writer, expression, run.width), weight[position : position + run.width]))
        position += run.width
    if shape.rows == 1:
        name = writer.new_name()
        terms: dict[int, list[str]] = defaultdict(list)
        for column, part in factors:
            terms[_padded_inner(writer, len(part))].append(f"{column} * {_weight(writer, part, memory)}")
        total = [f"tl.sum({' + '.join(each)}, 0)" for each in terms.values()]
        writer.lines.append(f"{name} = {' + '.join([*total, *([plus] if plus else [])])}")
        return name
    columns = writer.padded(weight.shape[1])
    if columns == 1:
        raise CannotRewrite("a product with a single column has no translation")
    start = f"tl.zeros(({shape.rows}, {columns}), tl.float32)"
    name = writer.assign(" + ".join([start, *([plus] if plus else [])]))
    for column, part in factors:
        w = _weight(writer, part, memory)
        writer.lines.append(f"{name} = tl.dot({column}, {w}, {name}, input_precision='{shape.precision}')")
    return name


def _padded_inner(writer: Writer, width: int) -> int:
    """The size in Triton of the dimension that a product sums over."""
    return writer.padded(width) if width > 1 else (1 if writer.shape.rows == 1 else 16)


def _column(writer: Writer, expression: str, width: int) -> str:
    """A tile as the left factor of a product; past its end are zeros, whatever was computed there."""
    name, new = writer.once(("k", expression, width))
    if new:
        padded, rows = writer.padded(width), writer.shape.rows
        clean = expression if padded == width else f"tl.where(c{padded} < {width}, {expression}, 0.0)"
        if rows == 1:
            writer.lines.append(f"{name} = ({clean})[:, None]")
        else:
            if padded == 1:
                clean = f"tl.where(c16 < 1, tl.broadcast_to({clean}, ({rows}, 16)), 0.0)"
            writer.lines.append(f"{name} = ({clean}).to({writer.shape.narrow})")
    return name


def _weight(writer: Writer, places: Tensor, memory: Memory) -> str:
    """A weight's tile ``[K, N]``, padded with zeros."""
    rows, columns = places.shape
    first = int(places[0, 0])
    down = int(places[1, 0]) - first if rows > 1 else 0
    right = int(places[0, 1]) - first if columns > 1 else 0
    expected = first + torch.arange(rows)[:, None] * down + torch.arange(columns) * right
    if not torch.equal(expected, places):
        raise CannotRewrite("a weight that is put together in a kernel has no translation")
    height, width = _padded_inner(writer, rows), writer.padded(columns)
    masks = [f"(tl.arange(0, {height})[:, None] < {rows})"] if height != rows else []
    masks += [f"(tl.arange(0, {width})[None, :] < {columns})"] if width != columns else []
    masked = f", {' & '.join(masks)}, 0" if masks else ""
    at = f"tl.arange(0, {height})[:, None] * {down} + tl.arange(0, {width})[None, :] * {right}"
    kind = writer.shape.wide if writer.shape.rows == 1 else writer.shape.narrow
    load = f"tl.load(p_{memory.name} + {first} + {at}{masked}).to({kind})"
    if not writer.shape.hold:
        # One after the other: all loaded at once are more than there are registers.
        writer.lines.append("tl.debug_barrier()")
        return writer.assign(load, "w")
    name, new = writer.once(("w", memory, first, down, right, rows, columns))
    if new:
        writer.before.append(f"{name} = {load}")
    return name
