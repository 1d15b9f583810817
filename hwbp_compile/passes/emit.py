"""Sixth pass: trace the solver over a chain and put it in the place of the sequential backward.

The cotangents of the chain's states are computed by the traced schedule. Everything else that hangs on
them, such as the gradients of the parameters, stays as it was and reads the new cotangents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .. import _compat
from ..chain import Chain
from ..errors import CannotRewrite
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

    def schedule(*values: Any) -> tuple[Tensor, ...]:
        given = dict(zip(nodes, values, strict=True))
        system = DepthSystem(chain, given.__getitem__)
        w = solve(system, iterations=iterations, gamma=options.gamma, group_size=options.group_size)
        rows = (row for component in w for row in component[1:].unbind(0))
        return tuple(
            with_layout(row, exit_.meta["val"]) for row, exit_ in zip(rows, exits(chain), strict=True)
        )

    traced = _compat.trace(schedule, [n.meta["val"] for n in nodes])
    traced.graph.eliminate_dead_code()
    return Schedule(chain, nodes, traced)


def exits(chain: Chain) -> list[Node]:
    """The cotangents that a schedule replaces, component by component, from the loss to the input."""
    return [block.exit[i] for i in range(len(chain.blocks[0].entry)) for block in chain.blocks]


def with_layout(row: Tensor, like: Tensor) -> Tensor:
    """``row`` with the strides of ``like``, which operators behind it, such as a view, were recorded for."""
    if str(row.stride()) == str(like.stride()) or like.is_contiguous():
        return row
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda d: -strides[d])
    laid_out = row.permute(order).contiguous().permute([order.index(d) for d in range(like.dim())])
    if str(laid_out.stride()) != str(strides):
        raise CannotRewrite("the state has a memory layout that a new tensor cannot have")
    return laid_out


def closes_a_cycle(schedule: Schedule, renamed: dict[Node, Node]) -> bool:
    """Whether a schedule would need, to start, what is computed from its results.

    Block by block there is no cycle, but a schedule hands out all its results at once: two chains that read
    each other's states half way cannot both be schedules.
    """
    needed = {renamed.get(n, n) for n in schedule.inputs}
    seen: set[Node] = set()
    stack = list(exits(schedule.chain))
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return not needed.isdisjoint(seen)


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
    inserted = set(new)
    for before, after in zip(exits(schedule.chain), results, strict=True):
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
