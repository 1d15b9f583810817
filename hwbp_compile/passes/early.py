"""Stacks that are made at the end of the forward pass, by one operator, and kept in place of their rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import stack_op as stack_op  # the operator
from .row_gradients import call
from .sink import stacked_early
from .views import dependent_on_tangents, views_of


def stack_early(graph: Graph) -> int:
    """Make concatenations of what the forward pass computes by one operator; how many.

    Otherwise each row is handed from one pass to the other, and copied in a kernel with as many arguments.
    """
    late = dependent_on_tangents(graph)
    # Of rows that are laid out in another order, a concatenation is so too, and a stack is not.
    found = [n for n in graph.nodes if _is_worth_it(stacked_early(n, late)) and n.meta["val"].is_contiguous()]
    for node in found:
        parts = stacked_early(node, late)
        with graph.inserting_before(node):
            stack = call(graph, torch.ops.hwbp_compile.stack.default, (list(parts),), like=node)
            sizes = list(node.meta["val"].shape)
            flat = call(graph, torch.ops.aten.view.default, (stack, sizes), like=node)
        node.replace_all_uses_with(flat)
    return len(found)


def _is_worth_it(parts: tuple[Node, ...]) -> bool:
    """Whether they are many, are not all given to the forward pass, and have sizes that are known."""
    if len(parts) < _MANY or all(views_of(n)[0].op == "placeholder" for n in parts):
        return False
    value = parts[0].meta["val"]
    return isinstance(value, Tensor) and all(isinstance(n, int) for n in value.shape)


_MANY = 4
