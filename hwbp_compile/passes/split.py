"""Third pass: split a block into residual path K and block J.

One walk over the block marks the nodes that K reaches from the entry and from which K reaches the exit.
The block's program (:mod:`.program`) evaluates K on these only, and J on everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ..chain import Block, Cut
from .residual_ops import Scalar, describe_factors, residual_operands, scalar_coefficient


@dataclass(frozen=True)
class Split:
    """Where K runs in a block.

    ``path`` is the set of nodes on it (entry excluded). ``scalars[j]`` gives, per node, what is known of the
    coefficient from entry component ``j``. ``kind`` names K.
    """

    path: frozenset[Node]
    scalars: tuple[dict[Node, Scalar], ...]
    kind: str

    def coefficient(self, exit_node: Node, component: int) -> Scalar:
        """What is known of K from entry ``component`` to ``exit_node``."""
        return self.scalars[component].get(exit_node) if exit_node in self.path else None


def split(block: Block) -> Split:
    """Find K in a block; its path is empty if there is none."""
    inside = set(block.entry) | set(block.nodes)
    reached: set[Node] = set(block.entry)
    operands: dict[Node, list[Node]] = {}
    for node in block.nodes:
        if node in reached:
            continue
        sources = [n for n in residual_operands(node, inside) if n in reached]
        if sources:
            reached.add(node)
            operands[node] = sources
    path = _backward(block.exit, operands)
    scalars: list[dict[Node, Scalar]] = []
    for entry in block.entry:
        known: dict[Node, Scalar] = {entry: 1.0}
        for node in block.nodes:
            if node in path:
                known[node] = scalar_coefficient(node, known)
        scalars.append(known)
    return Split(frozenset(path), tuple(scalars), _kind(block, path, scalars, inside))


def _backward(exit_nodes: Cut, operands: dict[Node, list[Node]]) -> set[Node]:
    path: set[Node] = set()
    stack = [n for n in exit_nodes if n in operands]
    while stack:
        node = stack.pop()
        if node not in path:
            path.add(node)
            stack.extend(n for n in operands[node] if n in operands)
    return path


def _kind(block: Block, path: set[Node], scalars: list[dict[Node, Scalar]], inside: set[Node]) -> str:
    values = {known.get(n) for known in scalars for n in block.exit if n in path} - {None}
    if not values:
        return ""
    kind = "identity" if values == {1.0} else "scalar"
    if "tensor" in values:
        kind = describe_factors(path, inside)
    return kind if len(block.entry) == 1 else f"{kind} on a state of {len(block.entry)} tensors"
