"""Views of rows, and the same views of all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from .linear_ops import op_name

Views = tuple[tuple[str, Any], ...]
"""Names of operators with their arguments, the first one first."""


@dataclass(frozen=True, slots=True)
class Row:
    """Row ``row`` of ``base``, and the views of it that follow."""

    base: Node
    row: int
    views: Views = ()

    def kind(self) -> tuple[Any, ...]:
        """What rows have in common that can be taken as one slice."""
        return self.base, str(self.views)


def row_of(node: Node) -> Row | None:
    """The row that a node is a view of, if it is one."""
    source, views = views_of(node)
    if source.op != "call_function":
        return None
    name, base = op_name(source), source.args[0]
    if name == "aten::select" and source.args[1] == 0 and isinstance(source.args[2], int):
        return _of(base, source.args[2], views)
    if name != "getitem" or not isinstance(base, Node) or base.op != "call_function":
        return None
    if op_name(base) != "aten::unbind" or dim_of(base) != 0:
        return None
    return _of(base.args[0], source.args[1], views)


def _of(base: Any, row: Any, views: Views) -> Row | None:
    size = base.meta["val"].shape[0]
    return Row(base, row % size, views) if isinstance(size, int) else None


def views_of(node: Node) -> tuple[Node, Views]:
    """What a node is a view of, and the views."""
    views: list[tuple[str, Any]] = []
    while node.op == "call_function" and op_name(node) in STACKED and len(node.all_input_nodes) == 1:
        views.append((op_name(node), node.args[1:]))
        (node,) = node.all_input_nodes
    return node, tuple(reversed(views))


def is_view(node: Node) -> bool:
    """Whether the result of an operator shares the memory of its first argument, or may."""
    return op_name(node) in SHARING


def concatenated(node: Node) -> list[Node]:
    """What a node concatenates along the first dimension; empty if it does not."""
    if node.op != "call_function" or op_name(node) != "aten::cat" or dim_of(node) != 0:
        return []
    parts: Any = node.args[0]
    return list(parts)


def dim_of(node: Node) -> Any:
    """The argument ``dim`` of an operator that has it second, 0 by default."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _permuted(x: Tensor, args: Any) -> Tensor:
    return x.permute(0, *(d % (x.dim() - 1) + 1 for d in args[0]))


def _unsqueezed(x: Tensor, args: Any) -> Tensor:
    return x.unsqueeze(args[0] % x.dim() + 1)


SHARING = {"getitem"} | {
    f"aten::{n}"
    for n in (
        "view", "_unsafe_view", "reshape", "permute", "t", "transpose", "unsqueeze", "squeeze", "expand",
        "select", "slice", "unbind", "alias", "detach", "split", "split_with_sizes", "as_strided",
        "diagonal", "unfold", "view_as_real", "view_as_complex", "_reshape_alias", "narrow", "movedim",
        "_conj", "real", "imag", "lift_fresh", "contiguous",
    )
}  # fmt: skip
"""Operators whose result shares the memory of their first argument, or may."""

STACKED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "aten::permute": _permuted,
    "aten::t": lambda x, _: x.transpose(1, 2) if x.dim() == 3 else x,
    "aten::transpose": lambda x, args: x.transpose(*(d % (x.dim() - 1) + 1 for d in args)),
    "aten::unsqueeze": _unsqueezed,
    "aten::view": lambda x, args: x.reshape(x.shape[0], *args[0]),
}
"""For each view of a row, the view of all rows at once."""
