"""First pass: the part of a joint graph that is linear in the tangents, and the residual streams in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import networkx as nx
from torch.fx import Graph, Node

from .linear_ops import is_heavy, op_name
from .residual_ops import SUMS, residual_operands

MAX_ALTERNATIVES = 6
"""How many other sources of a stream are tried."""


@dataclass(frozen=True)
class LinearPart:
    """Nodes that depend on a tangent.

    ``order`` is graph order; ``dag`` has an edge from each operand to its user; ``depth`` counts the heavy
    operators on the longest path from a tangent, which tells a block from what runs around it.
    """

    order: dict[Node, int]
    dag: nx.DiGraph[Node]
    depth: dict[Node, int]


@dataclass(frozen=True, slots=True)
class Stream:
    """A path along which the cotangent travels elementwise: where to look for a chain.

    ``alternatives`` are paths to the same end from other sources. Where a direct gradient joins close to the
    stream's start the two look alike; the one that more blocks hang on is the stream.
    """

    path: tuple[Node, ...]
    alternatives: tuple[tuple[Node, ...], ...]


def linear_part(graph: Graph) -> LinearPart:
    """Collect what depends on the tangents (placeholders that AOTAutograd names ``tangents_*``)."""
    dag: nx.DiGraph[Node] = nx.DiGraph()
    order: dict[Node, int] = {}
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        operands = [n for n in node.all_input_nodes if n in order]
        if node.op == "placeholder" and "tangents" in str(node.target):
            pass
        elif not operands or node.op == "output":
            continue
        order[node] = len(order)
        dag.add_node(node)
        dag.add_edges_from((n, node) for n in operands)
        depth[node] = max((depth[n] for n in operands), default=0) + is_heavy(node)
    return LinearPart(order, dag, depth)


def longest_stream(part: LinearPart, excluded: set[Node]) -> Stream | None:
    """The elementwise path with most merges among the nodes that are not ``excluded``, or None.

    A merge is an operand that has seen more heavy operators than the stream it joins: a block's contribution,
    not one of the terms of, say, a normalisation's backward.
    """
    reached: dict[Node, _Reached] = {}
    best: Node | None = None
    for node in part.order:
        if node in excluded:
            continue
        reached[node] = _Reached()
        for source in residual_operands(node, part.order):
            if source in excluded:
                continue
            others = [n for n in part.dag.predecessors(node) if n is not source]
            merged = any(part.depth[n] > part.depth[source] for n in others)
            candidate = _Reached(reached[source].merges + merged, reached[source].length + 1, source)
            reached[node] = max(reached[node], candidate, key=lambda r: (r.merges, r.length))
        if reached[node].merges > (reached[best].merges if best is not None else 0):
            best = node
    if best is None:
        return None
    path = _path(best, reached)
    alternatives: list[tuple[Node, ...]] = []
    for i, node in enumerate(path):
        if reached[node].merges > 2 or len(alternatives) >= MAX_ALTERNATIVES:
            break
        for other in residual_operands(node, part.order):
            beside = i > 0 and other is not path[i - 1] and other not in excluded
            if beside and part.depth[other] <= part.depth[path[i - 1]]:
                alternatives.append((*_path(other, reached), *path[i:]))
    end = _extension(part, path)
    return Stream((*path, *end), tuple((*a, *end) for a in alternatives))


@dataclass(frozen=True, slots=True)
class _Reached:
    """How a node is reached along the best elementwise path."""

    merges: int = 0
    length: int = 1
    parent: Node | None = None


def _path(node: Node, reached: dict[Node, _Reached]) -> tuple[Node, ...]:
    path = [node]
    while (parent := reached[path[-1]].parent) is not None:
        path.append(parent)
    return tuple(reversed(path))


def _extension(part: LinearPart, path: tuple[Node, ...]) -> list[Node]:
    """Further sums in which other contributions of the last block join; they run as deep as the first."""
    extension: list[Node] = []
    end = path[-1]
    before = _closure(path[0], part.dag.successors, lambda n: True)
    while True:
        behind = _closure(end, part.dag.successors, lambda n: True)
        following = next(
            (
                user
                for user in part.dag.successors(end)
                if end in residual_operands(user, part.order)
                and op_name(user) in SUMS
                and any(n in before and n not in behind for n in part.dag.predecessors(user))
            ),
            None,
        )
        if following is None:
            return extension
        extension.append(following)
        end = following


def between(part: LinearPart, source: Node, sink: Node) -> list[Node]:
    """All nodes on paths from ``source`` to ``sink``, both included, in graph order."""
    lo, hi = part.order[source], part.order[sink]
    reached = _closure(source, part.dag.successors, lambda n: part.order[n] <= hi)
    if sink not in reached:
        return []
    back = _closure(sink, part.dag.predecessors, lambda n: part.order[n] >= lo)
    return sorted(reached & back, key=part.order.__getitem__)


def _closure(
    start: Node, neighbours: Callable[[Node], Iterable[Node]], inside: Callable[[Node], bool]
) -> set[Node]:
    seen, stack = {start}, [start]
    while stack:
        for node in neighbours(stack.pop()):
            if node not in seen and inside(node):
                seen.add(node)
                stack.append(node)
    return seen
