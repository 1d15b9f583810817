"""Weights that products read where they lie, not in a stack: on CPUs, where a few rows are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat, products_cpp
from .. import products_op as products_op  # the operators
from .early import is_backward
from .linear_ops import op_name
from .row_gradients import call
from .views import STACKED, concatenated, views_of

_FEWEST = 4
"""Matrices from which on a table of their addresses is worth it."""
MOST_ROWS = 256
"""Rows up to which products are not left to a library, which takes copies of the matrices."""
_RESHAPED = {"aten::view", "aten::_unsafe_view", "aten::clone"}
"""Operators that keep the elements in their order."""
_VIEWS = {"aten::permute", "aten::slice", "aten::transpose", "aten::alias"}


class Run(NamedTuple):
    """Some of the matrices: from ``first`` on, ``step`` apart."""

    first: int
    step: int


def use_addresses(graph: Graph) -> int:
    """Have batched products read the parameters of blocks where they are, if nothing else reads their stack.

    Returns:
        How many stacks are no longer made.
    """
    done = 0
    for stack in list(graph.nodes):
        if not _could_be_read(stack):
            continue
        shape = stack.meta["val"].shape
        with _compat.outside_of_tracing():
            products = _products_with([(stack, torch.empty(shape, device="meta"))], shape)
        if not products or not all(map(is_backward, products)):
            continue
        with graph.inserting_before(stack):
            target = torch.ops.hwbp_compile.addresses.default
            table = call(graph, target, (stack.args[0],), like=stack)
        for product, rows in products.items():
            _multiply(graph, product, table, rows)
        done += 1
    if done:
        graph.eliminate_dead_code()
    return done


def products_with_inputs(
    concatenation: Node, outer: Callable[[Node], Node] = lambda node: node
) -> dict[Node, Run]:
    """The products that could read inputs of a graph where they are, instead of a concatenation of them.

    Args:
        concatenation: along the first dimension, of views of ``placeholder`` nodes.
        outer: what such a node stands for in another graph, of which it is to be an input.

    Returns:
        For each which of the matrices it reads; empty if these are put together for other uses too, or
        there is no kernel for them.
    """
    inner = [views_of(n) for n in concatenated(concatenation)]
    outside = [views_of(outer(n)) for n, _ in inner]
    sources = [n for n, _ in outside]
    views = [(*before, *after) for (_, before), (_, after) in zip(outside, inner, strict=True)]
    if not _are_matrices(sources) or len(set(map(str, views))) > 1:
        return {}
    shape = [len(sources), *sources[0].meta["val"].shape]
    with _compat.outside_of_tracing():
        value = torch.empty(shape, device="meta")
        for name, argument in views[0]:
            value = STACKED[name](value, argument)
        sizes = list(value.shape)
        apart = [u for u in concatenation.users if op_name(u) == "aten::view" and u.args[1] == sizes]
        if len(apart) < len(concatenation.users):
            return {}
        return _products_with([(each, value) for each in apart], shape) or {}


def _could_be_read(node: Node) -> bool:
    """Whether a node makes a stack of inputs, for which there is a kernel."""
    if node.op != "call_function" or node.target is not torch.ops.hwbp_compile.stack.default:
        return False
    return _are_matrices(node.args[0])


def _are_matrices(sources: Any) -> bool:
    """Whether nodes are many inputs that are contiguous matrices of a type that there is a kernel for."""
    if len(sources) < _FEWEST or any(n.op != "placeholder" for n in sources):
        return False
    value = sources[0].meta["val"]
    return (
        value.dim() == 2
        and value.device.type == "cpu"
        and value.dtype in products_cpp.TYPES
        and all(isinstance(n, int) for n in value.shape)
        and all(n.meta["val"].is_contiguous() for n in sources)
    )


def _products_with(stacks: Iterable[tuple[Node, Tensor]], shape: Sequence[int]) -> dict[Node, Run] | None:
    """The products whose right factors are matrices of a stack; None if it has other uses.

    Args:
        stacks: nodes, and of each a view of a contiguous tensor of the ``shape``, of which the strides count.

    Returns:
        For each which of the matrices it reads.
    """
    found: dict[Node, Run] = {}
    waiting = [(node, value, list(value.shape)) for node, value in stacks]
    while waiting:
        node, value, sizes = waiting.pop()
        for user in node.users:
            name, (_, *arguments), target = op_name(user), user.args, cast(Any, user.target)
            if name in _RESHAPED and user.all_input_nodes == [node]:
                sizes_there = sizes if name == "aten::clone" else list(cast(Any, arguments[0]))
                waiting.append((user, _reshaped(value, sizes_there), sizes_there))
                continue
            rows = None
            if list(value.shape) == sizes:
                if name in _VIEWS and user.all_input_nodes == [node]:
                    viewed = target(value, *arguments, **user.kwargs)
                    waiting.append((user, viewed, list(viewed.shape)))
                    continue
                if name == "aten::bmm" and user.args[1] is node and user.args[0] is not node:
                    rows = _rows(value, shape) if _are_few(user) else None
            if rows is None:
                return None
            found[user] = rows
    return found


def _reshaped(value: Tensor, sizes: list[int]) -> Tensor:
    """A tensor of other sizes without a copy, or as it was: some further view may have its sizes again."""
    if sizes == list(value.shape):
        return value
    try:
        return value.view(sizes)
    except RuntimeError:
        return value


def _rows(value: Tensor, shape: Sequence[int]) -> Run | None:
    """Which matrices of a contiguous stack of a shape a view holds, if it holds them as they lie."""
    _, inner, columns = shape
    size = inner * columns
    if value.dim() != 3 or list(value.shape[1:]) != [inner, columns] or value.storage_offset() % size:
        return None
    if (inner > 1 and value.stride(1) != columns) or (columns > 1 and value.stride(2) != 1):
        return None
    step = value.stride(0) if value.shape[0] > 1 else size
    return None if step % size else Run(value.storage_offset() // size, step // size)


def _are_few(product: Node) -> bool:
    left: Any = product.args[0]
    return _compat.size_hint(left.meta["val"].shape[1]) <= MOST_ROWS


def _multiply(graph: Graph, product: Node, table: Node, rows: Run) -> None:
    left, right = product.args
    columns = right.meta["val"].shape[2]  # type: ignore[union-attr]
    with graph.inserting_before(product):
        target = torch.ops.hwbp_compile.products.default
        made = call(graph, target, (left, table, columns, *rows), like=product)
    product.replace_all_uses_with(made)
