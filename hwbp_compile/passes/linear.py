"""First pass: the part of a joint graph that is linear in the tangents, and the residual streams in it."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch.fx import Graph, Node

from .linear_ops import is_heavy
from .residual_ops import residual_operands


@dataclass(frozen=True)
class LinearPart:
    """Nodes that depend on a tangent.

    ``order`` is graph order; ``dag`` has an edge from each operand to its user; ``depth`` counts the heavy
    operators on the longest path from a tangent, which tells a block from what runs around it.
    """

    order: dict[Node, int]
    dag: nx.DiGraph
    depth: dict[Node, int]


@dataclass(frozen=True, slots=True)
class Stream:
    """A path along which the cotangent travels elementwise: where to look for a chain."""

    path: tuple[Node, ...]
    merges: int
    """How often a block's contribution joins it."""


def linear_part(graph: Graph) -> LinearPart:
    """Collect what depends on the tangents (placeholders that AOTAutograd names ``tangents_*``)."""
    dag = nx.DiGraph()
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

    A merge is an operand that has seen more heavy operators than the stream it joins: a block, not one of
    the terms of, say, a normalisation's backward.
    """
    score: dict[Node, int] = {}
    parent: dict[Node, Node] = {}
    best: Node | None = None
    dependent = part.order
    for node in part.order:
        if node in excluded:
            continue
        score[node] = 0
        for source in residual_operands(node, dependent):
            if source in excluded:
                continue
            others = [n for n in part.dag.predecessors(node) if n is not source]
            merged = any(part.depth[n] > part.depth[source] for n in others)
            if node not in parent or score[source] + merged > score[node]:
                score[node], parent[node] = score[source] + merged, source
        if score[node] > (score[best] if best is not None else 0):
            best = node
    if best is None:
        return None
    path = [best]
    while path[-1] in parent:
        path.append(parent[path[-1]])
    return Stream(tuple(reversed(path)), score[best])


def between(part: LinearPart, source: Node, sink: Node) -> list[Node]:
    """All nodes on paths from ``source`` to ``sink``, both included, in graph order."""
    lo, hi = part.order[source], part.order[sink]
    reached = _closure(source, part.dag.successors, lambda n: part.order[n] <= hi)
    if sink not in reached:
        return []
    back = _closure(sink, part.dag.predecessors, lambda n: part.order[n] >= lo)
    return sorted(reached & back, key=part.order.__getitem__)


def _closure(start, neighbours, inside) -> set[Node]:  # type: ignore[no-untyped-def]
    seen, stack = {start}, [start]
    while stack:
        for node in neighbours(stack.pop()):
            if node not in seen and inside(node):
                seen.add(node)
                stack.append(node)
    return seen
