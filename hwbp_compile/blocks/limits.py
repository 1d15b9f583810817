"""Which blocks a kernel is expected to compute in less time than a library's products do."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from ..errors import CannotRewrite
from ..recurrent.step_cpp import TYPES
from .kernel_cpp import threads_for
from .program import Source

MOST_ROWS = 32
"""Rows of the batch beyond which a library's products are faster."""
MOST_BYTES = 1 << 19
"""What a block reads, such as weights, that is read as fast by one thread as by several."""


def is_for_cpus(graph: Graph) -> bool:
    """Whether all inputs of a graph are on CPUs."""
    values = (n.meta.get("val") for n in graph.nodes if n.op == "placeholder")
    return all(value.device.type == "cpu" for value in values if isinstance(value, Tensor))


def rows_within_limit(state: Node) -> int:
    """The rows of the batch that a state has.

    Raises:
        CannotRewrite: it is none that a kernel is for.
    """
    value = state.meta["val"]
    if not isinstance(value, Tensor) or value.dtype not in TYPES or value.dim() < 2:
        raise CannotRewrite("the state is no batch of float32 or float64")
    if not all(isinstance(n, int) for n in value.shape):
        raise CannotRewrite("its sizes are open")
    if 0 in value.shape:
        raise CannotRewrite("the state is empty")
    rows = value.shape[0]
    if rows > MOST_ROWS:
        raise CannotRewrite(f"the batch has more than {MOST_ROWS} rows, for which a library is faster")
    return rows


def check_bytes(rows: int, sources: Iterable[Source], *, backward: bool = False) -> None:
    """Refuse what a library reads faster.

    With large gradients, the time of a backward pass is that of getting memory for them: nothing is won.

    Args:
        rows: of the batch.
        sources: what a block reads.
        backward: whether it is in a backward pass.

    Raises:
        CannotRewrite: there is much to read, and there are threads without rows.
    """
    is_alone = backward or threads_for(rows) < torch.get_num_threads()
    if is_alone and sum(map(_bytes_of, sources)) > MOST_BYTES:
        few = "" if backward else " and the rows few"
        raise CannotRewrite(f"the weights are large{few}, for which a library is faster")


def check_kept(nodes: Iterable[Node]) -> None:
    """Refuse what is computed again in the backward pass.

    Raises:
        CannotRewrite: some of the nodes are checkpointed.
    """
    if any(n.meta.get("recompute") is not None for n in nodes):
        raise CannotRewrite("what is checkpointed is not to be kept")


def _bytes_of(source: Source) -> int:
    return _compat.size_hint(math.prod(source.shape)) * source.dtype.itemsize
