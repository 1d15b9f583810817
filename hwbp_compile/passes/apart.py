"""Rows of stacked parameters that elementwise functions read: as tensors of their own, copied once."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from .. import rows_op as rows_op  # the operator
from .linear_ops import op_name
from .row_gradients import call
from .views import SHARING

_MANY = 4
"""Rows from which on a tensor is taken apart."""
_LARGE = 1 << 12
"""Elements of a row from which on it is read where it lies."""


def take_apart(graph: Graph) -> int:
    """Have the rows of inputs copied together where kernels would differ in the row only; how many inputs."""
    done = 0
    for source in graph.find_nodes(op="placeholder"):
        rows = [u for u in source.users if op_name(u) == "aten::select" and _row(u) is not None]
        if not _are_many(rows) or not _is_small(source.meta["val"]):
            continue
        for backward in (False, True):
            users = {
                r: [u for u in r.users if _is_elementwise(u) and _is_backward(u) is backward] for r in rows
            }
            users = {r: found for r, found in users.items() if found}
            if _are_many(users):
                _replace(graph, source, users, backward)
                done += 1
    if done:
        _compat.sort_topologically(graph)
        graph.eliminate_dead_code()
    return done


def _are_many(rows: Iterable[Node]) -> bool:
    return len({_row(r) for r in rows}) >= _MANY


def _is_small(stack: Tensor) -> bool:
    """Whether a copy of it costs next to nothing."""
    known = all(isinstance(n, int) for n in stack.shape)
    return known and stack.dtype.is_floating_point and stack[0].numel() < _LARGE and stack.is_contiguous()


def _row(node: Node) -> int | None:
    """Which row of its operand a node is, counted from the first."""
    source, dim, row = node.args[:3]
    return row % source.meta["val"].shape[0] if dim == 0 and isinstance(row, int) else None  # type: ignore[union-attr]


def _is_backward(node: Node) -> bool:
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def _is_elementwise(node: Node) -> bool:
    """Whether a node, seen through views, is read by elementwise functions only."""
    if node.op != "call_function":
        return False
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return True
    return op_name(node) in SHARING and bool(node.users) and all(map(_is_elementwise, node.users))


def _replace(graph: Graph, source: Node, users: dict[Node, list[Node]], backward: bool) -> None:
    first = next(iter(users))
    with graph.inserting_before(first):
        apart = call(graph, torch.ops.hwbp_compile.rows.default, (source,), like=source)
        made = {row: graph.call_function(operator.getitem, (apart, _row(row))) for row in users}
    for row, copy in made.items():
        copy.meta["val"] = apart.meta["val"][_row(row)]
    if backward:  # not kept by the forward pass, which is given the stack
        for node in (apart, *made.values()):
            node.meta["partitioner_tag"] = "must_be_in_backward"
    for row, found in users.items():
        for user in found:
            user.replace_input_with(row, made[row])
