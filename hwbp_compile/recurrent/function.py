"""``hwbp_compile::recurrent_cell``: a recurrence of any cell, differentiable.

It is made of ordinary operators but for the loops over time, which are kernels, so that what compiles the
model compiles the rest. What does not depend on the state is computed for all steps at once; backward, so is
everything but the sweep.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import _compat
from ..errors import CannotRewrite
from ..passes.batch import Stacked
from ..stage import TIME, stage
from .backward import EXACT, Cotangent, Gradients, Settings, cell_backward, replay_of, run
from .cell_graph import CellGraph, trace_cell
from .cells import STEPS
from .own import own
from .recurrence import kernel_name, kernel_program, why_no_kernel
from .time_system import CellReplay

log = logging.getLogger(__name__)

torch.library.define(
    "hwbp_compile::recurrent_cell",
    "(Tensor[] inputs, Tensor[] carry, Tensor[] weights, str cell, int iterations, float gamma, "
    "int group_size, int exact_tail, int watch) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Recurrence(torch.autograd.Function):
    """All states of a recurrence, ``[T + 1, ...]`` per component of the state, and again the last ones."""

    @staticmethod
    def forward(ctx: Any, key: str, settings: Settings, counts: tuple[int, int], *tensors: Tensor) -> Any:
        """Run the steps; see :func:`recurrent_cell`."""
        inputs, carry, weights = _parts(tensors, counts)
        first = [x[0] for x in inputs]
        cell = trace_cell(STEPS[key], carry, first, weights)
        emit = any(ctx.needs_input_grad)
        name = kernel_name(key, cell, carry, first, weights, emit=emit)
        states, emitted = forward_pass(cell, name, inputs, carry, weights)
        ctx.save_for_backward(*inputs, *states, *weights, *emitted.values())
        ctx.cell, ctx.key, ctx.settings, ctx.counts = cell, key, settings, (*counts, len(weights))
        ctx.emitted = list(emitted)
        ctx.set_materialize_grads(False)
        return (*states, *(own(x[-1]) for x in states))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of the inputs, the carry and the weights."""
        inputs, states, weights, emitted = _parts(ctx.saved_tensors, ctx.counts)
        n, cell = len(states), ctx.cell
        cotangents = []
        for over_time, last in zip(grads[:n], grads[n:], strict=True):
            if over_time is not None:
                last = over_time[-1] if last is None else over_time[-1] + last
            cotangents.append(Cotangent(last, None if over_time is None else over_time[:-1]))
        needed = ctx.needs_input_grad[3:]
        wanted = [*needed[: len(inputs)], *needed[len(inputs) + n :]]
        known = dict(zip(ctx.emitted, emitted, strict=True))

        def kernel(added: Sequence[bool]) -> str:
            carry, first = [x[0] for x in states], [x[0] for x in inputs]
            return kernel_name(ctx.key, cell, carry, first, weights, backward=added, wanted=wanted)

        def backward(settings: Settings) -> Gradients:
            return backward_pass(cell, inputs, states, weights, known, cotangents, settings, wanted, kernel)

        with stage(TIME), _compat.without_autocast(inputs[0].device):
            try:
                found = backward(ctx.settings)
            except CannotRewrite as refusal:
                if ctx.settings.iterations == EXACT:
                    raise
                # No cell is known for which this happens; if one comes, it is no reason to fail.
                log.info("A recurrence is left exact: %s", refusal)
                found = backward(Settings(EXACT))
        return None, None, None, *found.inputs, *found.carry, *found.weights


def forward_pass(
    cell: CellGraph, kernel: str, inputs: Sequence[Tensor], carry: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[Tensor], dict[Node, Tensor]]:
    """All states, ``[T + 1, ...]`` each, and the values that the kernel emits for the backward pass."""
    replay = replay_of(cell, inputs, weights)
    states = run(cell, replay, kernel, carry, reverse=False)
    return states, emitted_by(cell, replay, kernel)


def emitted_by(cell: CellGraph, replay: CellReplay, kernel: str) -> dict[Node, Tensor]:
    """The values that a kernel has emitted, which the replay knows since it has run."""
    emitted = [cell.nodes[i] for i in kernel_program(kernel).emitted]
    return {n: replay.value(n).value for n in emitted}


def backward_pass(
    cell: CellGraph,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    emitted: Mapping[Node, Tensor],
    cotangents: Sequence[Cotangent],
    settings: Settings,
    wanted: Sequence[bool],
    kernel: Callable[[Sequence[bool]], str],
) -> Gradients:
    """The gradients, from what :func:`forward_pass` returned; see :func:`.backward.cell_backward`."""
    replay = replay_after(cell, inputs, states, weights, emitted)
    return cell_backward(cell, replay, cotangents, settings, wanted, kernel)


def replay_after(
    cell: CellGraph,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    emitted: Mapping[Node, Tensor],
) -> CellReplay:
    """A cell that knows what a backward pass does, from what :func:`forward_pass` returned."""
    replay = replay_of(cell, inputs, weights)
    for node, x in zip(cell.carry, states, strict=True):
        replay.give(node, Stacked(x[:-1]))
    for node, x in emitted.items():
        replay.give(node, Stacked(x))
    return replay


def _parts(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    """So many of each, then the rest."""
    ends = list(itertools.accumulate(counts, initial=0))
    return [*(tensors[i:j] for i, j in itertools.pairwise(ends)), tensors[ends[-1] :]]


def recurrent_cell(
    inputs: Sequence[Tensor],
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    cell: str,
    settings: Settings,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run a cell over time.

    Args:
        inputs: what differs between the steps, ``[T, ...]`` each, T at least 1.
        carry: the initial state, ``[B, ...]`` per component.
        weights: what the steps share.
        cell: a name in :data:`.cells.STEPS`.
        settings: for the backward pass.

    Returns:
        Per component of the state all states, ``[T + 1, B, ...]``, the initial one first, and the last ones.

    Raises:
        CannotRewrite: there is no kernel for the cell on this device.
    """
    found = torch.ops.hwbp_compile.recurrent_cell.default(
        list(inputs),
        list(carry),
        list(weights),
        cell,
        settings.iterations,
        settings.gamma,
        settings.group_size,
        settings.exact_tail,
        settings.watch,
    )
    return found[: len(carry)], found[len(carry) :]


@torch.library.impl("hwbp_compile::recurrent_cell", "CompositeImplicitAutograd")
def _recurrent_cell(
    inputs: list[Tensor], carry: list[Tensor], weights: list[Tensor], cell: str, *settings: Any
) -> list[Tensor]:
    counts = len(inputs), len(carry)
    return list(Recurrence.apply(cell, Settings(*settings), counts, *inputs, *carry, *weights))


def understand(
    key: str, inputs: Sequence[Tensor], carry: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[CellGraph, str]:
    """Trace a cell and see to its kernels. Arguments as of one step.

    Returns:
        The cell, and why its steps run in a loop of torch's operators; empty if there are kernels.

    Raises:
        CannotRewrite: the cell cannot be run, forward and exactly backward.
    """
    try:
        cell = trace_cell(STEPS[key], carry, inputs, weights)
    except CannotRewrite:
        raise
    except Exception as error:  # the user's own function
        raise CannotRewrite(f"the cell cannot be traced on its own ({type(error).__name__})") from error
    name = kernel_name(key, cell, carry, inputs, weights, emit=True)
    wanted = [True] * (len(inputs) + len(weights))
    then = kernel_name(key, cell, carry, inputs, weights, backward=[True] * len(carry), wanted=wanted)
    reason = why_no_kernel(name) or why_no_kernel(then)
    if reason:
        _try(cell, name, then, inputs, carry, weights, Settings(EXACT))
    return cell, reason


def why_not_parallel(
    key: str, cell: CellGraph, inputs: Sequence[Tensor], carry: Sequence[Tensor], weights: Sequence[Tensor]
) -> str:
    """Why a cell's backward pass cannot be done in parallel; empty if it can. Arguments as of one step."""
    try:
        name = kernel_name(key, cell, carry, inputs, weights, emit=True)
        _try(cell, name, "", inputs, carry, weights, Settings(1))
    except CannotRewrite as refusal:
        return refusal.reason
    return ""


def _try(
    cell: CellGraph,
    forward: str,
    backward: str,
    inputs: Sequence[Tensor],
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: Settings,
) -> None:
    """Run a cell for two steps, forward by a kernel and backward. Arguments as of one step; they may be fake.

    Raises:
        CannotRewrite: it does not work.
    """
    over_time = [x.detach().unsqueeze(0).expand(2, *x.shape) for x in inputs]
    initial, shared = [x.detach() for x in carry], [x.detach() for x in weights]
    states, emitted = forward_pass(cell, forward, over_time, initial, shared)
    cotangents = [Cotangent(x[-1], x[:-1]) for x in states]
    wanted = [True] * (len(inputs) + len(weights))
    backward_pass(cell, over_time, states, shared, emitted, cotangents, settings, wanted, lambda _: backward)


def why_no_kernels(
    key: str, inputs: Sequence[Tensor], carry: Sequence[Tensor], weights: Sequence[Tensor]
) -> str:
    """Why there are no kernels for a cell; empty if there are. Arguments as of one step."""
    try:
        return understand(key, inputs, carry, weights)[1]
    except CannotRewrite as refusal:
        return refusal.reason
