"""Evaluate nodes of a graph for several blocks at once, and sums over the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from .batch import Stacked, batched_call
from .linear_ops import op_name

Key = TypeVar("Key")


class Replay(ABC, Generic[Key]):
    """Evaluates what a key stands for, and all that it needs, each once.

    A key is one node, or corresponding nodes of several blocks.
    """

    def __init__(self) -> None:
        self._values: dict[Key, Any] = {}
        self._totals: dict[Key, Any] = {}

    @abstractmethod
    def node(self, key: Key) -> Node:
        """The node that says which operator to apply."""

    @abstractmethod
    def operands(self, key: Key) -> list[Key]:
        """Keys of all nodes among the operator's arguments, in order; empty for a leaf."""

    @abstractmethod
    def is_leaf(self, key: Key) -> bool:
        """Whether the value is given."""

    @abstractmethod
    def leaf(self, key: Key) -> Any:
        """A value that is given: a tensor shared by all blocks, ``Stacked``, or a number."""

    @abstractmethod
    def members(self, key: Key) -> Any:
        """How many blocks are evaluated: an int, or a symbolic one."""

    def is_used(self, node: Node) -> bool:
        """Whether an output of an operator with several is needed."""
        return True

    def value(self, key: Key) -> Any:
        """A tensor that all blocks share, ``Stacked``, or a tuple of them.

        Raises:
            CannotRewrite: an operator cannot be batched.
        """
        stack = [key]
        while stack:
            top = stack[-1]
            waiting = [] if self.is_leaf(top) else [k for k in self.operands(top) if k not in self._values]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if top not in self._values:
                self._values[top] = self._evaluate(top)
        return self._values[key]

    def total(self, key: Key) -> Any:
        """The sum over the blocks, taken as early as possible: a product sums without storing its terms."""
        if key in self._totals:
            return self._totals[key]
        if not self.is_leaf(key):
            name = op_name(self.node(key))
            operands = self.operands(key)
            if name in COMMUTE and not self.is_leaf(operands[0]):
                return self._call(key, [self.total(operands[0]), *map(self.value, operands[1:])])
            if name == "aten::add" and len(operands) == 2 and not self.node(key).kwargs:
                return self._call(key, [self.total(o) for o in operands])
            if name == "aten::mm":
                a, b = map(self.value, operands)
                if isinstance(a, Stacked) and isinstance(b, Stacked):
                    left, right = a.value.permute(1, 0, 2).flatten(1, 2), b.value.flatten(0, 1)
                    if self.node(key).meta["val"].shape[1] < self.node(key).meta["val"].shape[0]:
                        # Libraries are several times slower at few columns than at few rows.
                        return torch.ops.aten.mm.default(right.t(), left.t()).t()
                    return torch.ops.aten.mm.default(left, right)
        value = self.value(key)
        return value.value.sum(0) if isinstance(value, Stacked) else value * self.members(key)

    def _evaluate(self, key: Key) -> Any:
        if self.is_leaf(key):
            return self.leaf(key)
        return self._call(key, [self._values[k] for k in self.operands(key)])

    def _call(self, key: Key, operands: list[Any]) -> Any:
        node = self.node(key)
        values = iter(operands)
        args, kwargs = pytree.tree_map_only(Node, lambda _: next(values), (node.args, node.kwargs))
        if op_name(node) == "getitem":
            return args[0][args[1]]
        if op_name(node) == "aten::convolution_backward":
            used = {user.args[1] for user in node.users if self.is_used(user)}
            args = (*args[:10], [i in used for i in range(3)])
        return batched_call(node.target, args, kwargs, self.members(key), node)


COMMUTE = {
    f"aten::{n}" for n in ("view", "_unsafe_view", "reshape", "permute", "t", "transpose", "clone", "alias")
}
