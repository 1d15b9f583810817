"""Sixth pass: trace the solver over a chain and put it in the place of the sequential backward.

The cotangents of the chain's states are computed by the traced schedule. Everything else that hangs on
them, such as the gradients of the parameters, stays as it was and reads the new cotangents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .. import _compat
from ..chain import Chain
from ..options import Options
from ..solvers import solve
from .depth_system import DepthSystem


@dataclass(frozen=True)
class Schedule:
    """A traced solver: ``inputs`` are nodes of the joint graph, the outputs the chain's cotangents."""

    chain: Chain
    inputs: tuple[Node, ...]
    graph_module: GraphModule


def trace_schedule(chain: Chain, options: Options) -> Schedule:
    """Trace the solver for one chain. The joint graph is only read.

    Raises:
        CannotRewrite: an operator of a block cannot be batched.
    """
    inputs: dict[Node, None] = dict.fromkeys(chain.blocks[0].entry)
    for each in chain.classes:
        for column in each.externals:
            inputs.update(dict.fromkeys(column))
    nodes = tuple(inputs)
    assert isinstance(options.iterations, int)
    iterations = options.iterations

    def schedule(*values: Any) -> tuple[torch.Tensor, ...]:
        given = dict(zip(nodes, values, strict=True))
        system = DepthSystem(chain, given.__getitem__)
        w = solve(system, iterations=iterations, gamma=options.gamma, group_size=options.group_size)
        return tuple(row for component in w for row in component[1:].unbind(0))

    traced = _compat.trace(schedule, [n.meta["val"] for n in nodes])
    traced.graph.eliminate_dead_code()
    return Schedule(chain, nodes, traced)


def insert_schedule(graph: Graph, schedule: Schedule, renamed: dict[Node, Node]) -> list[Node]:
    """Inline a schedule before the end of ``graph`` and redirect the users of the old cotangents.

    Args:
        graph: the joint graph, changed in place; sort it topologically afterwards.
        schedule: the traced solver.
        renamed: cotangents replaced so far, old to new; extended.

    Returns:
        The new nodes.
    """
    output = next(n for n in graph.nodes if n.op == "output")
    environment: dict[Node, Node] = {}
    inputs = iter(schedule.inputs)
    new: list[Node] = []
    results: tuple[Node, ...] = ()
    with graph.inserting_before(output):
        for node in schedule.graph_module.graph.nodes:
            if node.op == "placeholder":
                source = next(inputs)
                environment[node] = renamed.get(source, source)
            elif node.op == "output":
                results = tuple(environment[n] for n in node.args[0])
            else:
                if node.op == "get_attr":
                    environment[node] = _move_constant(graph, schedule.graph_module, node)
                else:
                    environment[node] = graph.node_copy(node, environment.__getitem__)
                environment[node].meta["partitioner_tag"] = "is_backward"
                new.append(environment[node])
    old = [
        block.exit[i] for i in range(len(schedule.chain.blocks[0].entry)) for block in schedule.chain.blocks
    ]
    inserted = set(new)
    for before, after in zip(old, results, strict=True):
        before.replace_all_uses_with(after, delete_user_cb=lambda user: user not in inserted)
        renamed[before] = after
    return new


def _move_constant(graph: Graph, source: GraphModule, node: Node) -> Node:
    owner = graph.owning_module
    assert owner is not None
    name = f"_highway_constant_{sum(k.startswith('_highway_constant_') for k in owner.__dict__)}"
    setattr(owner, name, getattr(source, str(node.target)))
    copy = graph.get_attr(name)
    copy.meta.update(node.meta)
    return copy
