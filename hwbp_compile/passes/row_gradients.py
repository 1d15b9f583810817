"""Gradients of the rows of one tensor as one stack.

Autograd turns each row's gradient into a tensor as large as the whole, zero elsewhere, and adds these up:
quadratic in the number of rows. Here the sum becomes a concatenation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .linear_ops import is_zero_constant, op_name, same_shape

_Rows = dict[int | None, list[Node]]
"""For each row what is added to it; under None, what is added to the whole."""


def join_row_gradients(graph: Graph) -> int:
    """Replace sums of rows, each padded with zeros, by their concatenation; how many sums there were."""
    if not any(n.op == "call_function" and op_name(n) == "aten::select_scatter" for n in graph.nodes):
        return 0
    sums: dict[Node, _Rows] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name == "aten::select_scatter":
            if is_zero_constant(node.args[0]) and not _int(node, 2) and isinstance(node.args[3], int):
                size = node.meta["val"].shape[0]
                row: Any = node.args[1]
                if isinstance(size, int) and row.meta["val"].dtype == node.meta["val"].dtype:
                    sums[node] = {node.args[3] % size: [row]}
        elif name == "aten::add" and not node.kwargs and len(node.args) == 2:
            terms: Any = node.args
            alike = [x for x in terms if isinstance(x, Node) and _alike(x, node)]
            known = [x for x in alike if x in sums and len(x.users) == 1]
            if len(set(alike)) == 2 and known:
                others: list[_Rows] = [{None: [x]} for x in alike if x not in known]
                sums[node] = functools.reduce(_merged, [*(sums.pop(x) for x in known), *others])
    joined: dict[Node, Node] = {}
    for node, rows in sums.items():
        if _most(node, rows):
            # What is added to a sum may be a sum that has been replaced.
            present = {row: [joined.get(n, n) for n in found] for row, found in rows.items()}
            joined[node] = _join(graph, node, present)
    graph.eliminate_dead_code()
    return len(joined)


def _alike(a: Node, b: Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return isinstance(x, torch.Tensor) and same_shape(x, y) and x.dtype == y.dtype


def _most(node: Node, rows: _Rows) -> bool:
    """Whether at least half of the rows are known: of a large table with few, a sum is shorter."""
    known = len(rows.keys() - {None})
    return known > 1 and 2 * known >= node.meta["val"].shape[0]


def _int(node: Node, position: int) -> int:
    value = node.args[position] if len(node.args) > position else 0
    assert isinstance(value, int)
    return value


def _merged(a: _Rows, b: _Rows) -> _Rows:
    if len(a) < len(b):
        a, b = b, a
    for row, gradients in b.items():
        a.setdefault(row, []).extend(gradients)
    return a


def _join(graph: Graph, node: Node, rows: _Rows) -> Node:
    whole = node.meta["val"]
    with graph.inserting_before(node):
        parts = []
        for row in range(whole.shape[0]):
            if row not in rows:
                (first, *_), *_ = (gradients for number, gradients in rows.items() if number is not None)
                zeros = _zeros(graph, first, node)
                parts.append(call(graph, torch.ops.aten.unsqueeze.default, (zeros, 0), like=node))
                continue
            total, *others = rows[row]
            for other in others:
                total = call(graph, torch.ops.aten.add.Tensor, (total, other), like=node)
            parts.append(call(graph, torch.ops.aten.unsqueeze.default, (total, 0), like=node))
        joined = call(graph, torch.ops.aten.cat.default, (parts,), like=node)
        for other in rows.get(None, ()):
            joined = call(graph, torch.ops.aten.add.Tensor, (joined, other), like=node)
    node.replace_all_uses_with(joined)
    return joined


def _zeros(graph: Graph, row: Node, like: Node) -> Node:
    """A row without a gradient, which depends on that of no other if its size is known."""
    value = row.meta["val"]
    if not all(isinstance(n, int) for n in value.shape):
        return call(graph, torch.ops.aten.full_like.default, (row, 0), like=like)
    kind = {"dtype": value.dtype, "device": value.device}
    return call(graph, torch.ops.aten.full.default, (list(value.shape), 0), like=like, **kind)


def call(graph: Graph, target: Any, args: Sequence[Any], *, like: Node, **kwargs: Any) -> Node:
    """Insert an operator into the same half of a joint graph as ``like``; ``kwargs`` are constants."""
    node = graph.call_function(target, tuple(args), kwargs)
    with like.meta["val"].fake_mode:
        node.meta["val"] = target(*torch.fx.node.map_arg(tuple(args), lambda n: n.meta["val"]), **kwargs)
    if "partitioner_tag" in like.meta:
        node.meta["partitioner_tag"] = like.meta["partitioner_tag"]
    return node
