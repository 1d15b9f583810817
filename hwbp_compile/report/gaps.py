"""Why one chain ends where the next begins: the block between them, which no chain could take in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch.fx import Graph, Node

from ..chain import Block, Refusal
from ..passes.chains import Found
from ..passes.linear import between, linear_part
from ..passes.linear_ops import is_heavy
from ..passes.split import split


def gaps(before: Graph, found: Sequence[Found]) -> list[Refusal]:
    """The blocks between neighbouring chains along which the whole gradient passes from one to the other.

    Typically a block that changes the shape of the hidden state, or one with a convolution on its shortcut.

    Args:
        before: the joint graph as it was.
        found: chains of a copy of it, whose nodes have the same names.
    """
    part = linear_part(before)
    named = {node.name: node for node in part.order}
    ends = [
        (tuple(named[n.name] for n in f.blocks[0].entry), tuple(named[n.name] for n in f.blocks[-1].exit))
        for f in found
        if f.blocks
    ]
    ends.sort(key=lambda cuts: part.order[cuts[0][0]])
    out = []
    for (_, source), (sink, _) in pairwise(ends):
        if len(source) != 1 or len(sink) != 1 or source == sink:
            continue
        nodes = [n for n in between(part, source[0], sink[0]) if n is not source[0]]
        if not any(map(is_heavy, nodes)):
            continue
        reason = _reason(Block(source, sink, tuple(nodes)))
        if reason:
            out.append(Refusal(reason, sink[0], (Block(source, sink, tuple(nodes)),)))
    return out


def _reason(block: Block) -> str:
    (source,), (sink,) = block.entry, block.exit
    # The gradient runs from the block's output to its input; the user thinks the other way.
    before, after = _shape(sink), _shape(source)
    if before != after:
        return f"shape change: this block turns a {before} state into a {after} one"
    if not split(block).path:
        return "mixing shortcut: no path through this block keeps the elements of the state apart"
    return ""


def _shape(node: Node) -> str:
    return "x".join(map(str, node.meta["val"].shape))
