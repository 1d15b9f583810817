"""Stacks of what is known before the backward pass: made at its end by the forward pass, and kept for it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from .. import stack_op as stack_op  # the operator
from .classes import value_text
from .row_gradients import call
from .views import concatenated, views_of

Column = tuple[Node, ...]
"""Corresponding values of several blocks."""

_MANY = 4
"""Rows from which on a stack is kept in their place."""


def is_backward(node: Node) -> bool:
    """Whether a node of a joint graph belongs to its backward half."""
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def dependent_on_tangents(graph: Graph) -> set[Node]:
    """What is not known before the backward pass begins."""
    found: set[Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and "tangent" in node.name) or any(
            n in found for n in node.all_input_nodes
        ):
            found.add(node)
    return found


def stacked_early(node: Node, late: Collection[Node]) -> Column:
    """What a node of the backward pass stacks, all of one shape and known before; empty if it does not."""
    parts = concatenated(node)
    if len(set(parts)) < 2 or node in late or node.meta.get("partitioner_tag") != "is_backward":
        return ()
    return tuple(parts) if len({value_text(n) for n in parts}) == 1 else ()


def stack_early(graph: Graph) -> int:
    """Make concatenations of what the forward pass computes by one operator; how many.

    Otherwise each row is handed from one pass to the other, and copied in a kernel with as many arguments.
    """
    late = dependent_on_tangents(graph)
    columns = {n: column for n in graph.nodes if (column := stacked_early(n, late))}
    found = {n: column for n, column in columns.items() if _is_kept(n, column)}
    for node, column in found.items():
        with graph.inserting_before(node):
            stack = call(graph, torch.ops.hwbp_compile.stack.default, (list(column),), like=node)
            sizes = list(node.meta["val"].shape)
            flat = call(graph, torch.ops.aten.view.default, (stack, sizes), like=node)
        node.replace_all_uses_with(flat)
    return len(found)


def _is_kept(node: Node, column: Column) -> bool:
    """Whether the rows are many, are not all given to the forward pass, and have sizes that are known."""
    if len(column) < _MANY or all(views_of(n)[0].op == "placeholder" for n in column):
        return False
    # Of rows that are laid out in another order, a concatenation is so too, and a stack is not.
    known = all(isinstance(n, int) for n in column[0].meta["val"].shape)
    return known and node.meta["val"].is_contiguous()
