"""Last pass: what the iterations recorded of themselves is written to an input of the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from ..solvers.observe import EMPTY, OBSERVE, WIDTH
from .graft import graft

CHAINS = 64
"""Chains of one graph that can be recorded."""
OVER_TIME, OVER_DEPTH = 1.0, 0.0


def new_records(device: torch.device) -> Tensor:
    """Memory for what one backward pass records: ``[CHAINS, 1 + WIDTH]``, float32, all empty."""
    return torch.full((CHAINS, 1 + WIDTH), EMPTY, device=device)


def observations(graph: Graph) -> list[Node]:
    """The marks in a graph, in its order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is OBSERVE]


def drop_observations(graph: Graph) -> None:
    """Take all marks out of a graph."""
    record(graph, observations(graph), [], keep=False)


def record(graph: Graph, over_time: Sequence[Node], over_depth: Sequence[Node], *, keep: bool) -> None:
    """Collect all marks of a joint graph.

    Args:
        graph: changed in place.
        over_time: the marks of recurrences, in the order of the backward pass.
        over_depth: those of chains over depth.
        keep: whether there is memory for them, in the last input; if not they are dropped.
    """
    marks = [(OVER_TIME, n) for n in reversed(over_time)] + [(OVER_DEPTH, n) for n in reversed(over_depth)]
    rows = [n.args[0] for _, n in marks][:CHAINS]
    assert all(isinstance(row, Node) for row in rows)
    for _, node in marks:
        graph.erase_node(node)
    if keep and rows:
        memory = [n for n in graph.nodes if n.op == "placeholder" and not _is_tangent(n)][-1]
        kinds = [kind for kind, _ in marks]
        value = memory.meta["val"]

        def collect(*values: Tensor) -> tuple[Tensor]:
            found = [
                torch.cat([x.new_full((1,), kind), x]).to(value.device)
                for kind, x in zip(kinds, values, strict=False)
            ]
            empty = torch.full(
                (CHAINS - len(found), 1 + WIDTH), EMPTY, dtype=value.dtype, device=value.device
            )
            return (torch.cat([torch.stack(found), empty]),)

        traced = _compat.trace(collect, [row.meta["val"] for row in rows])  # type: ignore[union-attr]
        (output,) = graph.find_nodes(op="output")
        with graph.inserting_before(output):
            _, (result,) = graft(graph, traced, rows)  # type: ignore[arg-type]
            _compat.write_in_backward(graph, memory, result)
    graph.eliminate_dead_code()


def _is_tangent(node: Node) -> bool:
    return "tangents" in str(node.target)
