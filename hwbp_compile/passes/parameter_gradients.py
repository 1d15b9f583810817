"""Gradients that hang on the blocks of a chain, those of the parameters above all, for all blocks at once.

They are no part of the iteration: each is computed once, from the last cotangents. Left as they are they are
right, but there are as many small products as there are layers. Here gradients of the same structure, one
from each of several blocks, are found and computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..chain import Chain
from ..system import State
from .batch import Stacked
from .classes import value_text
from .linear import LinearPart
from .linear_ops import nodes_in, op_name
from .replay import Replay
from .rows import gather
from .same_value import SameValue

Column = tuple[Node, ...]
"""Corresponding nodes of several blocks."""


@dataclass(frozen=True, slots=True)
class GradientGroup:
    """One gradient of each of several blocks, all computed by the same operators."""

    members: tuple[int, ...]
    """Positions of the blocks in the chain, and L for what follows it."""
    nodes: Column
    summed: bool = False
    """Whether only their sum is used, as for a weight that the blocks share."""


class Owners:
    """Which block each gradient belongs to: it depends on the tangents only through that block's values.

    The cotangents of the states belong to no block; block p's own gradients may read numbers p and p + 1.
    What reads number L alone counts as block L: often that is one more block like the others, whose input
    needs no gradient.
    """

    def __init__(self, chain: Chain, part: LinearPart, taken: set[Node]) -> None:
        self.order = part.order
        self.states: dict[Node, tuple[int, int]] = {
            node: (p, i) for p, block in enumerate(chain.blocks) for i, node in enumerate(block.entry)
        }
        last = len(chain.blocks)
        self.states.update((node, (last, i)) for i, node in enumerate(chain.blocks[-1].exit))
        self.of: dict[Node, int] = {}
        for p, block in enumerate(chain.blocks):
            self.of.update((node, p) for node in block.nodes if node not in self.states)
        for node in part.order:
            if node in self.of or node in self.states or node in taken:
                continue
            owner = self._owner(list(part.dag.predecessors(node)))
            if owner is not None:
                self.of[node] = owner
        self._taken = taken

    def _owner(self, operands: list[Node]) -> int | None:
        """The block that computes something from these values alone, if there is one."""
        owned = {self.of[n] for n in operands if n in self.of}
        rows = {self.states[n][0] for n in operands if n in self.states}
        if not operands or len(owned) > 1 or not all(n in self.of or n in self.states for n in operands):
            return None
        owner = owned.pop() if owned else min(rows)
        return owner if rows <= {owner, owner + 1} else None

    def state(self, node: Node, owner: int) -> tuple[int, int] | None:
        """For a state's cotangent next to block ``owner``: 0 before it or 1 behind it, and the component."""
        row, component = self.states.get(node, (-1, 0))
        return (row - owner, component) if row in (owner, owner + 1) else None

    def is_outside(self, node: Node, owner: int) -> bool:
        """Whether a block reads this from somewhere else."""
        return self.of.get(node) != owner and self.state(node, owner) is None

    def leaving(self) -> Iterator[tuple[Node, int]]:
        """Gradients that something outside of their block reads, with the block; in graph order by block."""
        for node, p in self.of.items():
            if self.is_gradient(node) and any(
                self.of.get(user) != p and user not in self._taken for user in node.users
            ):
                yield node, p

    def is_gradient(self, node: Node) -> bool:
        """Whether a node is a block's own tensor."""
        return node in self.of and isinstance(node.meta.get("val"), Tensor)


def find_groups(chain: Chain, part: LinearPart, taken: set[Node]) -> tuple[Owners, list[GradientGroup]]:
    """Gradients that hang on two blocks or more in the same way. Nothing is changed.

    Where gradients differ only in how they end, such as in the place of an unrolled input that they belong
    to, what they end in is left and the group is made of what it reads.
    """
    owners = Owners(chain, part, taken)
    structure = _Structure(owners)
    found: list[GradientGroup] = []
    candidates = dict(owners.leaving())
    tried: set[Node] = set()
    while candidates:
        tried.update(candidates)
        alike = _alike(candidates, structure, part.order)
        found.extend(g for g in alike if len(g.nodes) > 1)
        alone = [n for g in alike if len(g.nodes) == 1 for n in g.nodes]
        candidates = {
            n: owners.of[n]
            for node in alone
            for n in node.all_input_nodes
            if owners.is_gradient(n) and owners.of[n] == owners.of[node] and n not in tried
        }
    return owners, found


def _alike(
    candidates: dict[Node, int], structure: Callable[[Node], int], order: dict[Node, int]
) -> list[GradientGroup]:
    """All candidates in groups of one structure, at most one of each block."""
    groups: dict[tuple[int, int], dict[int, Node]] = {}
    seen: dict[tuple[int, int], int] = {}
    for node in sorted(candidates, key=order.__getitem__):
        kind, p = structure(node), candidates[node]
        # Two weights of one block may be alike: the first belongs with the other blocks' first.
        occurrence = seen[kind, p] = seen.get((kind, p), 0) + 1
        groups.setdefault((kind, occurrence), {})[p] = node
    found = []
    for group in groups.values():
        members = tuple(sorted(group))
        nodes = tuple(group[p] for p in members)
        found.append(GradientGroup(members, nodes, _only_summed(nodes)))
    return found


class _Structure:
    """Numbers nodes by what computes them from their block's entry: equal if one program serves both."""

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self._numbers: dict[Node, int] = {}
        self._known: dict[tuple[Any, ...], int] = {}

    def __call__(self, root: Node) -> int:
        owner = self._owners.of[root]
        stack = [root]
        while stack:
            node = stack[-1]
            inner = [n for n in node.all_input_nodes if self._owners.of.get(n) == owner]
            waiting = [n for n in inner if n not in self._numbers]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            self._numbers[node] = self._known.setdefault(self._key(node, owner), len(self._known))
        return self._numbers[root]

    def _key(self, node: Node, owner: int) -> tuple[Any, ...]:
        def name(n: Node) -> Any:
            if self._owners.of.get(n) == owner:
                return f"#{self._numbers[n]}"
            state = self._owners.state(n, owner)
            return f"({value_text(n)})" if state is None else f"state{state}"

        arguments = str(map_arg((node.args, node.kwargs), name))
        return (str(node.target), arguments, value_text(node))


def _only_summed(nodes: Column) -> bool:
    """Whether all of them are nothing but terms of one plain sum."""
    roots = set()
    for node in nodes:
        end = node
        while (user := _plain_addition(end)) is not None:
            end = user
        roots.add(end)
    return len(roots) == 1 and roots.isdisjoint(nodes)


def _plain_addition(node: Node) -> Node | None:
    """The only user of a node, if that adds another tensor of the same shape and dtype to it."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if op_name(user) != "aten::add" or user.kwargs or len(user.all_input_nodes) != 2 or len(user.args) != 2:
        return None
    text = value_text(node)
    return user if all(value_text(n) == text for n in (user, *user.all_input_nodes)) else None


class GradientProgram(Replay[Column]):
    """Evaluates groups of gradients from the last cotangents.

    Args:
        owners: which nodes are the blocks' own.
        groups: all that will be asked for.
        value: the value of any node that is not.
        w: the cotangents of all states, stacked ``[blocks + 1, ...]`` per component.
        known: the blocks' own nodes whose values are there: their row of which stack.
        stacks: see ``known``.
    """

    def __init__(
        self,
        owners: Owners,
        groups: list[GradientGroup],
        value: Callable[[Node], Any],
        w: State,
        known: Mapping[Node, tuple[int, int]],
        stacks: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self._owners = owners
        self._outer = value
        self._w = w
        self._known, self._stacks = known, stacks
        self._blocks: tuple[int, ...] = ()
        self._used = _ancestors(owners, groups)
        self._same = SameValue()

    def __call__(self, group: GradientGroup) -> Any:
        """The gradients, ``Stacked``, or their sum, a tensor.

        Raises:
            CannotRewrite: an operator cannot be batched.
        """
        self._blocks = group.members
        return self.total(group.nodes) if group.summed else self.value(group.nodes)

    def node(self, key: Column) -> Node:
        """The first block's."""
        return key[0]

    def members(self, key: Column) -> int:
        """One for each node."""
        return len(key)

    def operands(self, key: Column) -> list[Column]:
        """Column by column."""
        return list(zip(*(nodes_in((n.args, n.kwargs)) for n in key), strict=True))

    def is_used(self, node: Node) -> bool:
        """Whether a group needs it."""
        return node in self._used

    def is_leaf(self, key: Column) -> bool:
        """Whether these are cotangents of states, known, or not the blocks' own."""
        return self._stack(key) is not None or not all(
            self._owners.of.get(n) == p for n, p in zip(key, self._blocks, strict=True)
        )

    def leaf(self, key: Column) -> Any:
        """Cotangents of states are rows of ``w``; what differs between the blocks is stacked."""
        states = {self._owners.state(n, p) for n, p in zip(key, self._blocks, strict=True)}
        if len(states) == 1 and (state := states.pop()) is not None:
            side, component = state
            return Stacked(gather(self._w[component], [p + side for p in self._blocks]))
        if (stack := self._stack(key)) is not None:
            return Stacked(gather(self._stacks[stack], [self._known[n][1] for n in key]))
        first = self._outer(key[0])
        if len({self._same(n) for n in key}) == 1 or not isinstance(first, Tensor):
            return first
        return Stacked(torch.stack([self._outer(n) for n in key]))

    def _stack(self, key: Column) -> int | None:
        """The stack that all of these are rows of."""
        stacks = {self._known[n][0] if n in self._known else None for n in key}
        return stacks.pop() if len(stacks) == 1 else None


def read_of_blocks(owners: Owners, groups: list[GradientGroup], blocks: Set[Node]) -> set[Node]:
    """The nodes of a chain's blocks whose values the groups need, cotangents of states among them."""
    outside = [n for n in _ancestors(owners, groups) if n not in blocks]
    own = [n for group in groups for n in group.nodes]
    return {n for n in (*own, *(o for n in outside for o in n.all_input_nodes)) if n in blocks}


def _ancestors(owners: Owners, groups: list[GradientGroup]) -> set[Node]:
    """The gradients and all that their own blocks compute for them."""
    seen = {node for group in groups for node in group.nodes}
    stack = list(seen)
    while stack:
        node = stack.pop()
        for n in node.all_input_nodes:
            if n not in seen and owners.of.get(n) == owners.of[node]:
                seen.add(n)
                stack.append(n)
    return seen


def read_by(owners: Owners, groups: list[GradientGroup]) -> dict[Node, None]:
    """What the groups read from outside of their blocks, in order."""
    found: dict[Node, None] = {}
    for node in sorted(_ancestors(owners, groups), key=owners.order.__getitem__):
        for operand in node.all_input_nodes:
            if owners.is_outside(operand, owners.of[node]):
                found.setdefault(operand)
    return found


def keep_one_term(graph: Graph, group: GradientGroup, renamed: dict[Node, Node]) -> None:
    """Take all nodes of a summed group but the first out of the sum that they end in."""
    for node in group.nodes[1:]:
        (addition,) = node.users
        (other,) = (n for n in addition.all_input_nodes if n is not node)
        addition.replace_all_uses_with(other)
        renamed[addition] = other
        graph.erase_node(addition)
