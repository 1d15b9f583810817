"""Fourth pass: group the blocks of a chain by structure.

Two blocks are of one class if the same operators are applied in the same arrangement to values of the same
shapes and dtypes. Blocks of one class are evaluated together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..chain import Block, BlockClass
from .program import canonical_order, externals_of
from .same_value import SameValue

Signature = tuple[Any, ...]


def signature(block: Block) -> Signature:
    """What two blocks have in common if and only if one program serves both."""
    names: dict[Node, str] = {node: f"entry{i}" for i, node in enumerate(block.entry)}
    for i, node in enumerate(externals_of(block)):
        # A symbolic size is no tensor to stack: blocks of one class must share it.
        names[node] = f"external{i}:{value_text(node)}"
    lines = []
    for i, node in enumerate(canonical_order(block)):
        names[node] = f"node{i}"
        arguments = (
            str(map_arg(node.args, lambda n: _Name(names[n]))),
            str(map_arg(node.kwargs, lambda n: _Name(names[n]))),
        )
        lines.append((str(node.target), *arguments, value_text(node)))
    return (tuple(value_text(n) for n in block.entry), tuple(lines), tuple(names[n] for n in block.exit))


class _Name(str):
    """A string that prints without quotes, so that a node's name is told from a string argument."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def value_text(node: Node) -> str:
    """Shape, dtype and device of a node's value as text; a symbolic size by its name."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(str(d) for d in value.shape)}{value.device}"
    if isinstance(value, (tuple, list)):
        return "tuple"
    return f"{type(value).__name__} {value}"


def form(node: Node) -> str:
    """Equal for nodes that one operator computes for all blocks, of other operands."""
    return f"{node.target}{map_arg((node.args, node.kwargs), lambda _: '*')}{value_text(node)}"


def classify(blocks: tuple[Block, ...]) -> tuple[BlockClass, ...]:
    """The classes of a chain's blocks, in order of their first member."""
    members: dict[Signature, list[int]] = {}
    for i, block in enumerate(blocks):
        members.setdefault(signature(block), []).append(i)
    classes = []
    same = SameValue()
    for positions in members.values():
        rows = [[same(n) for n in externals_of(blocks[i])] for i in positions]
        classes.append(BlockClass(tuple(positions), tuple(zip(*rows, strict=True)), blocks[positions[0]]))
    return tuple(classes)
