"""What each node of a backward graph is for: the facts behind a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from ..options import Options
from ..passes.linear import linear_part
from ..passes.linear_ops import is_heavy, op_name
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
    dependent = linear_part(after).order
    alive = set(after.nodes)
    roles = Roles()
    for number, outcome in outcomes.items():
        blocks = outcome.found.blocks
        for position, block in enumerate(blocks):
            for node in block.nodes:
                roles.blocks[node.name] = (number, len(blocks) - 1 - position)
        new = [n for n in outcome.new if n in alive]
        moving = [n for n in new if n in dependent]
        roles.schedule.update({n.name: (number, STACKING) for n in new if n not in dependent})
        iterations = effective_iterations(options, len(blocks))
        for node, role in zip(
            moving, _iteration_of_each(moving, iterations, options.group_size), strict=True
        ):
            roles.schedule[node.name] = (number, role)
    return roles


def effective_iterations(options: Options, blocks: int) -> int:
    """How many iterations a chain of ``blocks`` blocks gets: never more than it has groups."""
    if options.iterations == "exact":
        return 0
    groups = -(-max(blocks - options.exact_tail, 0) // options.group_size)
    return min(options.iterations, groups)


def _iteration_of_each(nodes: Sequence[Node], iterations: int, group_size: int) -> list[str | int]:
    """The role of each node of a schedule, in the order in which the solver was traced.

    Every iteration has the same heavy operators, so counting them tells where one ends.
    """
    heavy = [i for i, node in enumerate(nodes) if is_heavy(node)]
    steps = iterations * group_size + group_size - 1
    per_step, rest = divmod(len(heavy), steps) if steps else (0, 0)
    if per_step == 0:
        return [RESIDUAL] * len(nodes)
    if rest:
        return [RESIDUAL if i < heavy[0] else ITERATIONS for i in range(len(nodes))]
    size = per_step * group_size
    starts = [heavy[t * size] for t in range(iterations)]
    if iterations > 1:
        # Every iteration has the same nodes too, so the last one's end tells what comes before a heavy one.
        length = starts[1] - starts[0]
        first = _without_rows(nodes) - iterations * length
        if group_size == 1 and 0 <= first <= starts[0]:
            starts = [first + t * length for t in range(iterations)]
    roles: list[str | int] = []
    for i in range(len(nodes)):
        number = sum(start <= i for start in starts)
        inside = group_size > 1 and i >= heavy[iterations * size]
        roles.append(INSIDE if inside else number or RESIDUAL)
    return roles


def _without_rows(nodes: Sequence[Node]) -> int:
    """Where the last operators begin, which only take the result apart."""
    end = len(nodes)
    while end and op_name(nodes[end - 1]) in ("getitem", "aten::select", "aten::squeeze", "aten::unbind"):
        end -= 1
    return end
