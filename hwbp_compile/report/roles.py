"""What each node of a backward graph is for: the facts behind a drawing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from ..options import Options
from ..passes.linear import linear_part
from ..passes.outcomes import Outcome
from ..stage import RESIDUAL, stage_of

STACKING = "stacking"
"""Saved values put into one tensor for all blocks."""


@dataclass(frozen=True)
class Roles:
    """Facts about nodes by name."""

    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Before the rewrite: chain and block (from the input to the loss)."""
    schedule: dict[str, tuple[int, str | int]] = field(default_factory=dict)
    """After the rewrite: chain and role, or the number of the iteration, from 1."""


def roles_of(outcomes: Mapping[int, Outcome], options: Options, after: Graph) -> Roles:
    """Collect the roles; ``outcomes`` by the number of the chain in the report."""
    dependent = linear_part(after).order
    alive = set(after.nodes)
    roles = Roles()
    for number, outcome in outcomes.items():
        blocks = outcome.found.blocks
        for position, block in enumerate(blocks):
            for node in block.nodes:
                roles.blocks[node.name] = (number, len(blocks) - 1 - position)
        new = [n for n in outcome.new if n in alive]
        for node in new:
            roles.schedule[node.name] = (number, _role(node, dependent))
    return roles


def _role(node: Node, dependent: Collection[Node]) -> str | int:
    """A stage, or stacking; what only takes a stage's result apart counts to that stage."""
    if node not in dependent:
        return STACKING
    while (found := stage_of(node)) is None:
        operands = [n for n in node.all_input_nodes if n in dependent]
        if not operands:
            return RESIDUAL
        node = operands[0]
    return found


def effective_iterations(options: Options, blocks: int) -> int:
    """How many iterations a chain of ``blocks`` blocks gets: never more than it has groups."""
    if not isinstance(options.iterations, int):
        return 0
    groups = -(-max(blocks - options.exact_tail, 0) // options.group_size)
    return min(options.iterations, groups)
