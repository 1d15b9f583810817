"""A block as a program over stacked values: its residual path, the rest, and its direct gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..chain import Block
from .batch import batched_call
from .linear_ops import LINEARITY, PRODUCTS, is_zero_constant, op_name, same_shape
from .residual_ops import SUMS
from .split import Split

Value = Any
"""A tensor, a :class:`.batch.Stacked` tensor, a tuple of them, or None for zero."""

Part = Literal["total", "block", "direct"]

_PRODUCT_OF = {
    "prims::fma": torch.ops.aten.mul.Tensor,
    "aten::addcmul": torch.ops.aten.mul.Tensor,
    "aten::addmm": torch.ops.aten.mm.default,
    "aten::baddbmm": torch.ops.aten.bmm.default,
}


def externals_of(block: Block) -> list[Node]:
    """Everything a block reads that is not part of it, in the order of :func:`canonical_order`."""
    inside = set(block.entry) | set(block.nodes)
    found: dict[Node, None] = {}
    for node in canonical_order(block):
        for operand in node.all_input_nodes:
            if operand not in inside:
                found.setdefault(operand)
    return list(found)


def canonical_order(block: Block) -> list[Node]:
    """The block's nodes in depth-first order from its exit: the same for blocks of the same structure."""
    inside = set(block.nodes)
    seen: set[Node] = set(block.entry)
    order: list[Node] = []
    for root in block.exit:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend(
                    (n, False) for n in reversed(node.all_input_nodes) if n in inside and n not in seen
                )
    return order


class BlockProgram:
    """Evaluates one block for several members of its class at once.

    Args:
        block: the template.
        split: where its residual path runs.
        external: the value of each external node: a tensor shared by all members or ``Stacked``.
        members: how many blocks are evaluated at once.
    """

    def __init__(self, block: Block, split: Split, external: Callable[[Node], Value], members: int) -> None:
        self._block = block
        self._split = split
        self._external = external
        self._members = members
        self._order = canonical_order(block)
        self._inside = set(block.entry) | set(block.nodes)

    def block_vjp(self, w: tuple[Value, ...]) -> tuple[Value, ...]:
        """``J w``."""
        entry = dict(zip(self._block.entry, w, strict=True))
        needed = self._needed()
        values: dict[tuple[str, Node], Value] = {("total", n): v for n, v in entry.items()}
        values |= {("block", n): None for n in entry}

        def block_part(n: Node) -> Value:
            on_path = n in self._split.path or n in entry
            return values["block" if on_path else "total", n]

        for node in self._order:
            if ("total", node) in needed:
                values["total", node] = self._linear(node, lambda n: values["total", n], affine=False)
            if ("block", node) in needed:
                values["block", node] = self._linear(node, block_part, affine=False)
        return tuple(block_part(n) for n in self._block.exit)

    def direct(self) -> tuple[Value, ...]:
        """The block's affine part: gradients that join it from elsewhere, carried to its exit."""
        values: dict[Node, Value] = dict.fromkeys(self._block.entry)
        for node in self._order:
            values[node] = self._linear(node, values.__getitem__, affine=True)
        return tuple(values[n] for n in self._block.exit)

    def residual(self) -> tuple[tuple[Value, ...], ...]:
        """K: ``[exit component][entry component]``, each None, a float or a (stacked) coefficient."""
        columns = [self._coefficients(j) for j in range(len(self._block.entry))]
        return tuple(zip(*columns, strict=True))

    def _coefficients(self, component: int) -> tuple[Value, ...]:
        scalars = self._split.scalars[component]
        values: dict[Node, Value] = {}

        def value(node: Node) -> Value:
            if node not in self._split.path and node not in self._block.entry:
                return None
            known = scalars.get(node)
            if isinstance(known, float):
                like = node.meta["val"]
                return torch.full(like.shape, known, dtype=like.dtype, device=like.device)
            return None if known is None else values[node]

        for node in self._order:
            if node in self._split.path and scalars.get(node) == "tensor":
                values[node] = self._linear(node, value, affine=False)
        out = []
        for node in self._block.exit:
            known = self._split.coefficient(node, component)
            out.append(values[node] if known == "tensor" else known)
        return tuple(out)

    def _needed(self) -> set[tuple[str, Node]]:
        """Which parts of which nodes ``block_vjp`` has to compute."""
        path = self._split.path
        needed: set[tuple[str, Node]] = set()
        stack = [("block" if n in path else "total", n) for n in self._block.exit]
        entry = set(self._block.entry)
        while stack:
            part, node = stack.pop()
            if (part, node) in needed or node in entry:
                continue
            needed.add((part, node))
            for n in node.all_input_nodes:
                if n in self._inside:
                    stack.append(("block" if part == "block" and n in path else "total", n))
        return needed

    def _linear(self, node: Node, value: Callable[[Node], Value], *, affine: bool) -> Value:
        """Evaluate ``node`` on operands given by ``value``, where None is zero.

        External operands at the positions where the operator is jointly linear are affine terms: kept if
        ``affine``, else zero.
        """
        name = op_name(node)
        if name == "getitem":
            whole = value(node.args[0])  # type: ignore[arg-type]
            return None if whole is None else operator.getitem(whole, node.args[1])
        if name in PRODUCTS:
            return self._multiply_add(node, value, affine)
        linearity = LINEARITY[name]
        args = list(node.args)
        zeros: list[Node] = []
        live = False

        def resolve(n: Node, position: int) -> Value:
            nonlocal live
            if n in self._inside:
                found = value(n)
            elif linearity.kind == "joint" and position in linearity.positions:
                found = self._external(n) if affine and not is_zero_constant(n) else None
            else:
                return self._external(n)
            live |= found is not None
            if found is None:
                zeros.append(n)
                return n
            return found

        for position, argument in enumerate(args):
            args[position] = map_arg(argument, lambda n, p=position: resolve(n, p))  # type: ignore[misc]
        if not live:
            return None
        if zeros and name in SUMS and (alone := self._one_term(node, args)) is not None:
            return alone
        args = [map_arg(a, self._zeros) for a in args]
        kwargs = map_arg(node.kwargs, self._external)
        return self._call(node.target, tuple(args), kwargs, node)

    def _one_term(self, node: Node, args: list[Any]) -> Value:
        """``x + 0`` or ``0 - x`` without the zero, when that leaves shape and dtype alone."""
        index = 1 if isinstance(args[0], Node) else 0
        operand = node.args[index]
        if not isinstance(operand, Node) or isinstance(args[index], Node):
            return None
        a, b = operand.meta["val"], node.meta["val"]
        if a.dtype != b.dtype or not same_shape(a, b):
            return None
        alpha: Any = node.kwargs.get("alpha", 1)
        factor = 1 if index == 0 else alpha if op_name(node) == "aten::add" else -alpha
        value = args[index]
        return value if factor == 1 else self._call(torch.ops.aten.mul.Tensor, (value, factor), {}, node)

    def _multiply_add(self, node: Node, value: Callable[[Node], Value], affine: bool) -> Value:
        """``a * b + c``: the product is linear in one factor, the sum in both terms."""
        a, b, c = (node.args[i] for i in PRODUCTS[op_name(node)])

        def factor(x: Any) -> Value:
            return x if not isinstance(x, Node) else value(x) if x in self._inside else self._external(x)

        carries = [isinstance(x, Node) and x in self._inside for x in (a, b)]
        x, y = factor(a), factor(b)
        product = None
        if (any(carries) or affine) and x is not None and y is not None:
            product = self._call(_PRODUCT_OF[op_name(node)], (x, y), {}, node)
        term = (
            c
            if not isinstance(c, Node)
            else value(c)
            if c in self._inside
            else self._external(c)
            if affine
            else None
        )
        if product is None or term is None:
            return product if term is None else term
        return self._call(torch.ops.aten.add.Tensor, (product, term), {}, node)

    def _zeros(self, node: Node) -> Tensor:
        like = node.meta["val"]
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: Node) -> Value:
        if op_name(node) == "aten::convolution_backward":
            args = (*args[:10], self._used_outputs(node))
        return batched_call(target, args, kwargs, self._members, node)

    def _used_outputs(self, node: Node) -> list[bool]:
        """Of a convolution's backward only what the block goes on with: not the weights' gradients."""
        used = {user.args[1] for user in node.users if user in self._inside}
        return [i in used for i in range(3)]
