"""Graphs are in topological order again after nodes were added at the end."""

from __future__ import annotations

import random

import pytest
from torch.fx import Graph, Node

from hwbp_compile.passes.order import sort_topologically


def names(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes]


def add(graph: Graph, name: str, *operands: Node) -> Node:
    return graph.create_node("call_function", print, operands, name=name)


def test_only_what_is_read_too_early_is_moved() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    a = add(graph, "a", x)
    b = add(graph, "b", a)
    c = add(graph, "c", a)
    d = add(graph, "d", b, c)
    late = add(graph, "late", x)
    later = add(graph, "later", late)
    add(graph, "unread", x)
    graph.output(d)
    b.args = (a, later)
    sort_topologically(graph)
    assert names(graph) == ["x", "a", "late", "later", "b", "c", "d", "unread", "output"]
    graph.lint()


def test_what_is_in_order_stays_as_it_is() -> None:
    graph = Graph()
    nodes = [graph.placeholder("x")]
    chosen = random.Random(0)
    for i in range(100):
        nodes.append(add(graph, f"n{i}", *chosen.sample(nodes, min(2, len(nodes)))))
    graph.output(nodes[-1])
    before = names(graph)
    sort_topologically(graph)
    assert names(graph) == before


@pytest.mark.parametrize("seed", range(20))
def test_any_order_becomes_one_in_which_operands_come_first(seed: int) -> None:
    chosen = random.Random(seed)
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for i in range(60):
        nodes.append(add(graph, f"n{i}", *chosen.sample(nodes, min(chosen.randint(1, 4), len(nodes)))))
    output = graph.output(nodes[-1])
    shuffled = nodes[1:]
    chosen.shuffle(shuffled)
    for node in shuffled:
        output.prepend(node)
    sort_topologically(graph)
    graph.lint()
    assert sorted(names(graph)) == sorted([*(n.name for n in nodes), "output"])
    # Whatever is not where it was is read by something that was before it.
    place = {n: i for i, n in enumerate(graph.nodes)}
    roots = [n for i, n in enumerate(shuffled) if all(place[m] < place[n] for m in shuffled[:i])]
    for root in roots:
        waited = [m for m in shuffled[shuffled.index(root) + 1 :] if place[m] < place[root]]
        assert all(
            _reads(root, m) or any(_reads(r, m) for r in shuffled[: shuffled.index(root)]) for m in waited
        )


def _reads(node: Node, other: Node) -> bool:
    """Whether a value depends on another one."""
    return node is other or any(_reads(n, other) for n in node.all_input_nodes)


def test_a_cycle_is_an_error() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    a = add(graph, "a", x)
    b = add(graph, "b", a)
    graph.output(b)
    a.args = (b,)
    with pytest.raises(ValueError, match="depends on itself"):
        sort_topologically(graph)
