"""Reductions of a kernel: along tiles, and over tiles."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CannotRewrite
from ..passes.linear_ops import op_name
from .step_operators import reduced_dimensions
from .step_program import ROWS
from .step_tiles import Tile, Value, lane_of
from .step_triton_operators import REDUCTIONS
from .step_triton_writer import Writer, rowless

Each = Callable[[str, tuple[int, ...]], str]
"""What is done to an element before: given its expression, and its index in the dimensions that are kept."""


def reduction(writer: Writer, node: Node) -> Value:
    """A sum, mean or extremum over some dimensions."""
    name = op_name(node)
    value, dims = _operand(writer, node)
    scale = f" * {1 / _count(value, dims)!r}" if name == "aten::mean" else ""
    return _reduce(writer, node, value, dims, name, scale)


def var_mean(writer: Writer, node: Node) -> list[Value]:
    """Variance and mean, in two passes over what is in registers."""
    value, dims = _operand(writer, node)
    size = _count(value, dims)
    correction: Any = node.kwargs.get("correction", 1)
    correction = 1 if correction is None else correction
    if lane_of([value], value.places.shape) not in dims:
        raise CannotRewrite(f"{node.target} over a dimension that is unrolled has no translation", node)
    var, mean = node.meta["val"]
    means = _reduce(writer, node, value, dims, "aten::mean", f" * {1 / size!r}", result=mean)
    kept = [d for d in range(value.places.dim()) if d not in dims]
    places = means.places.reshape([value.places.shape[d] for d in kept])

    def square(expression: str, index: tuple[int, ...]) -> str:
        of = writer.name_at(int(places[index]))
        return f"(({expression} - {of}) * ({expression} - {of}))"

    left = size - correction
    scale = f" * {1 / left!r}" if left > 0 else ' * float("nan")'
    return [_reduce(writer, node, value, dims, "aten::sum", scale, square, var), means]


def _operand(writer: Writer, node: Node) -> tuple[Value, list[int]]:
    """What is reduced, and the dimensions that this goes over."""
    source: Any = node.args[0]
    dims = reduced_dimensions(node, source.meta["val"].dim())
    if any(source.meta["val"].shape[d] == ROWS for d in dims):
        raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)
    if node.kwargs.get("dtype") not in (None, source.meta["val"].dtype):
        raise CannotRewrite(f"{node.target} converts what it sums", node)
    return writer.in_tiles(source), dims


def _count(value: Value, dims: Sequence[int]) -> int:
    size = math.prod(value.places.shape[d] for d in dims)
    if not size:
        raise CannotRewrite("a reduction of nothing")
    return size


def _reduce(
    writer: Writer,
    node: Node,
    value: Value,
    dims: Sequence[int],
    name: str,
    scale: str = "",
    each: Each = lambda expression, _: expression,
    result: Tensor | None = None,
) -> Value:
    """``each`` element, reduced over some dimensions, times a scale; ``result`` has the shape of that."""
    shape = value.places.shape
    lane = lane_of([value], shape)
    kept = [d for d in range(len(shape)) if d not in dims]
    places = torch.zeros([shape[d] for d in kept], dtype=torch.int64)
    if lane in kept:
        others = [d for d in kept if d != lane]
        lines, rows = places.movedim(kept.index(lane), -1), value.places.permute(*others, *dims, lane)
        reduce = functools.partial(_over_tiles, writer, node, value, name=name, scale=scale)
    else:
        lines, rows = places.unsqueeze(-1), value.places.permute(*kept, *(d for d in dims if d != lane), lane)
        reduce = functools.partial(_along_tiles, writer, node, value, name=name, scale=scale)
    for index in itertools.product(*map(range, lines.shape[:-1])):

        def here(expression: str, index: tuple[int, ...] = index) -> str:
            return each(expression, index)

        reduce(rows[index].reshape(-1, shape[lane]), lines[index], here)
    return Value(places.view(rowless(node if result is None else result)))


def _over_tiles(
    writer: Writer,
    node: Node,
    value: Value,
    lines: Tensor,
    out: Tensor,
    each: Callable[[str], str],
    *,
    name: str,
    scale: str,
) -> None:
    """Lines become one."""
    _, join, _, _ = REDUCTIONS[name]
    for start, pieces in writer.aligned([writer.runs(value, line) for line in lines], node):
        terms = [each(writer.operand(p, value)[0]) for p in pieces]
        made = writer.combined(f"({functools.reduce(join.format, terms)}){scale}", pieces)
        width = pieces[0].width
        out[start : start + width] = writer.tile(Tile(made, width, node, start))


def _along_tiles(
    writer: Writer,
    node: Node,
    value: Value,
    lines: Tensor,
    out: Tensor,
    each: Callable[[str], str],
    *,
    name: str,
    scale: str,
) -> None:
    """Lines become a single element."""
    neutral, join, along, repeated = REDUCTIONS[name]
    parts = []
    for run in (run for line in lines for run in writer.runs(value, line)):
        expression = each(writer.operand(run, value)[0])
        if run.step == 0:
            parts.append(repeated.format(expression, run.width))
            continue
        padded = writer.padded(run.width)
        if padded != run.width:
            expression = f"tl.where(c{padded} < {run.width}, {expression}, {neutral})"
        parts.append(along.format(expression, 0 if writer.shape.rows == 1 else 1))
    made = writer.assign(f"({functools.reduce(join.format, parts)}){scale}")
    out[:] = writer.tile(Tile(made, 1, node, 0))
