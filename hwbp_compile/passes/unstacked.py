"""Weights that products read where they lie, not in a stack: on CPUs, where a few rows are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat, products_cpp
from .. import products_op as products_op  # the operator
from .early import is_backward
from .linear_ops import op_name
from .row_gradients import call
from .views import STACKED, concatenated, views_of

Products = dict[Node, list[int]]
"""Products, and with which of the matrices of a stack each is."""

_FEWEST = 4
"""Matrices in a stack from which on it is worth doing without."""
MOST_ROWS = 64
"""Rows up to which products are not left to a library, which takes a stack of the matrices."""
VECTOR = 64
"""Bytes of which the rows of a matrix have to be a multiple: else the kernel is slower than a library."""
_RESHAPED = {"aten::view", "aten::_unsafe_view", "aten::clone"}
"""Operators that keep the elements in their order."""
_VIEWS = {"aten::permute", "aten::slice", "aten::transpose", "aten::alias"}


def multiply_unstacked(graph: Graph) -> int:
    """Have batched products read the parameters of blocks where they are, if nothing else reads their stack.

    Returns:
        How many stacks are no longer made.
    """
    found: dict[Node, Products] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.hwbp_compile.stack.default:
            sources = cast(Any, node.args[0])
            if not _are_matrices(sources) or len(sources) < _FEWEST:
                continue
            shape = node.meta["val"].shape
            with _compat.outside_of_tracing():
                products = _products_with([(node, torch.empty(shape, device="meta"))], shape)
            kernel = products_cpp.kernel(node.meta["val"].dtype) if products else None
            if products and kernel is not None and all(map(is_backward, products)):
                found[node] = products
    for stack, products in found.items():
        matrices = cast(Any, stack.args[0])
        for product, rows in products.items():
            arguments = product.args[0], [matrices[i] for i in rows]
            with graph.inserting_before(product):
                made = call(graph, torch.ops.hwbp_compile.products.default, arguments, like=product)
            product.replace_all_uses_with(made)
    if found:
        graph.eliminate_dead_code()
    return len(found)


def unstacked_products(nodes: Iterable[Node], outer: Callable[[Node], Node]) -> dict[Node, Products]:
    """What :func:`multiply_unstacked` will find of a schedule that is not in a graph yet.

    Args:
        nodes: those of the schedule.
        outer: what an input of it stands for in the graph.

    Returns:
        For each concatenation of the graph's inputs that is not going to be made, the products with it.
    """
    columns = [(n, _sources(n, outer)) for n in nodes]
    columns = sorted(((n, s) for n, s in columns if s), key=lambda column: -len(column[1]))
    whole_of: dict[Node, tuple[Node, ...]] = {}
    found: dict[tuple[Node, ...], dict[Node, Products]] = {}
    refused: set[tuple[Node, ...]] = set()
    for node, sources in columns:
        # Concatenations of some of the same inputs will be slices of one stack.
        whole = whole_of.setdefault(sources[0], sources)
        for each in sources:
            whole_of.setdefault(each, sources)
        products = _products_with_inputs(node, sources, outer)
        if not products or not set(sources) <= set(whole) or len(whole) < _FEWEST:
            refused.add(whole)
        found.setdefault(whole, {})[node] = products
    return {n: p for whole, parts in found.items() if whole not in refused for n, p in parts.items()}


def _sources(node: Node, outer: Callable[[Node], Node]) -> tuple[Node, ...]:
    """The inputs that a node concatenates, or views of them; empty if it does not, or any of them twice."""
    sources = tuple(views_of(outer(views_of(n)[0]))[0] for n in concatenated(node))
    return sources if _are_matrices(sources) and len(set(sources)) == len(sources) else ()


def _products_with_inputs(node: Node, sources: Sequence[Node], outer: Callable[[Node], Node]) -> Products:
    """The products with a concatenation; empty if it has other uses."""
    inner = [views_of(n) for n in concatenated(node)]
    views = [(*views_of(outer(n))[1], *after) for n, after in inner]
    if len(set(map(str, views))) > 1:
        return {}
    shape = [len(sources), *sources[0].meta["val"].shape]
    with _compat.outside_of_tracing():
        value = torch.empty(shape, device="meta")
        for name, argument in views[0]:
            value = STACKED[name](value, argument)
        sizes = list(value.shape)
        apart = [u for u in node.users if op_name(u) == "aten::view" and u.args[1] == sizes]
        if len(apart) < len(node.users):
            return {}
        return _products_with([(each, value) for each in apart], shape) or {}


def _are_matrices(sources: Sequence[Node]) -> bool:
    """Whether nodes are inputs, all contiguous matrices of a type and shape that there is a kernel for."""
    if not sources or any(n.op != "placeholder" for n in sources):
        return False
    value = sources[0].meta["val"]
    return (
        isinstance(value, Tensor)
        and value.dim() == 2
        and value.device.type == "cpu"
        and products_cpp.has_kernel(value.dtype)
        and all(isinstance(n, int) and n > 0 for n in value.shape)
        and value.shape[1] * value.element_size() % VECTOR == 0
        and all(n.meta["val"].shape == value.shape and n.meta["val"].is_contiguous() for n in sources)
    )


def _products_with(stacks: Iterable[tuple[Node, Tensor]], shape: Sequence[int]) -> Products | None:
    """The products whose right factors are matrices of a stack; None if it has other uses.

    Args:
        stacks: nodes, and of each a view of a contiguous tensor of the ``shape``, of which the strides count.
    """
    found: Products = {}
    waiting = [(node, value, list(value.shape)) for node, value in stacks]
    while waiting:
        node, value, sizes = waiting.pop()
        for user in node.users:
            name, is_whole = op_name(user), list(value.shape) == sizes
            if name in _RESHAPED and _has_plain_arguments(user):
                there = sizes if name == "aten::clone" else list(cast(Any, user.args[1]))
                waiting.append((user, _reshaped(value, there), there))
            elif name in _VIEWS and is_whole and _has_plain_arguments(user):
                viewed = cast(Any, user.target)(value, *user.args[1:], **user.kwargs)
                waiting.append((user, viewed, list(viewed.shape)))
            elif name == "aten::bmm" and is_whole and user.args[1] is node and user.args[0] is not node:
                rows = _rows(value, shape) if _are_few(user) else None
                if rows is None:
                    return None
                found[user] = rows
            else:
                return None
    return found


def _has_plain_arguments(view: Node) -> bool:
    """Whether a view has one operand, and for the rest numbers and lists of these."""
    if len(view.all_input_nodes) != 1 or view.target is torch.ops.aten.view.dtype:
        return False
    return all(
        isinstance(n, int) for a in view.args[1:] for n in (a if isinstance(a, (list, tuple)) else [a])
    )


def _reshaped(value: Tensor, sizes: list[int]) -> Tensor:
    """A tensor of other sizes without a copy, or as it was: some further view may have its sizes again."""
    if sizes == list(value.shape):
        return value
    try:
        return value.view(sizes)
    except RuntimeError:
        return value


def _rows(value: Tensor, shape: Sequence[int]) -> list[int] | None:
    """Which matrices of a contiguous stack of a shape a view holds, if it holds them as they lie."""
    _, inner, columns = shape
    size = inner * columns
    if value.dim() != 3 or list(value.shape[1:]) != [inner, columns] or value.storage_offset() % size:
        return None
    if (inner > 1 and value.stride(1) != columns) or (columns > 1 and value.stride(2) != 1):
        return None
    count, first = value.shape[0], value.storage_offset() // size
    step = value.stride(0) if count > 1 else 0
    return None if step % size else [first + i * (step // size) for i in range(count)]


def _are_few(product: Node) -> bool:
    left: Any = product.args[0]
    return _compat.size_hint(left.meta["val"].shape[1]) <= MOST_ROWS
