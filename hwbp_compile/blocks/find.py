"""Where the forward pass of a joint graph applies one block after the other, each with values of its own.

The stacks that the backward pass reads tell which values of the blocks correspond. From there each block is
compared with one of them, node by node.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from .. import stack_op as stack_op  # the operator
from ..passes.chains import live_sets
from ..passes.classes import form, value_text
from ..passes.early import dependent_on_tangents
from ..passes.linear_ops import nodes_in
from ..passes.views import views_of

STACK = torch.ops.hwbp_compile.stack.default
FEWEST = 4
"""Blocks from which on they are looked for."""


@dataclass(frozen=True)
class ForwardBlocks:
    """Equal blocks, each applied to the result of the one before; numbered from the last one to the first.

    ``template`` are the nodes of one block in graph order, ``entry`` and ``exit`` its state before and after,
    ``leaves`` what it reads besides. The nodes of block i that correspond to these are in ``blocks[i]``.
    """

    template: tuple[Node, ...]
    entry: Node
    exit: Node
    leaves: tuple[Node, ...]
    blocks: tuple[Mapping[Node, Node], ...]

    def column(self, node: Node) -> tuple[Node | None, ...]:
        """The nodes of all blocks that correspond to one of the template; None where there is none."""
        return tuple(block.get(node) for block in self.blocks)

    @functools.cached_property
    def inside(self) -> frozenset[Node]:
        """All nodes of the blocks."""
        return frozenset(b[t] for b in self.blocks for t in self.template if t in b)

    @property
    def states(self) -> tuple[Node, ...]:
        """The last state, then those before it, and the first one."""
        return (*(b[self.exit] for b in self.blocks), self.blocks[-1][self.entry])


def find_forward_blocks(graph: Graph) -> list[ForwardBlocks]:
    """The runs of blocks that stacks of the backward pass belong to, from the loss to the input."""
    late = dependent_on_tangents(graph)
    columns = [tuple(n.args[0]) for n in graph.nodes if _is_stack(n, late)]
    place = {node: i for i, node in enumerate(graph.nodes)}
    columns.sort(key=len, reverse=True)
    taken: set[Node] = set()
    runs: list[ForwardBlocks] = []
    for column in columns:
        if not taken.isdisjoint(column):
            continue
        found = _blocks_of(column, [c for c in columns if taken.isdisjoint(c)], late, place)
        if found is not None and taken.isdisjoint(found.inside):
            taken |= found.inside
            runs.append(found)
    return sorted(runs, key=lambda found: place[found.states[0]], reverse=True)


def _is_stack(node: Node, late: Collection[Node]) -> bool:
    """Whether a node stacks values of as many blocks that the forward pass computes."""
    if node.target is not STACK:
        return False
    rows = node.all_input_nodes
    distinct = len(rows) == len(node.args[0]) >= FEWEST  # type: ignore[arg-type]
    given = all(views_of(n)[0].op == "placeholder" for n in rows)
    return distinct and not given and not any(n in late for n in rows)


def _blocks_of(
    column: Sequence[Node],
    columns: Sequence[Sequence[Node]],
    late: Collection[Node],
    place: Mapping[Node, int],
) -> ForwardBlocks | None:
    """The blocks that hold corresponding values, the last block's first; None if they are not equal."""
    # The second block, as nothing tells where the first one begins.
    one, two, three, four = column[:-5:-1]
    entry, exit_ = _cut(one, two, three, late, place), _cut(two, three, four, late, place)
    if entry is None or exit_ is None:
        return None
    after, beyond = _descendants(entry, late), _descendants(exit_, late)
    roots: dict[Node, tuple[Sequence[Node], int]] = {}
    for each in columns:
        here = [i for i, n in enumerate(each) if n in after and n not in beyond]
        if len(here) == 1:
            roots[each[here[0]]] = each, here[0]
    template = sorted(_needed_for([exit_, *roots], after), key=place.__getitem__)
    matcher = _Matcher(entry, template, late)
    blocks: list[dict[Node, Node]] = []
    for i in range(len(column)):
        mapping: dict[Node, Node] = {}
        for root, (rows, position) in roots.items():
            at = position + i - (len(column) - 2)
            if 0 <= at < len(rows) and not matcher.match(root, rows[at], mapping):
                return None
        # The next block begins where this one ends; after the last one, it is the first place that fits.
        ends = [blocks[-1][entry]] if blocks else sorted(_descendants(column[0], late), key=place.__getitem__)
        if not any(matcher.match(exit_, end, mapping) for end in ends):
            return None
        blocks.append(mapping)
    found = ForwardBlocks(tuple(template), entry, exit_, matcher.leaves, tuple(blocks))
    return found if _is_in_sequence(found, late) else None


def _is_in_sequence(found: ForwardBlocks, late: Collection[Node]) -> bool:
    """Whether each block is applied to the result of the one before, and reads nothing else of the blocks."""
    blocks = found.blocks
    chained = all(b[found.entry] is a[found.exit] for b, a in itertools.pairwise(blocks))
    inner = [b[t] for b in blocks for t in found.template if t in b]
    first = blocks[-1][found.entry]
    inside = {first, *_descendants(first, late)}
    known = all(leaf in b and b[leaf] not in inside for b in blocks for leaf in found.leaves)
    return chained and known and len(set(inner)) == len(inner) and first not in inner


class _Matcher:
    """Compares blocks with a template, node by node.

    Attributes:
        leaves: what the template reads besides its state.
    """

    def __init__(self, entry: Node, template: Sequence[Node], late: Collection[Node]) -> None:
        self._entry, self._late = entry, late
        self._template = dict.fromkeys(template)
        read = (n for t in template for n in t.all_input_nodes)
        self.leaves = tuple(dict.fromkeys(n for n in read if n not in self._template and n is not entry))

    def match(self, node: Node, other: Node, mapping: dict[Node, Node]) -> bool:
        """Whether ``other`` is computed as ``node`` is; adds what corresponds to what to ``mapping``."""
        new: dict[Node, Node] = {}
        waiting = [(node, other)]
        while waiting:
            mine, its = waiting.pop()
            known = mapping.get(mine) or new.get(mine)
            if known is its:
                continue
            if known is not None or its in self._late:
                return False
            new[mine] = its
            if mine not in self._template:
                if value_text(mine) != value_text(its):
                    return False
                continue
            if its.op != "call_function" or form(mine) != form(its):
                return False
            operands = [list(nodes_in((n.args, n.kwargs))) for n in (mine, its)]
            waiting.extend(zip(*operands, strict=True))
        mapping.update(new)
        return True


def _cut(a: Node, b: Node, c: Node, late: Collection[Node], place: Mapping[Node, int]) -> Node | None:
    """The last node that all ways from ``a`` to ``c`` lead through, up to ``b``, which has to be on one."""
    between = sorted(_needed_for([c], _descendants(a, late)), key=place.__getitem__)
    found = None
    for node, alive in zip(between, live_sets(between), strict=True):
        found = node if len(alive) == 1 else found
        if node is b:
            return found
    return None


def _descendants(node: Node, late: Collection[Node]) -> set[Node]:
    """What the forward pass computes from a node."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        new = [u for u in stack.pop().users if u.op == "call_function" and u not in late and u not in found]
        found.update(new)
        stack.extend(new)
    return found


def _needed_for(roots: Iterable[Node], among: Collection[Node]) -> set[Node]:
    """Those ``among`` some nodes that the roots are computed from, and these themselves."""
    found = {n for n in roots if n in among}
    stack = list(found)
    while stack:
        new = {n for n in stack.pop().all_input_nodes if n in among and n not in found}
        found |= new
        stack.extend(new)
    return found
