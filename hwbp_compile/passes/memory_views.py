"""Gradients that are written to memory and read from it by strides, as values.

Autograd does so where a part of a tensor was assigned to, and where images with their channels last, as those
of transformers, were pooled to one pixel. Read by strides, a value depends on how a cotangent lies in memory,
which changes with the way in which it is computed. Strides that hold all of a tensor are a permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import _compat
from .linear import linear_part
from .linear_ops import op_name, same_shape
from .row_gradients import call
from .strides import dense_order, inverse, order_of, same_strides

aten = torch.ops.aten


Rewrite = Callable[[], Node]


def read_as_values(graph: Graph) -> int:
    """Replace, in the backward pass, what writes or reads all of a tensor by strides; how many operators.

    All or nothing: as long as anything is read by strides, everything has to lie as it did.
    """
    rules = {"aten::copy": _copied, "aten::as_strided_scatter": _scattered, "aten::as_strided": _read}
    if not any(n.op == "call_function" and op_name(n) in rules for n in graph.nodes):
        return 0
    # What lies where is asked of the graph as it was traced, before anything is changed.
    plans: dict[Node, Rewrite] = {}
    for node in linear_part(graph).order:
        if (rule := rules.get(op_name(node))) is None:
            continue
        plan = rule(graph, node)
        if plan is not None:
            plans[node] = plan
        elif rule is not _copied:
            return 0
    for node, plan in plans.items():
        with graph.inserting_before(node):
            node.replace_all_uses_with(plan())
    graph.eliminate_dead_code()
    return len(plans)


def _copied(graph: Graph, node: Node) -> Rewrite | None:
    """``copy(memory, source)``: the source, laid out for the views of it that were recorded."""
    source: Any = node.args[1]
    value, result = source.meta["val"], node.meta["val"]
    if not same_shape(value, result) or not _same_kind(value, result):
        return None
    if same_strides(value, result):
        return lambda: _operand(node, 1)
    order, strides = order_of(result), result.stride()
    if order is None:
        if not all(isinstance(step, int) for step in strides):
            return None
        # With gaps it can be viewed in no more ways than without.
        order = sorted(range(result.dim()), key=lambda i: -strides[i])
    return lambda: _permuted(graph, _dense(graph, _operand(node, 1), order, node), inverse(order), node)


def _scattered(graph: Graph, node: Node) -> Rewrite | None:
    """``as_strided_scatter(memory, source, size, stride)``, if it writes all of a flat memory."""
    memory, source, size, stride, *offset = node.args
    assert isinstance(memory, Node)
    assert isinstance(source, Node)
    value = memory.meta["val"]
    order = _order(size, stride, value, *offset)
    if order is None or value.dim() != 1 or order_of(value) is None:
        return None
    if not _same_kind(value, source.meta["val"]):
        return None
    return lambda: call(
        graph, aten.view.default, (_dense(graph, _operand(node, 1), order, node), [-1]), like=node
    )


def _read(graph: Graph, node: Node) -> Rewrite | None:
    """``as_strided(memory, size, stride)``, if it reads all of the memory and nothing around it."""
    memory, size, stride, *offset = node.args
    assert isinstance(memory, Node)
    assert isinstance(size, Sequence)
    value = memory.meta["val"]
    order, lies = _order(size, stride, value, *offset), order_of(value)
    if order is None or lies is None:
        return None

    def rewrite() -> Node:
        flat = call(graph, aten.view.default, (_dense(graph, _operand(node, 0), lies, node), [-1]), like=node)
        shaped = call(graph, aten.view.default, (flat, [size[i] for i in order]), like=node)
        return _permuted(graph, shaped, inverse(order), node)

    return rewrite


def _order(size: Any, stride: Any, memory: torch.Tensor, offset: Any = None) -> list[int] | None:
    """The order of a view, if it is of all elements of ``memory``, each once."""
    begins = _compat.size_expression(memory.storage_offset())
    if offset is not None and _compat.size_expression(_value(offset)) != begins:
        return None
    return dense_order(list(map(_value, size)), list(map(_value, stride)), memory.numel())


def _operand(node: Node, position: int) -> Node:
    """As it is by now: operands may have been replaced."""
    operand = node.args[position]
    assert isinstance(operand, Node)
    return operand


def _same_kind(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device)


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, Node) else size


def _permuted(graph: Graph, value: Node, order: list[int], like: Node) -> Node:
    return call(graph, aten.permute.default, (value, order), like=like)


def _dense(graph: Graph, value: Node, order: list[int], like: Node) -> Node:
    """A copy whose dimensions are in this order, and lie so."""
    permuted = _permuted(graph, value, order, like)
    return call(graph, aten.clone.default, (permuted,), like=like, memory_format=torch.contiguous_format)
