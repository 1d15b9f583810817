"""What a piece of a graph takes: products, bytes and kernels, as expressions of the shapes' symbols."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from .. import _compat
from .linear_ops import MATRIX_PRODUCTS, op_name
from .views import SHARING

_FREE = {*SHARING, "aten::full", "aten::sym_size"}
"""Operators that take no time of their own."""
_SYMBOLIC = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, slots=True)
class Amount:
    """A number as an expression of the shapes' symbols, and its value at the sizes that were traced."""

    formula: sympy.Expr
    value: int

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.formula + other.formula, self.value + other.value)

    def __mul__(self, other: Amount) -> Amount:
        return Amount(self.formula * other.formula, self.value * other.value)

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> Amount:
        """The same for other values of the symbols."""
        return Amount(self.formula, _compat.value_of(self.formula, sizes))

    @staticmethod
    def of(size: Any) -> Amount:
        """A size, or a number of elements."""
        return Amount(_compat.size_expression(size), _compat.size_hint(size))


NOTHING = Amount(sympy.Integer(0), 0)


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product, batched or not; of another operator only the FLOPs are known."""

    flops: Amount
    sizes: tuple[Amount, ...]
    """Batch, rows, inner, columns; empty if unknown."""
    dtype: torch.dtype

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> Product:
        """The same for other values of the symbols."""
        return Product(self.flops.at(sizes), tuple(n.at(sizes) for n in self.sizes), self.dtype)


@dataclass
class Work:
    """Of some nodes: the products, each a call, and the kernels of all else, fused as a compiler would.

    Of each kernel it is known what it reads and writes, in bytes; ``depth`` is how many products follow one
    another.
    """

    products: list[Product] = field(default_factory=list)
    kernels: list[Amount] = field(default_factory=list)
    depth: int = 0

    @property
    def flops(self) -> Amount:
        """Of all products."""
        return functools.reduce(operator.add, (p.flops for p in self.products), NOTHING)

    @property
    def bytes(self) -> Amount:
        """Of all kernels."""
        return functools.reduce(operator.add, self.kernels, NOTHING)

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> Work:
        """The same for other values of the symbols."""
        return replace(
            self, products=[p.at(sizes) for p in self.products], kernels=[k.at(sizes) for k in self.kernels]
        )

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.kernels + other.kernels,
            self.depth + other.depth,
        )


def work_of(nodes: Sequence[Node], is_free: Callable[[Node], bool] = lambda _: False) -> Work:
    """Count what these nodes, in graph order, take.

    What lies between two products counts as one kernel if it hangs together or reads the same. So does all
    that waits for no product, if nothing here reads it.

    Args:
        nodes: some of a graph's.
        is_free: says of a node that it moves nothing, though it looks so.
    """
    chosen = {n for n in nodes if n.op == "call_function" and not isinstance(n.meta.get("val"), _SYMBOLIC)}
    products = [n for n in nodes if _is_product(n)]
    level = _levels(nodes, chosen)
    group: dict[Node, Node] = {}

    def leader(node: Node) -> Node:
        while group[node] is not node:
            group[node] = group[group[node]]
            node = group[node]
        return node

    reader: dict[tuple[int, Node], Node] = {}
    for node in nodes:
        if node not in chosen or _is_product(node) or op_name(node) in _FREE or is_free(node):
            continue
        group[node] = node
        for n in _behind_views(node, chosen):
            if n in group and level[n] == level[node]:
                group[leader(n)] = leader(node)
            other = reader.setdefault((level[node], n), node)
            group[leader(other)] = leader(node)
    alone = [n for n in group if level[n] < 0]
    for n in alone:
        group[leader(n)] = leader(alone[0])
    return Work(
        [_product(n) for n in products],
        _moved(group, leader, chosen),
        max((level[n] + 1 for n in products), default=0),
    )


def _levels(nodes: Sequence[Node], chosen: set[Node]) -> dict[Node, int]:
    """How many products precede a node; if none, as many as precede the first that reads it, or -1."""
    level: dict[Node, int] = {}
    for node in nodes:
        if node in chosen:
            inputs = [n for n in node.all_input_nodes if n in chosen]
            level[node] = max((level[n] + _is_product(n) for n in inputs), default=0)
    for node in reversed(nodes):
        if node in chosen and level[node] == 0 and not _is_product(node):
            level[node] = min((level[n] for n in node.users if n in chosen), default=-1)
    return level


def _moved(group: dict[Node, Node], leader: Callable[[Node], Node], chosen: set[Node]) -> list[Amount]:
    """What each kernel reads and writes."""
    reads: dict[tuple[Node, Node], None] = {}
    writes: dict[Node, None] = {}
    for node in group:
        for n in _behind_views(node, chosen):
            if n not in group:
                reads[leader(node), n] = None
            elif leader(n) is not leader(node):
                reads[leader(node), n] = None
                writes[n] = None
        if any(u not in group for u in _users_behind_views(node)):
            writes[node] = None
    total = {leader(n): NOTHING for n in group}
    for kernel, node in [*reads, *((leader(n), n) for n in writes)]:
        total[kernel] += _size(node)
    return list(total.values())


def _behind_views(node: Node, chosen: set[Node]) -> list[Node]:
    """What a node reads, seen through views."""
    found = []
    for n in node.all_input_nodes:
        while n in chosen and op_name(n) in _FREE and n.all_input_nodes:
            n = n.all_input_nodes[0]
        found.append(n)
    return found


def _users_behind_views(node: Node) -> list[Node]:
    found, stack = [], list(node.users)
    while stack:
        user = stack.pop()
        if user.op == "call_function" and op_name(user) in _FREE:
            stack.extend(user.users)
        else:
            found.append(user)
    return found


def _is_product(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in flop_registry


def _product(node: Node) -> Product:
    value = node.meta["val"]
    first = value if isinstance(value, Tensor) else next(v for v in value if isinstance(v, Tensor))
    if op_name(node) in MATRIX_PRODUCTS:
        operands: Any = [x for x in node.args if isinstance(x, Node)][-2:]
        a, b = (x.meta["val"] for x in operands)
        batch = Amount.of(a.shape[0] if a.dim() == 3 else 1)
        rows, inner, columns = (Amount.of(n) for n in (*a.shape[-2:], b.shape[-1]))
        flops = Amount.of(2) * batch * rows * inner * columns
        return Product(flops, (batch, rows, inner, columns), first.dtype)
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    target: Any = node.target
    out = value if isinstance(value, Tensor) else tuple(value)
    return Product(
        Amount.of(flop_registry[target.overloadpacket](*args, **kwargs, out_val=out)), (), first.dtype
    )


def _size(node: Node) -> Amount:
    value = node.meta.get("val")
    tensors = [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, Tensor)]
    parts = [
        Amount.of(v.numel()) * Amount(sympy.Integer(v.dtype.itemsize), v.dtype.itemsize) for v in tensors
    ]
    return functools.reduce(operator.add, parts, NOTHING)
