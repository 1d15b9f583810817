"""The backward pass of a recurrent layer, parallel in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CannotRewrite
from ..passes.batch import Stacked, rows_of
from ..passes.program import BlockProgram
from ..scan import linear_scan
from ..solvers import solve
from ..stage import GRADIENTS, stage
from .cell_graph import CellGraph, linear_in, trace_cell
from .cells import Step
from .exact import one_matrix, sweep
from .time_system import CellReplay, TimeSystem, stack_carries

EXACT = -1
"""In place of a number of iterations."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the cotangents are solved for; the options of the same names."""

    iterations: int
    gamma: float = 0.0
    group_size: int = 1
    exact_tail: int = 0


@dataclass(frozen=True, slots=True)
class LayerGradients:
    """Gradients of the inputs ``[T, B, I]``, the initial carry and the weights; None where there is none."""

    inputs: list[Tensor | None]
    carry: list[Tensor]
    weights: list[Tensor | None]


def layer_backward(
    step: Step,
    inputs: Sequence[Tensor],
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor,
    of_output: Tensor,
    of_last: Sequence[Tensor | None],
    settings: Settings,
) -> LayerGradients:
    """Gradients of one layer in one direction by the iteration, all steps at once.

    The gates of all steps are computed again, in a few large products: the state that each step starts from
    is known from the output.

    Args:
        step: the cell.
        inputs: each ``[T, B, I]``.
        carry: the initial states; the output is the first of them over time.
        weights: shared by all steps.
        output: ``[T, B, H]``.
        of_output: the cotangent of ``output``.
        of_last: the cotangents of the last carry's components (the first is part of ``of_output``), or None.
        settings: the solver's.

    Raises:
        CannotRewrite: the cell is not understood.
    """
    steps = output.shape[0]
    cell = trace_cell(step, carry, [x[0] for x in inputs], weights)
    given: dict[Node, Any] = dict(zip(cell.weights, weights, strict=True))
    given.update((node, Stacked(x)) for node, x in zip(cell.inputs, inputs, strict=True))
    replay = CellReplay(given, steps)
    replay.give(cell.carry[0], Stacked(stack_carries(carry[0], output)))
    for component in range(1, len(carry)):
        states = _states(cell, replay, component, carry[component], steps)
        replay.give(cell.carry[component], Stacked(stack_carries(carry[component], states)))
    first = [of_output[-1]]
    for x, cotangent in zip(carry[1:], of_last[1:], strict=True):
        first.append(torch.zeros_like(x) if cotangent is None else cotangent)
    none_reaches_the_start = torch.zeros_like(of_output[:1])
    later = torch.cat([of_output[:-1].flip(0), none_reaches_the_start])
    system = TimeSystem(cell, replay, steps, tuple(first), (later, *(None for _ in carry[1:])))
    if settings.iterations == EXACT:
        form = one_matrix(cell)
        if form is None:
            raise CannotRewrite("a step's state does not pass one diagonal and one matrix")
        w: tuple[Tensor, ...] = (sweep(cell, form, replay, of_output).flip(0),)
    else:
        w = solve(
            system,
            iterations=settings.iterations,
            gamma=settings.gamma,
            group_size=settings.group_size,
            exact_tail=settings.exact_tail,
        )
    with stage(GRADIENTS):
        of_inputs, of_weights = system.gradients(w)
    return LayerGradients(of_inputs, [component[-1] for component in w], of_weights)


def _states(cell: CellGraph, replay: CellReplay, component: int, initial: Tensor, steps: int) -> Tensor:
    """All states of a component that is linear in itself, like an LSTM's cell: one scan."""
    found = linear_in(cell, component)
    assert found is not None, "only such cells have a second component here"
    program = BlockProgram(*found, replay.value, steps)
    ((factor,),), (term,) = program.residual(), program.direct()
    coefficient = initial.new_ones((steps, *(1,) * initial.dim())) if factor == 1.0 else factor
    return linear_scan(rows_of(term, initial, steps), rows_of(coefficient, initial, steps), initial)
