"""Which operators the residual path passes through: the elementwise linear ones.

Anything else belongs to the block. Views that keep the row-major order may stand on the path; a permutation
may not, since a diagonal in another layout is no diagonal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch.fx import Node

from .linear_ops import PRODUCTS, op_name, same_shape

SAME_ORDER_VIEWS = {"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::squeeze", "aten::unsqueeze"}
COPIES = {"aten::clone", "aten::alias", "aten::detach", "aten::_to_copy", "prims::convert_element_type"}
SUMS = {"aten::add", "aten::sub"}
QUOTIENTS = {"aten::div", "aten::true_divide"}
ELEMENTWISE_PRODUCTS = {"aten::mul": (0, 1), "prims::fma": (0, 1), "aten::addcmul": (1, 2)}

Scalar = float | None | Literal["tensor"]
"""What is known of a coefficient without computing it: a number, zero (None) or only that it is a tensor."""


def residual_operands(node: Node, dependent: Collection[Node] | Mapping[Node, Any]) -> list[Node]:
    """The operands in ``dependent`` that pass elementwise into ``node``, each element to the same place."""
    if node.op != "call_function":
        return []
    name = op_name(node)
    args = node.args

    def carries(value: Any) -> bool:
        return isinstance(value, Node) and value in dependent

    candidates: list[Any] = []
    if name in SAME_ORDER_VIEWS or name in COPIES or name in ("aten::neg", "aten::masked_fill"):
        candidates = [args[0]]
    elif name in SUMS:
        candidates = list(args[:2])
    elif name in ELEMENTWISE_PRODUCTS:
        a, b = (args[i] for i in ELEMENTWISE_PRODUCTS[name])
        if not (carries(a) and carries(b)) and not node.kwargs:
            candidates = [a, b, *(args[i] for i in PRODUCTS.get(name, ())[2:])]
    elif name in QUOTIENTS:
        if not carries(args[1]) and node.kwargs.get("rounding_mode") is None:
            candidates = [args[0]]
    elif name == "aten::where" and not carries(args[0]):
        candidates = list(args[1:3])
    return [c for c in candidates if carries(c) and _keeps_elements(c, node)]


def _keeps_elements(operand: Node, node: Node) -> bool:
    """Whether there is one element of the result for each of the operand, in the same row-major order."""
    a, b = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if not (a.is_floating_point() and b.is_floating_point()):
        return False
    if op_name(node) in SAME_ORDER_VIEWS:
        return True
    return same_shape(a, b)


def scalar_coefficient(node: Node, scalars: Mapping[Node, Scalar]) -> Scalar:
    """The coefficient of ``node`` if it is the same number for all elements, from those of its operands.

    A provable 1.0 is what allows a plain cumulative sum, so nothing here is guessed.
    """
    name, args = op_name(node), node.args
    known = [scalars.get(a) if isinstance(a, Node) else None for a in args]

    def times(c: Scalar, factor: Any) -> Scalar:
        if c is None:
            return None
        if c == "tensor" or isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return "tensor"
        return c * float(factor)

    if name in SAME_ORDER_VIEWS or name in COPIES:
        return known[0]
    if name == "aten::neg":
        return times(known[0], -1.0)
    if name in SUMS:
        alpha = node.kwargs.get("alpha", 1)
        a, b = known[0], times(known[1], alpha) if alpha != 1 else known[1]
        if name == "aten::sub":
            b = times(b, -1.0)
        if a is None or b is None:
            return b if a is None else a
        return "tensor" if a == "tensor" or b == "tensor" else a + b
    if name == "aten::mul":
        return times(known[0], args[1]) if known[0] is not None else times(known[1], args[0])
    if name in QUOTIENTS:
        divisor = args[1]
        usable = isinstance(divisor, (int, float)) and not isinstance(divisor, bool) and divisor != 0
        return times(known[0], 1.0 / divisor if usable else None)  # type: ignore[operator]
    return None if all(c is None for c in known) else "tensor"


_NAMES = {
    "aten::sigmoid": "gate",
    "aten::hardsigmoid": "gate",
    "aten::rsqrt": "normalisation scale",
    "aten::native_layer_norm": "normalisation scale",
    "aten::le": "mask",
    "aten::lt": "mask",
    "aten::gt": "mask",
    "aten::ge": "mask",
    "aten::ne": "mask",
    "aten::eq": "mask",
    "aten::bernoulli": "mask",
    "aten::relu": "mask",
}
_LOOK_BACK = 12


def describe_factors(nodes: Collection[Node], dependent: Collection[Node]) -> str:
    """Name the kind of a tensor-valued K by what its factors were computed from."""
    found: set[str] = set()
    for node in nodes:
        factors = [a for a in node.args if isinstance(a, Node) and a not in dependent]
        if op_name(node) in SUMS or op_name(node) in SAME_ORDER_VIEWS:
            continue
        for factor in factors:
            value = factor.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
                found.add("mask")
            elif (name := _origin(factor)) is not None:
                found.add(name)
    if "gate" in found:
        return "gate"
    return " x ".join(sorted(found)) if found else "diagonal"


def _origin(node: Node) -> str | None:
    """The nearest telling operator that ``node`` was computed from."""
    frontier, seen = [node], {node}
    for _ in range(_LOOK_BACK):
        for n in frontier:
            if (name := _NAMES.get(op_name(n))) is not None:
                return name
        following = [
            m for n in frontier for m in n.all_input_nodes if m not in seen and m.op == "call_function"
        ]
        seen.update(following)
        frontier = following[:16]
    return None
