"""What the passes know of a chain: frozen records without behaviour.

Everything is numbered as the backward pass runs, from the loss towards the input.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

Cut = tuple[Node, ...]
"""The cotangent of one state of the chain: one node per component."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block: maps the cotangent of its output (``entry``) to that of its input (``exit``)."""

    entry: Cut
    exit: Cut
    nodes: tuple[Node, ...]
    """All nodes strictly after ``entry`` up to and including ``exit``, in graph order."""

    def __post_init__(self) -> None:
        if len(self.entry) != len(self.exit):
            raise ValueError("A block's entry and exit must have the same number of components.")


@dataclass(frozen=True, slots=True)
class BlockClass:
    """Blocks of the same structure, so that one program with stacked externals computes all of them."""

    members: tuple[int, ...]
    """Positions in the chain."""
    externals: tuple[tuple[Node, ...], ...]
    """Per external value of the block's program, the node that holds it for each member."""
    template: Block
    """The first member."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A run of blocks whose states have one shape, each with a residual path."""

    blocks: tuple[Block, ...]
    residual: str
    """The kind of K in words, such as ``"identity"`` or ``"gate"``."""
    classes: tuple[BlockClass, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place that looks residual and is left exact."""

    reason: str
    node: Node | None = None
    blocks: tuple[Block, ...] = ()
    """The blocks that were found before the refusal, if any."""
    residual: str = ""
