"""Rows of a tensor that are put together again: a slice of that tensor, not a copy.

Schedules take values apart into rows and stack the rows of others. Where the rows come from one tensor, such
as a stack of parameters or the result of another schedule, nothing has to be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from .linear_ops import op_name

_VIEWS = {"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::as_strided"}


@dataclass(frozen=True, slots=True)
class _Row:
    """Row ``row`` of ``base``, and the views of it that follow."""

    base: Node
    row: int
    views: tuple[tuple[str, Any], ...] = ()

    def kind(self) -> tuple[Any, ...]:
        return self.base, str(self.views)


def restack(graph: Graph) -> int:
    """Replace concatenated rows of one tensor by that tensor or a slice of it; how many times."""
    done = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "aten::cat" and _dim(node) == 0:
            done += _shorten(graph, node)
    if done:
        graph.eliminate_dead_code()
    return done


def _shorten(graph: Graph, node: Node) -> int:
    """Join the neighbours among what a node concatenates that are rows of one tensor."""
    parts: Any = node.args[0]
    rows = [_row_of(n) for n in parts]
    joined: list[Node] = []
    start = 0
    while start < len(parts):
        end = start + _run(rows[start:])
        made = None
        if end - start > 1:
            run = [r for r in rows[start:end] if r is not None]
            made = _slice(graph, node, run, end - start == len(parts))
        joined.extend(parts[start:end] if made is None else [made])
        start = end
    if len(joined) == 1 and len(parts) > 1:
        node.replace_all_uses_with(joined[0])
        graph.erase_node(node)
    else:
        node.update_arg(0, joined)
    return len(parts) > len(joined)


def _run(rows: Sequence[_Row | None]) -> int:
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


def _slice(graph: Graph, node: Node, rows: Sequence[_Row], whole: bool) -> Node | None:
    """These rows, one behind the other, in one view; None where that will not do."""
    first, step = rows[0], rows[1].row - rows[0].row

    def stacked(base: Tensor) -> Tensor:
        value = base
        if step != 1 or len(rows) != base.shape[0]:
            value = base[first.row : rows[-1].row + 1 : step]
        for name, argument in first.views:
            value = _STACKED[name](value, argument)
        return value.flatten(0, 1)

    if first.base.meta["val"].dim() - 1 + sum(_MORE.get(name, 0) for name, _ in first.views) < 1:
        return None  # rows without a dimension
    traced = _compat.trace(stacked, [first.base.meta["val"]])
    (output,) = traced.graph.find_nodes(op="output")
    (result,) = output.args
    value = first.base.meta["val"] if result.op == "placeholder" else result.meta["val"]
    if whole and not value.is_contiguous() and any(op_name(user) in _VIEWS for user in node.users):
        return None  # such a view was recorded for a tensor of other strides
    environment: dict[Node, Node] = {}
    with graph.inserting_before(node):
        for each in traced.graph.nodes:
            if each.op == "placeholder":
                environment[each] = first.base
            elif each.op == "call_function":
                environment[each] = graph.node_copy(each, environment.__getitem__)
                if "partitioner_tag" in node.meta:
                    environment[each].meta["partitioner_tag"] = node.meta["partitioner_tag"]
    return environment[result]


def _row_of(node: Node) -> _Row | None:
    """The row that a node is a view of, if it is one."""
    views: list[tuple[str, Any]] = []
    while node.op == "call_function":
        name = op_name(node)
        if name == "aten::select" and node.args[1] == 0 and isinstance(node.args[2], int):
            base: Any = node.args[0]
            return _of(base, node.args[2], views)
        if name == "getitem":
            source: Any = node.args[0]
            if source.op == "call_function" and op_name(source) == "aten::unbind" and _dim(source) == 0:
                return _of(source.args[0], node.args[1], views)
            return None
        if name not in _STACKED:
            return None
        views.append((name, node.args[1:]))
        (node,) = node.all_input_nodes
    return None


def _of(base: Node, row: Any, views: list[tuple[str, Any]]) -> _Row | None:
    size = base.meta["val"].shape[0]
    return _Row(base, row % size, tuple(reversed(views))) if isinstance(size, int) else None


def _dim(node: Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _permuted(x: Tensor, args: Any) -> Tensor:
    return x.permute(0, *(d % (x.dim() - 1) + 1 for d in args[0]))


def _unsqueezed(x: Tensor, args: Any) -> Tensor:
    return x.unsqueeze(args[0] % x.dim() + 1)


_STACKED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "aten::permute": _permuted,
    "aten::t": lambda x, _: x.transpose(1, 2) if x.dim() == 3 else x,
    "aten::transpose": lambda x, args: x.transpose(*(d % (x.dim() - 1) + 1 for d in args)),
    "aten::unsqueeze": _unsqueezed,
    "aten::view": lambda x, args: x.reshape(x.shape[0], *args[0]),
}
"""For each view of a row, the view of all rows at once."""
_MORE = {"aten::unsqueeze": 1}
