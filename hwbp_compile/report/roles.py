"""What each node of a backward graph is for: the facts behind a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from ..options import Options
from ..passes.linear_ops import is_heavy
from ..passes.pipeline import Outcome

STACKING = "stacking"
"""Saved values put into one tensor for all blocks."""
RESIDUAL = "residual path"
"""The start of the iteration: the gradient that crosses no block."""
ITERATIONS = "iterations"
"""All iterations, where they cannot be told apart."""
INSIDE = "inside groups"
"""The exact sweep from the states between groups to those inside of them."""


@dataclass(frozen=True)
class Roles:
    """Facts about nodes by name."""

    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Before the rewrite: chain and block (from the input to the loss)."""
    schedule: dict[str, tuple[int, str | int]] = field(default_factory=dict)
    """After the rewrite: chain and role, or the number of the iteration, from 1."""


def roles_of(outcomes: Mapping[int, Outcome], options: Options, after: Graph) -> Roles:
    """Collect the roles; ``outcomes`` by the number of the chain in the report."""
    alive = {n.name for n in after.nodes}
    roles = Roles()
    for number, outcome in outcomes.items():
        blocks = outcome.found.blocks
        for position, block in enumerate(blocks):
            for node in block.nodes:
                roles.blocks[node.name] = (number, len(blocks) - 1 - position)
        for node, role in _schedule_roles(outcome, options).items():
            if node.name in alive:
                roles.schedule[node.name] = (number, role)
    return roles


def _schedule_roles(outcome: Outcome, options: Options) -> dict[Node, str | int]:
    """Roles of a schedule's nodes, in the order in which the solver was traced."""
    new = outcome.new
    if not new or outcome.schedule is None:
        return {}
    first = set(outcome.schedule.chain.blocks[0].entry)
    moving: set[Node] = set()
    for node in new:
        # What hangs on the first cotangent moves through the iterations; the rest only prepares them.
        if any(n in moving or n in first or _is_cotangent(n) for n in node.all_input_nodes):
            moving.add(node)
    heavy = [n for n in new if n in moving and is_heavy(n)]
    per_iteration, remainder = _heavy_per_iteration(len(heavy), outcome, options)
    roles: dict[Node, str | int] = {}
    seen = 0
    role: str | int = RESIDUAL
    for node in new:
        if node not in moving:
            roles[node] = STACKING
            continue
        if is_heavy(node):
            seen += 1
            if not per_iteration:
                role = ITERATIONS
            else:
                number = (seen - 1) // per_iteration + 1
                role = INSIDE if remainder and seen > len(heavy) - remainder else number
        roles[node] = role
    return roles
