"""Last pass: what the iterations recorded of themselves is written to an input of the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from ..solvers.observe import OBSERVE, WIDTH
from .graft import graft

CHAINS = 16
"""Chains of one graph that are recorded by themselves; the last row holds the worst of all others."""
BLOCKS = 512
"""Blocks of one chain that can be recorded each by itself."""
EMPTY = -1.0
"""Where nothing is."""
OVER_TIME, OVER_DEPTH = 1.0, 0.0
_BLOCKS = 1
"""Where a row has the number of blocks."""


def new_records(device: torch.device, blocks: bool) -> Tensor:
    """Memory for what one backward pass records: float32, all empty.

    It is ``[CHAINS, 1 + WIDTH]``, and ``BLOCKS`` wider if the blocks are recorded too.
    """
    return torch.full((CHAINS, 1 + WIDTH + BLOCKS * blocks), EMPTY, device=device)


def observations(graph: Graph) -> list[Node]:
    """The marks in a graph, in its order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is OBSERVE]


def needed_without_records(graph: Graph) -> set[Node]:
    """The nodes that more depends on than marks."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        kept = node.op in ("output", "placeholder") or any(user in needed for user in node.users)
        if kept or (node.target is not OBSERVE and node.is_impure()):
            needed.add(node)
    return needed


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
    rows: list[list[Node]] = [list(n.args[0]) for _, n in marks]  # type: ignore[arg-type]
    each = [n.args[1] for _, n in marks]
    for _, node in marks:
        graph.erase_node(node)
    if keep and rows:
        memory = [n for n in graph.nodes if n.op == "placeholder" and not _is_tangent(n)][-1]
        kinds = [kind for kind, _ in marks]
        value = memory.meta["val"]
        room = value.shape[1] - 1 - WIDTH
        blocks = each if room else [None] * len(rows)

        def collect(*values: Tensor) -> tuple[Tensor]:
            remaining = iter(values)
            found: list[list[Tensor]] = []
            owns: list[Tensor] = []
            for row in rows:
                found.append([next(remaining).reshape(1).to(value.device) for _ in row])
                owns.extend(next(remaining)[:room].to(value.device) for _ in range(bool(room)))
            if len(found) > CHAINS:
                found[CHAINS - 1 :] = [_worst(found[CHAINS - 1 :])]
            # One concatenation: each is a loop of its own in generated code.
            parts: list[Tensor] = []
            for i, numbers in enumerate(found):
                parts.extend([value.new_full((1,), kinds[i]), *numbers])
                parts.append(value.new_full((WIDTH - len(numbers),), EMPTY))
                if room:
                    parts.extend([owns[i], value.new_full((room - owns[i].shape[0],), EMPTY)])
            parts.append(value.new_full(((CHAINS - len(found)) * value.shape[1],), EMPTY))
            return (torch.cat(parts).view(value.shape),)

        inputs = [
            n for row, own in zip(rows, blocks, strict=True) for n in (*row, own) if isinstance(n, Node)
        ]
        traced = _compat.trace(collect, [n.meta["val"] for n in inputs])
        (output,) = graph.find_nodes(op="output")
        with graph.inserting_before(output):
            _, (result,) = graft(graph, traced, inputs)
            _compat.write_in_backward(graph, memory, result)
    graph.eliminate_dead_code()


def _worst(rows: list[list[Tensor]]) -> list[Tensor]:
    """Of several chains the fewest blocks, and of all else the largest."""
    found = [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]
    merged = [torch.stack(each).amax(0) for each in found]
    merged[_BLOCKS] = torch.stack(found[_BLOCKS]).amin(0)
    return merged


def _is_tangent(node: Node) -> bool:
    return "tangents" in str(node.target)
