"""Names for the stages of a schedule, written to the nodes that are traced in them.

They cost nothing and change nothing where no graph is traced: a solver can name its stages and still run in
eager mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.fx import Node

from . import _compat

RESIDUAL = "residual path"
"""The start of the iteration: the gradient that crosses no block."""
TIME = "recurrent layer"
"""The backward pass of a recurrent layer: already parallel, so no chain over depth."""
INSIDE = "inside groups"
"""The exact sweep from the states between groups to those inside of them."""
SWEEP = "exact sweep"
"""Exact backpropagation through all blocks, by one kernel."""
GRADIENTS = "gradients of parameters and inputs"
"""What hangs on the blocks, computed once from the last cotangents."""

_KEY = "highway_stage"


@contextmanager
def stage(name: str | int) -> Iterator[None]:
    """Mark the nodes traced while the context lasts; an iteration's name is its number, from 1."""
    graph = _compat.graph_being_traced()
    last = next(iter(reversed(graph.nodes)), None) if graph is not None else None
    yield
    if graph is None:
        return
    for node in reversed(graph.nodes):
        if node is last:
            break
        node.meta.setdefault(_KEY, name)


def stage_of(node: Node) -> str | int | None:
    """The stage that a node was traced in; None for a node of no schedule."""
    found = node.meta.get(_KEY)
    return found if isinstance(found, (str, int)) else None
