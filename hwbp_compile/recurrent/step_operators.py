"""How operators are written in a kernel: as views, as expressions of vectors, as reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..errors import CannotRewrite


def aten(names: str) -> set[str]:
    """Schema names, from a space-separated list."""
    return {f"aten::{name}" for name in names.split()}


VIEWS = aten(
    "view _unsafe_view reshape permute transpose t expand squeeze unsqueeze slice select split "
    "split_with_sizes alias detach clone diagonal movedim unbind contiguous lift_fresh_copy unfold _to_copy"
) | {"prims::convert_element_type", "prims::view_of"}
"""Operators that move nothing: no value is ever overwritten, so that a copy is a view as well."""

COPIES = aten("clone alias detach contiguous lift_fresh_copy") | {"prims::view_of"}
"""Of them those that change nothing at all."""

RESHAPES = aten("view _unsafe_view reshape")
CONVERSIONS = {"prims::convert_element_type", "aten::_to_copy"}
GIVE_TRUTH = aten(
    "eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not mul "
    "maximum minimum where cat amax amin"
)
"""Operators that give 0 or 1 if what they are given is so; of two of these, a sum would be 2."""


def reduced_dimensions(node: Node, rank: int) -> list[int]:
    """The dimensions that a reduction of a value of a rank goes over: all, where none are given."""
    given: Any = node.args[1] if len(node.args) > 1 else None
    if given in (None, [], ()):
        return list(range(rank))
    return [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]


def number(x: Any) -> str:
    """A constant."""
    if isinstance(x, bool):
        return "1" if x else "0"
    if math.isinf(x):
        return ("-" if x < 0 else "") + "std::numeric_limits<Real>::infinity()"
    if math.isnan(x):
        return "std::numeric_limits<Real>::quiet_NaN()"
    return f"Real({x!r})"


def _scaled(x: str, alpha: Any) -> str:
    return x if alpha == 1 else f"Vec({number(alpha)}) * {x}"


def _sum(sign: str) -> Callable[..., str]:
    return lambda a, b, alpha=1: f"{a} {sign} {_scaled(b, alpha)}"


def _divide(a: str, b: str, rounding_mode: Any = None) -> str:
    if rounding_mode is not None:
        raise CannotRewrite("division with rounding")
    return f"{a} / {b}"


def _clamp(x: str, low: Any = None, high: Any = None) -> str:
    x = x if low is None else f"at::vec::maximum({x}, {low})"
    return x if high is None else f"at::vec::minimum({x}, {high})"


def _true(x: str) -> str:
    return f"({x} != Vec(0))"


def truth(x: str) -> str:
    """1 for what is not 0, of any value."""
    return f"Vec({x}).ne(Vec(0))"


_METHODS = (
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "abs",
    "erf",
    "sin",
    "cos",
    "floor",
    "round",
)
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

POINTWISE: dict[str, Callable[..., str]] = {
    "add": _sum("+"),
    "sub": _sum("-"),
    "rsub": lambda a, b, alpha=1: f"{b} - {_scaled(a, alpha)}",
    "mul": lambda a, b: f"{a} * {b}",
    "div": _divide,
    "neg": lambda x: f"{x}.neg()",
    "sigmoid": lambda x: f"sigmoid({x})",
    "tanh": lambda x: f"hyperbolic_tangent({x})",
    "relu": lambda x: f"at::vec::maximum({x}, Vec(0))",
    "square": lambda x: f"{x} * {x}",
    "maximum": lambda a, b: f"at::vec::maximum({a}, {b})",
    "minimum": lambda a, b: f"at::vec::minimum({a}, {b})",
    "clamp": _clamp,
    "clamp_min": lambda x, low: _clamp(x, low),
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "pow": lambda a, b: f"{a} * {a}" if b == "Vec(Real(2))" else f"{a}.pow({b})",
    "where": lambda c, a, b: f"Vec::blendv({b}, {a}, {_true(c)})",
    "logical_and": lambda a, b: f"{truth(a)} * {truth(b)}",
    "bitwise_and": lambda a, b: f"{a} * {b}",
    "logical_or": lambda a, b: f"at::vec::maximum({truth(a)}, {truth(b)})",
    "bitwise_or": lambda a, b: f"at::vec::maximum({a}, {b})",
    "logical_not": lambda x: f"Vec({x}).eq(Vec(0))",
    "bitwise_not": lambda x: f"Vec(1) - {x}",
    "addcmul": lambda c, a, b, value=1: f"{c} + {_scaled(f'{a} * {b}', value)}",
    **{name: (lambda method: lambda x: f"{x}.{method}()")(name) for name in _METHODS},
    **{name: (lambda method: lambda a, b: f"Vec({a}).{method}({b})")(name) for name in _COMPARISONS},
}
"""Elementwise operators, as expressions of vectors. Truth values are 0 and 1."""
POINTWISE = {f"aten::{name}": write for name, write in POINTWISE.items()}
POINTWISE["prims::fma"] = lambda a, b, c: f"at::vec::fmadd({a}, {b}, {c})"

_INFINITY = "std::numeric_limits<Real>::infinity()"
PLUS = ("Real(0)", "{0} + {1}", "{0} + {1}")
REDUCTIONS = {
    "aten::sum": PLUS,
    "aten::mean": PLUS,
    "aten::amax": (f"-{_INFINITY}", "at::vec::maximum({0}, {1})", "max_propagate_nan({0}, {1})"),
    "aten::amin": (_INFINITY, "at::vec::minimum({0}, {1})", "min_propagate_nan({0}, {1})"),
}
"""Per reduction its neutral element, and how two vectors and two numbers are joined."""
