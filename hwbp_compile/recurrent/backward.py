"""The backward pass of a recurrence: parallel in time by the iteration, or exact step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..passes.batch import Stacked, rows_of
from ..passes.program import BlockProgram
from ..scan import linear_scan
from ..solvers import solve
from ..stage import GRADIENTS, stage
from ..system import State
from .cell_graph import CellGraph, linear_in
from .recurrence import kernel_program, recurrence
from .time_system import CellReplay, TimeSystem

EXACT = -1
"""In place of a number of iterations."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the cotangents are solved for; the options of the same names."""

    iterations: int
    gamma: float = 0.0
    group_size: int = 1
    exact_tail: int = 0
    watch: int = 0
    """Beside an exact pass: so many iterations, made to record their steps only."""


@dataclass(frozen=True, slots=True)
class Cotangent:
    """What reaches one component of the state from outside of the recurrence; None for zero."""

    last: Tensor | None
    """Of the last state, ``[B, ...]``."""
    before: Tensor | None
    """Of the states before it, the initial one included: ``[T, B, ...]``."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of the inputs ``[T, ...]``, the initial carry and the weights; None where there is none."""

    inputs: list[Tensor | None]
    carry: list[Tensor]
    weights: list[Tensor | None]


def replay_of(cell: CellGraph, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> CellReplay:
    """A cell that knows its inputs (``[T, ...]`` each) and weights."""
    given: dict[Node, object] = dict(zip(cell.weights, weights, strict=True))
    given.update((node, Stacked(x)) for node, x in zip(cell.inputs, inputs, strict=True))
    return CellReplay(given, inputs[0].shape[0])


def cell_backward(
    cell: CellGraph,
    replay: CellReplay,
    cotangents: Sequence[Cotangent],
    settings: Settings,
    wanted: Sequence[bool],
    kernel: Callable[[Sequence[bool]], str],
) -> Gradients:
    """Gradients of a recurrence (the paper's Algorithm 1, with time for depth).

    The gates of all steps are computed again, in a few large products: the state that each step starts from
    is known.

    Args:
        cell: one step.
        replay: knows the inputs, the weights, and the state that each step starts from.
        cotangents: one per component of the state.
        settings: the solver's.
        wanted: per input and weight, whether its gradient is.
        kernel: the name of the exact backward kernel, given which components have a ``before``.

    Raises:
        CannotRewrite: the cell is not understood, or there is no such kernel.
    """
    first = tuple(
        torch.zeros(x.meta["val"].shape, dtype=x.meta["val"].dtype, device=x.meta["val"].device)
        if c.last is None
        else c.last
        for c, x in zip(cotangents, cell.carry, strict=True)
    )
    later = tuple(None if c.before is None else c.before.flip(0) for c in cotangents)

    def iterated(iterations: int) -> State:
        return solve(
            TimeSystem(cell, replay, replay.steps, first, later),
            iterations=iterations,
            gamma=settings.gamma,
            group_size=settings.group_size,
            exact_tail=settings.exact_tail,
        )

    if settings.watch:
        iterated(settings.watch)
    if settings.iterations == EXACT:
        added = [c.before is not None for c in cotangents]
        more = [c.before for c in cotangents if c.before is not None]
        name = kernel(added)
        states = run(cell, replay, name, first, more, reverse=True)
        with stage(GRADIENTS):
            return gradients_after(cell, replay, name, states, wanted)
    w = iterated(settings.iterations)
    with stage(GRADIENTS):
        _give_cotangents(cell, replay, [component[:-1].flip(0) for component in w])
        return _gradients(cell, replay, [component[-1] for component in w], wanted)


def gradients_after(
    cell: CellGraph, replay: CellReplay, kernel: str, states: Sequence[Tensor], wanted: Sequence[bool]
) -> Gradients:
    """The gradients that are left once an exact backward kernel has returned ``states``, by :func:`run`."""
    if not kernel_program(kernel).keep:
        return _gradients(cell, replay, [*states], wanted)
    _give_cotangents(cell, replay, [x[1:] for x in states])
    return _gradients(cell, replay, [x[0] for x in states], wanted)


def _give_cotangents(cell: CellGraph, replay: CellReplay, after: Sequence[Tensor]) -> None:
    """Of the state after each step, in the order of time."""
    for node, cotangent in zip(cell.block.entry, after, strict=True):
        replay.give(node, Stacked(cotangent))


def run(
    cell: CellGraph,
    replay: CellReplay,
    kernel: str,
    initial: Sequence[Tensor],
    more: Sequence[Tensor] = (),
    *,
    reverse: bool,
) -> list[Tensor]:
    """Run a kernel on what the replay knows, ``more`` being the last inputs, and let it know what is emitted.

    Returns:
        Each component of the state over time, ``[T + 1, ...]``, or the last ones if the kernel keeps no more.
    """
    program = kernel_program(kernel)
    read = [cell.nodes[i] for i in program.read]
    inputs = [*(rows_of(replay.value(n), n.meta["val"], replay.steps) for n in read), *more]
    shared = [replay.value(cell.nodes[i]) for i in program.read_shared]
    states, emitted, sums = recurrence(initial, inputs, shared, kernel, reverse=reverse)
    for i, x in zip(program.emitted, emitted, strict=True):
        replay.give(cell.nodes[i], Stacked(x.reshape(replay.steps, *cell.nodes[i].meta["val"].shape)))
    for i, x in zip(program.sums, sums, strict=True):
        replay.give_total(cell.nodes[i], x.reshape(cell.nodes[i].meta["val"].shape))
    return states


def _gradients(cell: CellGraph, replay: CellReplay, carry: list[Tensor], wanted: Sequence[bool]) -> Gradients:
    """Gradients of the inputs, over time, and of the weights, from the cotangents after each step."""
    n = len(cell.inputs)
    of_inputs = [
        None if node is None or not use else rows_of(replay.value(node), x.meta["val"], replay.steps)
        for node, x, use in zip(cell.of_inputs, cell.inputs, wanted[:n], strict=True)
    ]
    of_weights = [
        None if node is None or not use else replay.total(node)
        for node, use in zip(cell.of_weights, wanted[n:], strict=True)
    ]
    return Gradients(of_inputs, carry, of_weights)


def states_of(cell: CellGraph, replay: CellReplay, component: int, initial: Tensor) -> Tensor:
    """All states of a component that is linear in itself, like an LSTM's cell: one scan, ``[T, ...]``."""
    found = linear_in(cell, component)
    assert found is not None, "only such cells have a second component here"
    program = BlockProgram(*found, replay.value, replay.steps)
    ((factor,),), (term,) = program.residual(), program.direct()
    coefficient = initial.new_ones((replay.steps, *(1,) * initial.dim())) if factor == 1.0 else factor
    return linear_scan(
        rows_of(term, initial, replay.steps), rows_of(coefficient, initial, replay.steps), initial
    )
