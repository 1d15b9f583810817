"""Open sizes that are asked of cotangents: asked of the graph's inputs, as no cotangent decides them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .linear import linear_part
from .linear_ops import op_name


def sizes_of_inputs(graph: Graph) -> int:
    """Replace the sizes of what depends on tangents by inputs that are these sizes; how many."""
    inputs: dict[Any, Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("val"), torch.SymInt):
            inputs.setdefault(node.meta["val"].node.expr, node)
    if not inputs:
        return 0
    done = 0
    for node in linear_part(graph).order:
        value = node.meta.get("val")
        if op_name(node) != "aten::sym_size" or not isinstance(value, torch.SymInt):
            continue
        if (known := inputs.get(value.node.expr)) is not None:
            node.replace_all_uses_with(known)
            done += 1
    graph.eliminate_dead_code()
    return done
