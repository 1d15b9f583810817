"""Rows of stacked parameters that elementwise functions read: as tensors of their own, copied once."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from .. import rows_op as rows_op  # the operator
from .early import dependent_on_tangents, is_backward
from .linear_ops import op_name
from .row_gradients import call
from .views import SHARING, row_of

_FEWEST = 4
"""Rows from which on a tensor is taken apart."""
_LARGE = 1 << 12
"""Elements of a row from which on it is read where it lies."""
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VIEWS = SHARING - {"aten::as_strided"}  # which depends on where its operand lies


def take_apart(graph: Graph) -> int:
    """Have the rows of inputs copied together where kernels would differ in the row only.

    The forward pass and what depends on tangents have copies each: none is kept for the backward pass.

    Returns:
        How many copies of whole inputs there are.
    """
    done = 0
    late = dependent_on_tangents(graph)
    for source in graph.find_nodes(op="placeholder"):
        if not _is_small(source.meta.get("val")):
            continue
        rows = {u: row.row for u in source.users if (row := row_of(u)) is not None}
        for of_backward in (False, True):
            users = {r: [u for u in r.users if _half(u, late) is of_backward] for r in rows}
            users = {r: found for r, found in users.items() if found}
            count = len({rows[r] for r in users})
            if count >= _FEWEST and 2 * count >= source.meta["val"].shape[0]:
                _replace(graph, source, rows, users, of_backward)
                done += 1
    if done:
        _compat.sort_topologically(graph)
        graph.eliminate_dead_code()
    return done


def _is_small(value: object) -> bool:
    """Whether to copy a row costs next to nothing."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.dtype not in _TYPES:
        return False
    known = all(isinstance(n, int) for n in value.shape)
    return known and value[0].numel() < _LARGE and value.is_contiguous()


def _half(node: Node, late: Collection[Node]) -> bool | None:
    """Whether a node that reads a row belongs to the backward pass.

    None if it, or what reads it through views, is not elementwise, belongs to both passes, or could be
    computed in either.
    """
    if node.op != "call_function":
        return None
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        if is_backward(node):
            return True if node in late else None
        return False
    if op_name(node) not in _VIEWS:
        return None
    halves = {_half(user, late) for user in node.users} | {is_backward(node)}
    return halves.pop() if len(halves) == 1 else None


def _replace(
    graph: Graph, source: Node, rows: Mapping[Node, int], users: Mapping[Node, list[Node]], of_backward: bool
) -> None:
    first = next(iter(users))
    with graph.inserting_before(first):
        apart = call(graph, torch.ops.hwbp_compile.rows.default, (source, of_backward), like=first)
        made = {row: graph.call_function(operator.getitem, (apart, rows[row])) for row in users}
    for row, copy in made.items():
        copy.meta["val"] = apart.meta["val"][rows[row]]
    for node in (apart, *made.values()):
        if "custom" in first.meta:  # the partitioner wants all nodes to have it, or none
            node.meta["custom"] = first.meta["custom"]
        if of_backward:
            node.meta["partitioner_tag"] = "must_be_in_backward"
    for row, found in users.items():
        for user in found:
            user.replace_input_with(row, made[row])
