"""Recognise nodes that hold the same value: views and casts of one source, made once for each use.

An unrolled loop transposes its weight at every step. Without this, that would look like a different weight
for each block: many small products instead of a large one.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from .linear_ops import op_name

_CASTS = {"prims::convert_element_type", "aten::_to_copy"}


class SameValue:
    """Maps each node to the first one asked for that holds the same value."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Node] = {}
        self._representative: dict[Node, Node] = {}

    def __call__(self, node: Node) -> Node:
        """The representative of ``node``."""
        path = []
        while node not in self._representative:
            path.append(node)
            if not _is_cheap_copy(node) or not isinstance(node.args[0], Node):
                break
            node = node.args[0]
        for each in reversed(path):
            self._representative[each] = self._number(each)
        return self._representative[path[0] if path else node]

    def _number(self, node: Node) -> Node:
        if not _is_cheap_copy(node):
            return node
        args = map_arg(node.args, lambda n: self._representative.get(n, n))
        key = (node.target, str(args), str(node.kwargs))
        return self._known.setdefault(key, node)


def _is_cheap_copy(node: Node) -> bool:
    return node.op == "call_function" and (op_name(node) in _CASTS or getattr(node.target, "is_view", False))
