"""Evaluate nodes of a graph for several blocks at once, and sums over the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from .. import _compat
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
            if (found := self._product(*self._untransposed(key))) is not None:
                return found
            name = op_name(self.node(key))
            operands = self.operands(key)
            if name in COMMUTE and not self.is_leaf(operands[0]):
                return self._call(key, [self.total(operands[0]), *map(self.value, operands[1:])])
            if name == "aten::add" and len(operands) == 2 and not self.node(key).kwargs:
                return self._call(key, [self.total(o) for o in operands])
        value = self.value(key)
        return value.value.sum(0) if isinstance(value, Stacked) else value * self.members(key)

    def _untransposed(self, key: Key) -> tuple[Key, bool]:
        """What a key is the transpose of, however often, and whether it is."""
        turned = False
        while not self.is_leaf(key) and key not in self._totals and _transposes(self.node(key)):
            (key,), turned = self.operands(key), not turned
        return key, turned

    def _product(self, key: Key, turned: bool) -> Tensor | None:
        """The sum over the blocks of a matrix product, or its transpose: one product, contiguous if large."""
        if self.is_leaf(key) or key in self._totals:
            return None
        node = self.node(key)
        if op_name(node) != "aten::mm":
            return None
        a, b = map(self.value, self.operands(key))
        if not (isinstance(a, Stacked) and isinstance(b, Stacked)):
            return None
        left, right = a.value.permute(1, 0, 2).flatten(1, 2), b.value.flatten(0, 1)
        rows, columns = map(_compat.size_hint, node.meta["val"].shape)
        # Libraries are several times slower at few columns than at few rows.
        other = columns < rows if min(rows, columns) < _FEW else turned
        mm = torch.ops.aten.mm.default
        found = mm(right.t(), left.t()) if other else mm(left, right)
        return found if other == turned else found.t()

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


def _transposes(node: Node) -> bool:
    """Whether it is the transpose of a matrix."""
    name, value = op_name(node), node.meta["val"]
    if value.dim() != 2 or name not in ("aten::t", "aten::transpose", "aten::permute"):
        return False
    dims: Any = node.args[1] if name == "aten::permute" else node.args[1:] or (1, 0)
    first, second = (d % 2 for d in dims)
    return first != second and (name != "aten::permute" or first == 1)


_FEW = 32
COMMUTE = {
    f"aten::{n}" for n in ("view", "_unsafe_view", "reshape", "permute", "t", "transpose", "clone", "alias")
}
