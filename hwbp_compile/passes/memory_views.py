"""Gradients that are written to memory and read from it by strides, as values.

Autograd does so where a part of a tensor was assigned to, and where images with their channels last, as those
of transformers, were pooled to one pixel. Read by strides, a value depends on how a cotangent lies in memory,
which changes with the way in which it is computed. Strides that hold all of a tensor are a permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .linear import linear_part
from .linear_ops import op_name, same_shape
from .row_gradients import call
from .strides import dense_order, inverse, order_of

aten = torch.ops.aten


def read_as_values(graph: Graph) -> int:
    """Replace, in the backward pass, what writes or reads all of a tensor by strides; how many operators."""
    rules = {"aten::copy": _copied, "aten::as_strided_scatter": _scattered, "aten::as_strided": _read}
    if not any(n.op == "call_function" and op_name(n) in rules for n in graph.nodes):
        return 0
    replaced = 0
    for node in linear_part(graph).order:
        rule = rules.get(op_name(node))
        if rule is None:
            continue
        with graph.inserting_before(node):
            new = rule(graph, node)
        if new is not None:
            node.replace_all_uses_with(new)
            replaced += 1
    graph.eliminate_dead_code()
    return replaced


def _copied(graph: Graph, node: Node) -> Node | None:
    """``copy(memory, source)``: the source, which lies as the memory does where that matters."""
    source: Any = node.args[1]
    value, result = source.meta["val"], node.meta["val"]
    if not same_shape(value, result) or (value.dtype, value.device) != (result.dtype, result.device):
        return None
    if list(map(str, value.stride())) == list(map(str, result.stride())):
        return source
    order = order_of(result)
    if order is None and any(op_name(user) == "aten::as_strided" for user in node.users):
        return None
    # What is neither dense nor read by strides may lie anyhow.
    order = list(range(result.dim())) if order is None else order
    return _permuted(graph, _dense(graph, source, order, node), inverse(order), node)


def _scattered(graph: Graph, node: Node) -> Node | None:
    """``as_strided_scatter(memory, source, size, stride)``, if it writes all of a flat memory."""
    memory, source, size, stride, *offset = node.args
    assert isinstance(memory, Node)
    assert isinstance(source, Node)
    order = _order(size, stride, memory.meta["val"], *offset)
    if order is None or memory.meta["val"].dim() != 1:
        return None
    return call(graph, aten.view.default, (_dense(graph, source, order, node), [-1]), like=node)


def _read(graph: Graph, node: Node) -> Node | None:
    """``as_strided(memory, size, stride)``, if it reads all of the memory, as this lay when it was traced."""
    memory, size, stride, *offset = node.args
    assert isinstance(memory, Node)
    assert isinstance(size, Sequence)
    value = memory.meta["val"]
    order, lies = _order(size, stride, value, *offset), order_of(value)
    if order is None or lies is None:
        return None
    flat = call(graph, aten.view.default, (_dense(graph, memory, lies, node), [-1]), like=node)
    shaped = call(graph, aten.view.default, (flat, [size[i] for i in order]), like=node)
    return _permuted(graph, shaped, inverse(order), node)


def _order(size: Any, stride: Any, memory: torch.Tensor, offset: Any = None) -> list[int] | None:
    """The order of a view, if it is of all elements of ``memory``, each once."""
    if offset not in (None, 0):
        return None
    return dense_order(list(map(_value, size)), list(map(_value, stride)), memory.numel())


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, Node) else size


def _permuted(graph: Graph, value: Node, order: list[int], like: Node) -> Node:
    return call(graph, aten.permute.default, (value, order), like=like)


def _dense(graph: Graph, value: Node, order: list[int], like: Node) -> Node:
    """A copy whose dimensions are in this order, and lie so."""
    permuted = _permuted(graph, value, order, like)
    return call(graph, aten.clone.default, (permuted,), like=like, memory_format=torch.contiguous_format)
