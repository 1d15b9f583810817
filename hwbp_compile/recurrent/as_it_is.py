"""A graph of nothing but layers that the library runs: it is run as it is, by autograd.

There is nothing to generate code for, and entering and leaving compiled code twice a step takes a millisecond
beside a library's kernels, which leave no cache as it was.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import _compat
from .capture import Layer
from .layer import why_library
from .library import call_library

log = logging.getLogger(__name__)

_ARRANGE_METHODS = frozenset({"flip", "squeeze", "to", "transpose", "unsqueeze"})
_ARRANGE: frozenset[Any] = frozenset(
    {operator.getitem, torch.cat, torch.stack, torch.zeros, torch.nn.functional.dropout}
)
"""Methods and functions that lie between the layers of a module: next to no work."""


def run_as_it_is(gm: GraphModule, layers: Sequence[Layer], keeps_records: bool) -> Callable[..., Any] | None:
    """What runs a graph of Dynamo's without compiling it; None if that is not for this graph.

    Args:
        gm: a copy of the graph, with the options in force written into its layers; changed if it is run.
        layers: its recurrences.
        keeps_records: whether its last input is memory for records; it is taken away, as there are none.
    """
    nodes = {layer.node for layer in layers}
    if not nodes or any(n not in nodes and not _arranges(n) for n in gm.graph.nodes):
        return None
    if not all(_is_by_library(layer) for layer in layers):
        return None
    for node in nodes:
        with gm.graph.inserting_before(node):
            training: dict[str, Any] = {"training": torch.is_grad_enabled()}
            node.replace_all_uses_with(gm.graph.call_function(call_library, node.args[:4], training))
        gm.graph.erase_node(node)
    if keeps_records:
        gm.graph.erase_node(gm.graph.find_nodes(op="placeholder")[-1])
    gm.recompile()
    log.info("Nothing is compiled: the library's layers are all there is in a graph.")
    forward: Callable[..., Any] = gm.forward
    return forward


def _is_by_library(layer: Layer) -> bool:
    if not layer.reason or layer.node.target is not torch.ops.hwbp_compile.recurrent_layer.default:
        return False
    if _compat.autocasts(layer.carry[0].device):
        return False
    given: Any = torch.fx.node.map_arg(layer.node.args, lambda n: n.meta["example_value"])
    return bool(why_library(*given))


def _arranges(node: Node) -> bool:
    if node.op == "call_method" and node.target in _ARRANGE_METHODS:
        return True
    numbers = torch.SymInt, torch.SymFloat, torch.SymBool, int, float
    is_number = isinstance(node.meta.get("example_value"), numbers)
    return node.op in ("placeholder", "output") or node.target in _ARRANGE or is_number
