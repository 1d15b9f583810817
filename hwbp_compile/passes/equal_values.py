"""Which nodes of a graph have equal values: the same operators, applied to equal values.

Backward formulas compute again what the forward pass did, and the graph still has both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import _compat
from .linear_ops import op_name


def first_of_equals(graph: Graph) -> dict[Node, Node]:
    """For each node the first one whose value is equal, itself if there is no other."""
    known: dict[tuple[Any, ...], Node] = {}
    first: dict[Node, Node] = {}
    for node in graph.nodes:
        first[node] = node
        if node.op == "call_function" and _is_a_function(node):
            arguments = str(map_arg((node.args, node.kwargs), lambda n: first[n]))
            first[node] = known.setdefault((node.target, arguments), node)
    return first


def _is_a_function(node: Node) -> bool:
    """Whether an operator gives equal results for equal arguments, and does nothing else."""
    if op_name(node) == "getitem":
        return True
    tags = getattr(node.target, "tags", ())
    known = op_name(node).startswith(("aten::", "prims::"))
    return known and not _compat.mutates(node) and torch.Tag.nondeterministic_seeded not in tags
