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

from ..errors import CannotRewrite
from ..passes.batch import Stacked
from ..stage import TIME, stage
from .backward import EXACT, Cotangent, Settings, cell_backward, replay_of, states_of
from .cell_graph import trace_cell
from .cells import STEPS
from .function import recurrent_cell, why_no_kernels

log = logging.getLogger(__name__)

WIDEST = 256
"""Hidden units up to which our kernels are as fast as the library's operators or faster."""

for _name, _results in (("recurrent_layer", "(Tensor, Tensor)"), ("library_layer", "(Tensor, Tensor)")):
    torch.library.define(
        f"hwbp_compile::{_name}",
        "(Tensor x, Tensor[] carry, Tensor[] weights, str kind, int iterations, float gamma, "
        f"int group_size, int exact_tail) -> {_results}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

torch.library.define(
    "hwbp_compile::library_layer_backward",
    "(Tensor x, Tensor[] carry, Tensor[] weights, str kind, Tensor of_output, Tensor? of_cell) -> Tensor[]",
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
) -> tuple[Tensor, Tensor]:
    """Run one layer in one direction.

    Args:
        x: ``[T, B, I]``, T at least 1.
        carry: the initial states, ``[B, H]`` each: ``[h]``, for an LSTM ``[h, c]``.
        weights: as in :mod:`.cells`.
        kind: a name in :data:`.cells.STEPS`.
        iterations: the paper's k, for the backward pass; it and the others are the options of these names.

    Returns:
        The outputs ``[T, B, H]``, and an LSTM's last cell state (for other kinds an empty tensor).
    """
    result: tuple[Tensor, Tensor] = torch.ops.hwbp_compile.recurrent_layer.default(
        x, carry, weights, kind, iterations, gamma, group_size, exact_tail
    )
    return result


@torch.library.impl("hwbp_compile::recurrent_layer", "CompositeImplicitAutograd")
def _recurrent_layer(
    x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *settings: Any
) -> tuple[Tensor, Tensor]:
    if not _library_is_faster(x, carry):
        reason = why_no_kernels(kind, [x[0]], carry, weights)
        if not reason:
            states, last = recurrent_cell([x], carry, weights, kind, Settings(*settings))
            return states[0][1:], last[-1] if kind == "lstm" else x.new_empty(0)
        log.info("The library's forward pass is used for a recurrent layer: %s", reason)
    result: tuple[Tensor, Tensor] = torch.ops.hwbp_compile.library_layer.default(
        x, carry, weights, kind, *settings
    )
    return result


def _library_is_faster(x: Tensor, carry: list[Tensor]) -> bool:
    return x.device.type != "cpu" or carry[-1].shape[1] > WIDEST


@torch.library.impl("hwbp_compile::library_layer", "default")
def _forward(
    x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y, c = _library(x, carry, weights, kind, training=False)
    return y.contiguous(), x.new_empty(0) if c is None else c.clone()


def _library(
    x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *, training: bool
) -> tuple[Tensor, Tensor | None]:
    initial = [h.unsqueeze(0) for h in carry]
    settings = (len(weights) > 3, 1, 0.0, training, False, False)
    if kind == "lstm":
        y, _, c = torch.lstm(x, initial, weights, *settings)
        return y, c.squeeze(0)
    return getattr(torch, kind)(x, initial[0], weights, *settings)[0], None


@torch.library.impl("hwbp_compile::library_layer_backward", "default")
def _exact_backward(
    x: Tensor,
    carry: list[Tensor],
    weights: list[Tensor],
    kind: str,
    of_output: Tensor,
    of_cell: Tensor | None,
) -> list[Tensor]:
    """The library keeps what its backward needs only while it trains, so its forward runs once more."""
    leaves = [t.detach().requires_grad_() for t in (x, *carry, *weights)]
    n = len(carry) + 1
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y, c = _library(leaves[0], leaves[1:n], leaves[n:], kind, training=True)
    outputs = [(y, of_output)] if c is None or of_cell is None else [(y, of_output), (c, of_cell)]
    found = torch.autograd.grad([o for o, _ in outputs], leaves, [g for _, g in outputs], allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else g.clone(memory_format=torch.contiguous_format)
        for g, t in zip(found, leaves, strict=True)
    ]


@torch.library.register_fake("hwbp_compile::library_layer_backward")
def _exact_fake(
    x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *_: Any, **__: Any
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *carry, *weights)]


@torch.library.register_fake("hwbp_compile::library_layer")
def _fake(
    x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], *carry[0].shape))
    return y, torch.empty_like(carry[1]) if kind == "lstm" else x.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, carry, weights, kind, *settings = inputs
    ctx.save_for_backward(x, output[0], *carry, *weights)
    ctx.carries, ctx.kind, ctx.settings = len(carry), kind, Settings(*settings)


def _backward(ctx: Any, of_output: Tensor, of_cell: Tensor | None) -> tuple[Any, ...]:
    x, output, *rest = ctx.saved_tensors
    carry, weights = rest[: ctx.carries], rest[ctx.carries :]
    of_cell = of_cell if ctx.kind == "lstm" else None
    constants = (None,) * 5
    if ctx.settings.iterations != EXACT:
        try:
            # What autocast has to cast was cast before the layer.
            with stage(TIME), torch.autocast(x.device.type, enabled=False):
                found = _parallel(x, carry, weights, output, of_output, of_cell, ctx.kind, ctx.settings)
            return found.inputs[0], found.carry, found.weights, *constants
        except CannotRewrite as refusal:
            # Such as a layer of one hidden unit, in which no product is left.
            log.info("The library's backward pass is used for a recurrent layer: %s", refusal)
    of_x, *others = torch.ops.hwbp_compile.library_layer_backward.default(
        x, carry, weights, ctx.kind, of_output, of_cell
    )
    return of_x, others[: ctx.carries], others[ctx.carries :], *constants


def _parallel(
    x: Tensor,
    carry: list[Tensor],
    weights: list[Tensor],
    output: Tensor,
    of_output: Tensor,
    of_cell: Tensor | None,
    kind: str,
    settings: Settings,
) -> Any:
    cell = trace_cell(STEPS[kind], carry, [x[0]], weights)
    replay = replay_of(cell, [x], weights)
    replay.give(cell.carry[0], Stacked(torch.cat([carry[0].unsqueeze(0), output[:-1]])))
    cotangents = [Cotangent(of_output[-1], torch.cat([torch.zeros_like(of_output[:1]), of_output[:-1]]))]
    if kind == "lstm":
        states = states_of(cell, replay, 1, carry[1])
        replay.give(cell.carry[1], Stacked(torch.cat([carry[1].unsqueeze(0), states[:-1]])))
        cotangents.append(Cotangent(of_cell, None))

    def no_kernel(added: Any) -> str:
        raise CannotRewrite("the library's backward pass is exact")

    wanted = [True] * (1 + len(weights))
    return cell_backward(cell, replay, cotangents, settings, wanted, no_kernel)


torch.library.register_autograd("hwbp_compile::library_layer", _backward, setup_context=_setup)
