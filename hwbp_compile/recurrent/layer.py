"""``hwbp_compile::recurrent_layer``: one layer of a recurrent network in one direction.

Where there are kernels for it, it is a :mod:`recurrence <.function>`. Elsewhere its forward is torch's own
inference kernel; nothing but inputs and outputs is saved for the backward pass, which is made of ordinary
operators.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ..errors import CannotRewrite
from ..passes.batch import Stacked
from ..stage import TIME, stage
from .backward import EXACT, Cotangent, Gradients, Settings, cell_backward, replay_of, states_of
from .cell_graph import trace_cell
from .cells import STEPS
from .cost import kernels_are_faster
from .function import recurrent_cell, why_no_kernels
from .library import library_backward, library_inference, library_training, like_results
from .own import own

log = logging.getLogger(__name__)

for _name in ("recurrent_layer", "library_layer"):
    torch.library.define(
        f"hwbp_compile::{_name}",
        "(Tensor x, Tensor[] carry, Tensor[] weights, str kind, int iterations, float gamma, "
        "int group_size, int exact_tail, int watch) -> Tensor[]",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def recurrent_layer(
    x: Tensor,
    carry: list[Tensor],
    weights: list[Tensor],
    kind: str,
    iterations: int,
    gamma: float = 0.0,
    group_size: int = 1,
    exact_tail: int = 0,
    watch: int = 0,
) -> list[Tensor]:
    """Run one layer in one direction.

    Args:
        x: ``[T, B, I]``, T at least 1.
        carry: the initial states, ``[B, H]`` each: ``[h]``, for an LSTM ``[h, c]``.
        weights: as in :mod:`.cells`.
        kind: a name in :data:`.cells.STEPS`.
        iterations: the paper's k, for the backward pass; it and the others are the options of these names.
        watch: so many iterations are made beside an exact pass, only to record their steps.

    Returns:
        The outputs ``[T, B, H]``, then the last state, like ``carry``.

    Raises:
        ValueError: there are no steps.
    """
    result: list[Tensor] = torch.ops.hwbp_compile.recurrent_layer.default(
        x, carry, weights, kind, iterations, gamma, group_size, exact_tail, watch
    )
    return result


def why_library(x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *settings: Any) -> str:
    """Why the library runs the forward pass of a layer, and an exact backward pass; empty if our kernels do.

    Arguments as of :func:`recurrent_layer`.
    """
    sweeps = _sweeps(x, carry, weights, settings)
    reason = why_no_kernels(kind, [x[0]], carry, weights)
    if not reason and not kernels_are_faster([x], carry, weights, kind, backward=sweeps):
        reason = "that takes less time here than our kernels"
    return reason


def _sweeps(x: Tensor, carry: list[Tensor], weights: list[Tensor], settings: tuple[Any, ...]) -> bool:
    """Whether there is nothing but an exact backward pass."""
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *carry, *weights))
    return settings[0] == EXACT and settings[-1] == 0 and trains


@torch.library.impl("hwbp_compile::recurrent_layer", "CompositeImplicitAutograd")
def _recurrent_layer(
    x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *settings: Any
) -> list[Tensor]:
    if isinstance(x.shape[0], int) and x.shape[0] == 0:
        raise ValueError(f"A recurrent layer needs at least one time step, but its input is {list(x.shape)}.")
    reason = why_library(x, carry, weights, kind, *settings)
    if not reason:
        states, last = recurrent_cell([x], carry, weights, kind, Settings(*settings))
        return [own(states[0][1:]), *last]
    log.info("A recurrent layer is run by the library: %s", reason)
    if _sweeps(x, carry, weights, settings):
        return library_training(x, carry, weights, kind)
    result: list[Tensor] = torch.ops.hwbp_compile.library_layer.default(x, carry, weights, kind, *settings)
    return result


@torch.library.impl("hwbp_compile::library_layer", "default")
def _forward(
    x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *_: Any, **__: Any
) -> list[Tensor]:
    return library_inference(x, carry, weights, kind)


@torch.library.register_fake("hwbp_compile::library_layer")
def _fake(
    x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *_: Any, **__: Any
) -> list[Tensor]:
    return like_results(x, carry)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, carry, weights, kind, *settings = inputs
    ctx.save_for_backward(x, output[0], *carry, *weights)
    ctx.carries, ctx.kind, ctx.settings = len(carry), kind, Settings(*settings)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, output, *rest = ctx.saved_tensors
    carry, weights = rest[: ctx.carries], rest[ctx.carries :]
    constants = (None,) * 6
    if ctx.settings.iterations != EXACT or ctx.settings.watch:
        try:
            # What autocast has to cast was cast before the layer.
            with stage(TIME), _compat.without_autocast(x.device):
                found = _parallel(x, carry, weights, output, grads, ctx.kind, ctx.settings)
            if ctx.settings.iterations != EXACT:
                return found.inputs[0], found.carry, found.weights, *constants
        except CannotRewrite as refusal:
            # No cell is known for which this happens; if one comes, it is no reason to fail.
            log.info("The library's backward pass is used for a recurrent layer: %s", refusal)
    return *library_backward(x, carry, weights, ctx.kind, grads), *constants


def _parallel(
    x: Tensor,
    carry: list[Tensor],
    weights: list[Tensor],
    output: Tensor,
    grads: list[Tensor | None],
    kind: str,
    settings: Settings,
) -> Gradients:
    cell = trace_cell(STEPS[kind], carry, [x[0]], weights)
    replay = replay_of(cell, [x], weights)
    replay.give(cell.carry[0], Stacked(torch.cat([carry[0].unsqueeze(0), output[:-1]])))
    of_output, *of_last = grads
    if of_output is None:
        cotangents = [Cotangent(last, None) for last in of_last]
    else:
        last = of_output[-1] if of_last[0] is None else of_output[-1] + of_last[0]
        before = torch.cat([torch.zeros_like(of_output[:1]), of_output[:-1]])
        cotangents = [Cotangent(last, before), *(Cotangent(c, None) for c in of_last[1:])]
    if kind == "lstm":
        states = states_of(cell, replay, 1, carry[1])
        replay.give(cell.carry[1], Stacked(torch.cat([carry[1].unsqueeze(0), states[:-1]])))

    def no_kernel(added: Any) -> str:
        raise CannotRewrite("the library's backward pass is exact")

    wanted = [True] * (1 + len(weights))
    return cell_backward(cell, replay, cotangents, settings, wanted, no_kernel)


torch.library.register_autograd("hwbp_compile::library_layer", _backward, setup_context=_setup)
