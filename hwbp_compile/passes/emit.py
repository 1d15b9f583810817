"""Sixth pass: trace the solver over a chain and put it in the place of the sequential backward.

The traced schedule computes the cotangents of the chain's states and, from these, the gradients that hang on
several blocks in the same way. Everything else stays as it was and reads the new cotangents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .. import _compat
from ..blocks.limits import check_kept
from ..blocks.sweep import Places, Sweep
from ..chain import Chain
from ..errors import CannotRewrite
from ..options import Options
from ..solvers import solve
from ..stage import GRADIENTS, stage
from ..system import State
from .classes import value_text
from .depth_system import DepthSystem
from .graft import graft
from .linear import LinearPart
from .linear_ops import same_shape
from .parameter_gradients import (
    GradientGroup,
    GradientProgram,
    Owners,
    find_groups,
    keep_one_term,
    read_by,
    read_of_blocks,
)
from .strides import inverse, is_contiguous, order_of, same_strides
from .views import views_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """A traced solver.

    ``inputs`` are nodes of the joint graph; the outputs take the place of the nodes ``replaced``. Of a group
    in ``summed`` only the first node is replaced, by the sum of all.
    """

    chain: Chain
    inputs: tuple[Node, ...]
    replaced: tuple[Node, ...]
    summed: tuple[GradientGroup, ...]
    graph_module: GraphModule
    is_exact: bool = False
    """Whether it is a sweep, not an iteration."""


def trace_schedule(chain: Chain, options: Options, part: LinearPart, taken: set[Node]) -> Schedule:
    """Trace the iteration over one chain.

    With ``options.watch`` it takes no one's place: only the steps of its iterations are recorded.

    Args:
        chain: one of a joint graph, which is only read.
        options: those in force.
        part: what is linear in the tangents.
        taken: the nodes of all chains.

    Raises:
        CannotRewrite: an operator of a block cannot be batched.
    """
    solver = _Iteration(chain, options)
    return _trace(chain, solver, *find_groups(chain, part, taken), watch=bool(options.watch))


def trace_sweep(chain: Chain, part: LinearPart, taken: set[Node], *, compiles: bool = False) -> Schedule:
    """Trace the exact sweep through one chain as one kernel.

    Args:
        chain: one of a joint graph, or a part of it, of blocks of one kind.
        part: what is linear in the tangents.
        taken: the nodes of all chains.
        compiles: whether the kernel is compiled.

    Raises:
        CannotRewrite: there is no kernel for these blocks, or it is not expected to be faster.
    """
    sweep = Sweep(chain)
    owners, groups = find_groups(chain, part, taken)
    sweep.write(read_of_blocks(owners, groups, {n for block in chain.blocks for n in block.nodes}))
    schedule = _trace(chain, sweep, owners, groups)
    check_kept(views_of(n)[0] for n in schedule.inputs)
    if compiles:
        sweep.compile()
    return replace(schedule, is_exact=True)


class _Solver(Protocol):
    """Computes the cotangents of a chain's states."""

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes whose values it needs."""

    @property
    def places(self) -> Places:
        """Nodes of the blocks whose values it gives besides: which row of which stack they are."""

    def __call__(self, value: Callable[[Node], Any]) -> tuple[State, list[Tensor]]:
        """The cotangents of all states, ``[blocks + 1, ...]`` per component, and the stacks."""


def _trace(
    chain: Chain, solver: _Solver, owners: Owners, groups: list[GradientGroup], *, watch: bool = False
) -> Schedule:
    nodes = tuple(dict.fromkeys([*solver.inputs, *read_by(owners, groups)]))
    replaced: list[Node] = []
    summed: list[GradientGroup] = []

    def schedule(*values: Any) -> tuple[Tensor, ...]:
        given = dict(zip(nodes, values, strict=True))
        w, stacks = solver(given.__getitem__)
        if watch:
            return ()
        replaced.extend(exits(chain))
        states = [row for component in w for row in component[1:].unbind(0)]
        rows = [in_place_of(node, row) for node, row in zip(replaced, states, strict=True)]
        program = GradientProgram(owners, groups, given.__getitem__, w, solver.places, stacks)
        for group in groups:
            try:
                with stage(GRADIENTS):
                    found = _rows_of(program(group), group)
            except _compat.restart_exceptions():
                raise
            except Exception as refusal:  # whatever it is, these gradients are right as they are
                level = logging.INFO if isinstance(refusal, CannotRewrite) else logging.WARNING
                gradients = f"{len(group.nodes)} gradients such as {group.nodes[0]}"
                log.log(level, "%s stay one by one: %r", gradients, refusal)
                continue
            rows.extend(found)
            replaced.extend(group.nodes[: len(found)])
            if group.summed:
                summed.append(group)
        return tuple(rows)

    traced = _compat.trace(schedule, [n.meta["val"] for n in nodes])
    traced.graph.eliminate_dead_code()
    inputs = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    for placeholder in [p for p in inputs if not p.users]:
        traced.graph.erase_node(placeholder)
        del inputs[placeholder]
    traced.recompile()
    return Schedule(chain, tuple(inputs.values()), tuple(replaced), tuple(summed), traced)


class _Iteration:
    """Solves for the cotangents of a chain's states as the options say."""

    def __init__(self, chain: Chain, options: Options) -> None:
        self._chain, self._options = chain, options
        self.places: Places = {}
        read = (n for each in chain.classes for column in each.externals for n in column)
        self.inputs = tuple(dict.fromkeys([*chain.blocks[0].entry, *read]))

    def __call__(self, value: Callable[[Node], Any]) -> tuple[State, list[Tensor]]:
        options = self._options
        assert isinstance(options.iterations, int)
        system = DepthSystem(self._chain, value)
        iterations, gamma, size = options.iterations, options.gamma, options.group_size
        return solve(system, iterations=iterations, gamma=gamma, group_size=size), []


def exits(chain: Chain) -> list[Node]:
    """The cotangents that a schedule replaces, component by component, from the loss to the input."""
    return [block.exit[i] for i in range(len(chain.blocks[0].entry)) for block in chain.blocks]


def _rows_of(value: Any, group: GradientGroup) -> list[Tensor]:
    rows = [value] if group.summed else list(value.value.unbind(0))
    return [in_place_of(node, row) for node, row in zip(group.nodes, rows, strict=not group.summed)]


def in_place_of(node: Node, row: Tensor) -> Tensor:
    """``row`` with the strides of ``node``, which operators behind it, such as a view, were recorded for.

    Raises:
        CannotRewrite: no new tensor can have these strides.
    """
    like = node.meta["val"]
    if not same_shape(row, like) or row.dtype != like.dtype:
        raise CannotRewrite(
            f"{row.dtype}{tuple(row.shape)} cannot take the place of {node} ({value_text(node)})"
        )
    order = order_of(like)
    if order is not None and is_contiguous(like, order):
        return row.contiguous()
    if same_strides(row, like):
        return row
    if order is None:
        raise CannotRewrite("the state has a memory layout that a new tensor cannot have")
    return row.permute(order).contiguous().permute(inverse(order))


def closes_a_cycle(schedule: Schedule, renamed: dict[Node, Node]) -> bool:
    """Whether a schedule would need, to start, what is computed from its results.

    Block by block there is no cycle, but a schedule hands out all its results at once: two chains that read
    each other's states half way cannot both be schedules.
    """
    needed = {present(n, renamed) for n in schedule.inputs}
    seen: set[Node] = set()
    stack = [present(n, renamed) for n in schedule.replaced]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return not needed.isdisjoint(seen)


def present(node: Node, renamed: dict[Node, Node]) -> Node:
    """What has taken the place of ``node`` by now."""
    while node in renamed:
        node = renamed[node]
    return node


def insert_schedule(graph: Graph, schedule: Schedule, renamed: dict[Node, Node]) -> list[Node]:
    """Inline a schedule before the end of ``graph`` and redirect the users of the old cotangents.

    Args:
        graph: the joint graph, changed in place; sort it topologically afterwards.
        schedule: the traced solver.
        renamed: nodes replaced so far, old to new; extended.

    Returns:
        The new nodes.
    """
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        new, results = graft(
            graph, schedule.graph_module, [present(source, renamed) for source in schedule.inputs]
        )
    inserted = set(new)
    for group in schedule.summed:
        keep_one_term(graph, group, renamed)
    for before, after in zip(schedule.replaced, results, strict=True):
        if before in renamed:
            raise AssertionError(f"{before} is replaced twice.")
        before.replace_all_uses_with(after, delete_user_cb=lambda user: user not in inserted)
        renamed[before] = after
    return new
