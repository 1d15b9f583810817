"""Rows of a tensor that are put together again: a slice of that tensor, not a copy.

Schedules take values apart into rows and stack the rows of others. Where the rows come from one tensor, such
as a stack of parameters or the result of another schedule, nothing has to be moved.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from .early import is_backward, stack_early
from .linear_ops import MATRIX_PRODUCTS, op_name
from .order import sort_topologically
from .shared_stacks import shared_stacks
from .strides import same_strides
from .views import STACKED, Row, concatenated, is_view, row_of


def restack(graph: Graph) -> int:
    """Replace concatenated rows of one tensor by that tensor or a slice of it; how many times.

    What is concatenated after that and known before the backward pass is put together by one operator.
    """
    shared = shared_stacks(graph)
    done = sum(_shorten(graph, node, shared.get(node)) for node in list(graph.nodes))
    done += stack_early(graph)
    if done:
        sort_topologically(graph)
        graph.eliminate_dead_code()
    return done


def _shorten(graph: Graph, node: Node, known: list[Row] | None) -> bool:
    """Join the neighbours among what a node concatenates that are rows of one tensor."""
    parts = concatenated(node)
    if len(parts) < 2 or not is_backward(node):
        return False
    rows: Sequence[Row | None] = known or [row_of(n) for n in parts]
    if _run(rows) == len(rows):
        return _replace(graph, node, [r for r in rows if r is not None])
    if known:
        return False
    joined: list[Node] = []
    start = 0
    while start < len(parts):
        end = start + _run(rows[start:])
        run = [r for r in rows[start:end] if r is not None]
        joined.extend(parts[start:end] if len(run) < 2 else [_slice(graph, node, run, flat=True)])
        start = end
    node.update_arg(0, joined)
    return len(parts) > len(joined)


def _replace(graph: Graph, node: Node, rows: list[Row]) -> bool:
    """Put a slice in the place of a concatenation, or of its users if these take the rows apart."""
    apart = [len(rows), *concatenated(node)[0].meta["val"].shape]
    known = all(isinstance(n, int) for n in apart)
    views = [u for u in node.users if known and op_name(u) == "aten::view" and _sizes(u) == apart]
    split = len(views) == len(node.users)
    made = _slice(graph, node, rows, flat=not split)
    replaced = views if split else [node]
    users = [user for old in replaced for user in old.users]
    only_products = all(user.op != "output" and op_name(user) in MATRIX_PRODUCTS for user in users)
    if not only_products and not all(_is_laid_out_like(made, old) for old in replaced):
        return False  # a view further on may have been recorded for a tensor of other strides
    owner = rows[0].base
    while owner.op == "call_function" and is_view(owner):
        owner = owner.all_input_nodes[0]
    if is_returned(node) and (not is_backward(owner) or is_returned(owner, besides=node)):
        return False  # what is handed out must not share its memory with anything else
    for old in replaced:
        old.replace_all_uses_with(made)
    return True


def _is_laid_out_like(a: Node, b: Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return (x.is_contiguous() and y.is_contiguous()) or same_strides(x, y)


def is_returned(node: Node, besides: Node | None = None) -> bool:
    """Whether the graph returns a node, or a view of it."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return True
            if user not in seen and user is not besides and (user.op != "call_function" or is_view(user)):
                seen.add(user)
                stack.append(user)
    return False


def _sizes(view: Node) -> list[object]:
    return list(view.args[1])  # type: ignore[arg-type]


def _run(rows: Sequence[Row | None]) -> int:
    """How many rows, from the first on, are evenly spaced rows of one tensor."""
    first = rows[0]
    if first is None or len(rows) < 2 or rows[1] is None:
        return 1
    step = rows[1].row - first.row
    if step < 1:
        return 1
    for i, row in enumerate(rows):
        if row is None or row.row != first.row + i * step or row.kind() != first.kind():
            return i
    return len(rows)


def _slice(graph: Graph, node: Node, rows: Sequence[Row], *, flat: bool) -> Node:
    """These rows, before a node that concatenates them: one view, ``[rows, ...]`` or one behind the other."""
    first, step = rows[0], rows[1].row - rows[0].row

    def stacked(base: Tensor) -> Tensor:
        value = base
        if step != 1 or len(rows) != base.shape[0]:
            value = base[first.row : rows[-1].row + 1 : step]
        for name, argument in first.views:
            value = STACKED[name](value, argument)
        return value.flatten(0, 1) if flat else value

    traced = _compat.trace(stacked, [first.base.meta["val"]])
    environment: dict[Node, Node] = {}
    with graph.inserting_before(node):
        for each in traced.graph.nodes:
            if each.op == "placeholder":
                environment[each] = first.base
            elif each.op == "call_function":
                environment[each] = graph.node_copy(each, environment.__getitem__)
                if "partitioner_tag" in node.meta:
                    environment[each].meta["partitioner_tag"] = node.meta["partitioner_tag"]
    (output,) = traced.graph.find_nodes(op="output")
    return environment[output.args[0]]
