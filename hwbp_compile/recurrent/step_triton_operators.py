"""How operators are written in Triton: as expressions of tiles, and as reductions along them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import CannotRewrite

LIBRARY = """\
import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # 1 - 2 / (e^2x + 1) has no correct digits where it is small.
    y = x * x
    small = x * (1 - y * (0.3333333333333333 - y * (0.13333333333333333 - y * 0.05396825396825397)))
    return tl.where(y < 0.0025, small, 2 * sigmoid(2 * x) - 1)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def expm1(x):
    return tl.where(x > 40, tl.exp(x), tanh(x / 2) * (tl.exp(tl.minimum(x, 40.0)) + 1))


@triton.jit
def log1p(x):
    # The rounding of 1 + x is undone by the same error in the denominator.
    y = 1 + x
    d = y - 1
    found = tl.log(y) * (x / tl.where(d == 0, 1, d))
    return tl.where(d == 0, x, tl.where(y > 1e30, tl.log(y), found))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
"""
"""What kernels call."""


def constant(x: Any) -> Any:
    """A constant of a graph, as an operator's argument is written."""
    if isinstance(x, bool):
        return "1.0" if x else "0.0"
    if isinstance(x, (int, float)):
        if math.isinf(x) or math.isnan(x):
            return f'float("{x}")'
        return f"({float(x)!r})"
    return x


def _scaled(x: str, alpha: str | None) -> str:
    return x if alpha is None else f"{alpha} * ({x})"


def _sum(sign: str) -> Callable[..., str]:
    return lambda a, b, alpha=None: f"({a}) {sign} ({_scaled(b, alpha)})"


def _divide(a: str, b: str, rounding_mode: Any = None) -> str:
    if rounding_mode is not None:
        raise CannotRewrite("division with rounding")
    return f"({a}) / ({b})"


def _function(name: str) -> Callable[..., str]:
    return lambda x: f"tl.{name}({x})"


def _comparison(sign: str) -> Callable[..., str]:
    return lambda a, b: f"({a}) {sign} ({b})"


def _clamp(x: str, low: Any = None, high: Any = None) -> str:
    x = x if low is None else f"larger({x}, {low})"
    return x if high is None else f"smaller({x}, {high})"


def _power(x: str, exponent: str) -> str:
    if exponent not in _POWERS:
        raise CannotRewrite(f"a power of {exponent} has no translation")
    return _POWERS[exponent].format(f"({x})")


_POWERS = {
    "(2.0)": "{0} * {0}",
    "(3.0)": "{0} * {0} * {0}",
    "(0.5)": "tl.sqrt({0})",
    "(-0.5)": "1 / tl.sqrt({0})",
}
_FUNCTIONS = ("exp", "log", "sqrt", "abs", "erf", "sin", "cos", "floor")
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

POINTWISE: dict[str, Callable[..., str]] = {
    "add": _sum("+"),
    "sub": _sum("-"),
    "rsub": lambda a, b, alpha=None: f"({b}) - ({_scaled(a, alpha)})",
    "mul": lambda a, b: f"({a}) * ({b})",
    "div": _divide,
    "neg": lambda x: f"-({x})",
    "sigmoid": lambda x: f"sigmoid({x})",
    "tanh": lambda x: f"tanh({x})",
    "relu": lambda x: f"larger({x}, 0.0)",
    "square": lambda x: f"({x}) * ({x})",
    "reciprocal": lambda x: f"1 / ({x})",
    "rsqrt": lambda x: f"1 / tl.sqrt({x})",
    "expm1": lambda x: f"expm1({x})",
    "log1p": lambda x: f"log1p({x})",
    "maximum": lambda a, b: f"larger({a}, {b})",
    "minimum": lambda a, b: f"smaller({a}, {b})",
    "clamp": _clamp,
    "clamp_min": lambda x, low: _clamp(x, low),
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "pow": _power,
    "where": lambda c, a, b: f"tl.where({c}, {a}, {b})",
    "logical_and": lambda a, b: f"({a}) & ({b})",
    "bitwise_and": lambda a, b: f"({a}) & ({b})",
    "logical_or": lambda a, b: f"({a}) | ({b})",
    "bitwise_or": lambda a, b: f"({a}) | ({b})",
    "logical_not": lambda x: f"({x}) == 0",
    "bitwise_not": lambda x: f"({x}) == 0",
    "addcmul": lambda c, a, b, value=None: f"({c}) + {_scaled(f'({a}) * ({b})', value)}",
    **{name: _function(name) for name in _FUNCTIONS},
    **{name: _comparison(sign) for name, sign in _COMPARISONS.items()},
}
"""Elementwise operators, as expressions of tiles."""
POINTWISE = {f"aten::{name}": write for name, write in POINTWISE.items()}
POINTWISE["prims::fma"] = lambda a, b, c: f"({a}) * ({b}) + ({c})"

LOGICAL = {f"aten::logical_{name}" for name in ("and", "or", "not")}
"""Of them those that take any number as a truth value."""
TRUTH = LOGICAL | {f"aten::{name}" for name in (*_COMPARISONS, "bitwise_and", "bitwise_or", "bitwise_not")}
"""Of them those that return truth values; for _check() lets no other integers in."""

_PLUS = ("0.0", "{0} + {1}", "tl.sum({0}, {1}, keep_dims=True)", "({0}) * {1}")
REDUCTIONS = {
    "aten::sum": _PLUS,
    "aten::mean": _PLUS,
    "aten::amax": ('float("-inf")', "larger({0}, {1})", "tl.reduce({0}, {1}, larger, keep_dims=True)", "{0}"),
    "aten::amin": (
        'float("inf")',
        "smaller({0}, {1})",
        "tl.reduce({0}, {1}, smaller, keep_dims=True)",
        "{0}",
    ),
}
"""Per reduction its neutral element, how two values are joined, how a tile is reduced along an axis, and what
so many equal elements give."""
