"""Rows of stacked parameters that generated kernels read: as tensors of their own, copied once."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import TypeGuard

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import rows_op as rows_op  # the operator
from .early import dependent_on_tangents, is_backward
from .linear_ops import op_name
from .order import sort_topologically
from .row_gradients import call
from .views import SHARING, row_of

_FEWEST = 4
"""Rows from which on a tensor is taken apart."""
_LARGE = 1 << 12
"""Elements of a row from which on elementwise functions read it where it lies."""
_CONVOLUTIONS = {"aten::convolution": 1, "aten::convolution_backward": 2}
"""Where they have their weights, which generated kernels lay out anew on CPUs, however large they are."""
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VIEWS = SHARING - {"aten::as_strided"}  # which depends on where its operand lies


def take_apart(graph: Graph) -> int:
    """Have the rows of inputs copied together where kernels would differ in the row only.

    The forward pass and what depends on tangents have copies each: none is kept for the backward pass.

    Returns:
        How many copies of whole inputs there are.
    """
    done = 0
    late = _of_backward(graph)
    for source in graph.find_nodes(op="placeholder"):
        value = source.meta.get("val")
        if not _can_be_copied(value):
            continue
        rows = {u: row.row for u in source.users if (row := row_of(u)) is not None}
        for of_backward in (False, True):
            users = {r: [u for u in r.users if _half(u, r, late, value) is of_backward] for r in rows}
            users = {r: found for r, found in users.items() if found}
            count = len({rows[r] for r in users})
            if count >= _FEWEST and 2 * count >= value.shape[0]:
                _replace(graph, source, rows, users, of_backward)
                done += 1
    if done:
        sort_topologically(graph)
        graph.eliminate_dead_code()
    return done


def _can_be_copied(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.dim() < 2 or value.dtype not in _TYPES:
        return False
    return all(isinstance(n, int) for n in value.shape) and value.is_contiguous()


def _half(node: Node, operand: Node, late: Collection[Node], stack: Tensor) -> bool | None:
    """Whether a node that reads a row of a stack belongs to the backward pass.

    None if no generated kernel has to read the row there (or where it is read through views), or if that
    belongs to both passes, or could be computed in either.
    """
    if node.op != "call_function":
        return None
    if _in_kernel(node, operand, stack):
        if is_backward(node):
            return True if node in late else None
        return False
    if op_name(node) not in _VIEWS:
        return None
    halves = {_half(user, node, late, stack) for user in node.users} | {is_backward(node)}
    return halves.pop() if len(halves) == 1 else None


def _in_kernel(node: Node, operand: Node, stack: Tensor) -> bool:
    """Whether generated code passes over what a node reads, so that copies of all rows are worth it."""
    if (weight := _CONVOLUTIONS.get(op_name(node))) is not None:
        return node.args[weight] is operand and stack.device.type == "cpu"
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise and stack[0].numel() < _LARGE


def _of_backward(graph: Graph) -> set[Node]:
    """What depends on tangents, and what of the backward pass only that reads, in the end."""
    found = dependent_on_tangents(graph)
    for node in reversed(graph.nodes):
        if is_backward(node) and node.users and all(user in found for user in node.users):
            found.add(node)
    return found


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
