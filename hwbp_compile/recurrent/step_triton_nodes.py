"""The operators of a step in a kernel: views, and elementwise operators on tiles."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CannotRewrite
from ..passes.linear_ops import op_name
from .step_operators import COPIES, RESHAPES, VIEWS
from .step_program import ROWS, check_rows
from .step_tiles import Run, Tile, Value, lines_along, one_row
from .step_triton_operators import LOGICAL, POINTWISE, REDUCTIONS, TRUTH, constant
from .step_triton_products import product
from .step_triton_reductions import reduction, var_mean
from .step_triton_writer import Writer, has_rows, rowless


def write(writer: Writer, node: Node) -> Any:
    """Write a node; returns its value, or several.

    Raises:
        CannotRewrite: it has no translation, or mixes the rows of the batch.
        NeedsCut: a value has to be made anew, in other tiles.
    """
    _check(node)
    name = op_name(node)
    if node.target is operator.getitem:
        return writer.values[node.args[0]][node.args[1]]  # type: ignore[index]
    if name in VIEWS:
        return _view(writer, node)
    if name in POINTWISE:
        return _pointwise(writer, node, name)
    if name in REDUCTIONS:
        return reduction(writer, node)
    if name == "aten::var_mean":
        return var_mean(writer, node)
    if name in ("aten::mm", "aten::bmm"):
        return product(writer, node, node.args[0], node.args[1])
    if name in ("aten::addmm", "aten::baddbmm") and not node.kwargs:
        return product(writer, node, node.args[1], node.args[2], node.args[0])
    if name == "aten::cat":
        return _cat(writer, node)
    raise CannotRewrite(f"{node.target} has no translation into a kernel", node)


def _check(node: Node) -> None:
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    for value in values:
        if not isinstance(value, Tensor):
            raise CannotRewrite(f"{node.target} makes no tensor", node)
        # The choice between two constants is one of integers in some of torch's formulas.
        chosen = op_name(node) == "aten::where" and value.dtype in (torch.int64, torch.int32)
        if not (chosen or value.is_floating_point() or value.dtype == torch.bool):
            raise CannotRewrite(f"{node.target} makes values of another type", node)
        check_rows(node, value)


def _view(writer: Writer, node: Node) -> Any:
    source: Any = node.args[0]
    value, name = writer.values[source], op_name(node)
    if name in ("prims::convert_element_type", "aten::_to_copy"):
        return _converted(writer, node, source)
    if name in COPIES:
        return value
    view: Any = torch.ops.aten.reshape.default if name in RESHAPES else node.target
    try:
        found = view(value.places, *one_row(node.args[1:], ROWS), **node.kwargs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise CannotRewrite(f"{node.target} mixes the rows of the batch", node) from error
    several = isinstance(found, (tuple, list))
    parts, results = (found, node.meta["val"]) if several else ([found], [node.meta["val"]])
    if any(tuple(part.shape) != rowless(result) for part, result in zip(parts, results, strict=True)):
        raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)
    if has_rows(source) and any(ROWS not in result.shape for result in results):
        raise CannotRewrite(f"{node.target} picks some rows of the batch", node)
    values = [value.view(part) for part in parts]
    return values if several else values[0]


def _converted(writer: Writer, node: Node, source: Node) -> Value:
    """All is computed in one type: truth values become numbers, and half precision is widened anyway."""
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if before == torch.bool and after.is_floating_point:
        return _elementwise(writer, node, [source], lambda x: f"({x}).to({writer.shape.wide})", False)
    if before != after and not {before, after} <= writer.shape.types:
        raise CannotRewrite(f"{node.target} converts {before} to {after}", node)
    value: Value = writer.values[source]
    return value


def _pointwise(writer: Writer, node: Node, name: str) -> Value:
    if node.meta["val"].dtype == torch.bool and name not in TRUTH:
        raise CannotRewrite(f"{node.target} of truth values has no translation", node)
    operands = list(dict.fromkeys(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)))
    order = {n: i for i, n in enumerate(operands)}

    def formula(*names: str) -> str:
        args = [names[order[a]] if isinstance(a, Node) else constant(a) for a in node.args]
        named = {k: names[order[v]] if isinstance(v, Node) else constant(v) for k, v in node.kwargs.items()}
        return POINTWISE[name](*args, **named)

    return _elementwise(writer, node, operands, formula, name in TRUTH)


def _elementwise(
    writer: Writer, node: Node, operands: Sequence[Node], formula: Callable[..., str], is_bool: bool
) -> Value:
    values, shape = [writer.values[n] for n in operands], rowless(node)
    lane, found = writer.empty(shape, values)

    def computed(pieces: Sequence[Run], start: int) -> Tile:
        names = []
        for value, run, operand in zip(values, pieces, operands, strict=True):
            expression, truth = writer.operand(run, value)
            wanted = operand.meta["val"].dtype == torch.bool or op_name(node) in LOGICAL
            names.append(f"({expression} != 0)" if wanted and not truth else expression)
        return Tile(writer.combined(formula(*names), pieces), pieces[0].width, node, start, is_bool)

    lines = [list(lines_along(v.places.expand(shape), lane)) for v in values]
    for several in zip(*lines, strict=True):
        index = several[0][0]
        runs = [writer.runs(v, line) for v, (_, line) in zip(values, several, strict=True)]
        if shape and shape[lane] > 1 and all(len(r) == 1 and r[0].step == 0 for r in runs):
            # One element stands for all of the line.
            one = computed([r[0].part(0, 1) for r in runs], 0)
            found.movedim(lane, -1)[index][:] = writer.tile(one)
            continue
        for start, pieces in writer.aligned(runs, node):
            writer.put(found, lane, index, computed(pieces, start))
    return Value(found)


def _cat(writer: Writer, node: Node) -> Value:
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if any(p.meta["val"].shape[dim] == ROWS for p in parts):
        raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)
    if node.meta["val"].dtype == torch.bool:
        raise CannotRewrite(f"{node.target} of truth values has no translation", node)
    shape = list(rowless(node))
    dim %= len(shape)
    values = []
    for part in parts:
        places = writer.in_tiles(part).places
        values.append(places.expand([*shape[:dim], places.shape[dim], *shape[dim + 1 :]]))
    return Value(torch.cat(values, dim))
