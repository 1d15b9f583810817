"""Put a graph that was traced on its own into another one."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, GraphModule, Node


def graft(graph: Graph, traced: GraphModule, inputs: Sequence[Node]) -> tuple[list[Node], tuple[Node, ...]]:
    """Inline ``traced`` at the point where ``graph`` inserts, as part of the backward pass.

    Args:
        graph: changed in place.
        traced: of as many inputs.
        inputs: nodes of ``graph``, which take the place of the inputs.

    Returns:
        The new nodes and, of these (or of the inputs), the results.
    """
    environment: dict[Node, Node] = {}
    remaining = iter(inputs)
    new: list[Node] = []
    results: tuple[Node, ...] = ()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            environment[node] = next(remaining)
        elif node.op == "output":
            results = tuple(environment[n] for n in node.args[0])
        else:
            if node.op == "get_attr":
                environment[node] = _move_constant(graph, traced, node)
            else:
                environment[node] = graph.node_copy(node, environment.__getitem__)
            environment[node].meta["partitioner_tag"] = "is_backward"
            new.append(environment[node])
    return new, results


def _move_constant(graph: Graph, source: GraphModule, node: Node) -> Node:
    owner = graph.owning_module
    assert owner is not None
    name = f"_highway_constant_{sum(k.startswith('_highway_constant_') for k in owner.__dict__)}"
    setattr(owner, name, getattr(source, str(node.target)))
    copy = graph.get_attr(name)
    copy.meta.update(node.meta)
    return copy
