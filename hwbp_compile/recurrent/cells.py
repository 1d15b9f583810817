"""Steps of the recurrent cells of ``torch.nn``, as plain functions.

A step maps ``(carry, x, weights)`` to the next carry, all tuples of tensors: carry ``[B, H]``, x ``[B, I]``.
The first component of the carry is the output. The weights are in the order of ``torch.nn``: ``w_ih``,
``w_hh``, then ``b_ih`` and ``b_hh`` if there are biases, then ``w_hr`` for an LSTM with projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors, Tensors, Tensors], Tensors]


def _gates(h: Tensor, x: Tensor, weights: Tensors) -> tuple[Tensor, Tensor]:
    """The input's and the hidden state's part of all gates' arguments."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = (biases[0], biases[1]) if len(biases) > 1 else (None, None)
    return F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)


def gru(carry: Tensors, x: Tensors, weights: Tensors) -> Tensors:
    """``nn.GRU``: ``h' = (1 - z) * n + z * h``; its residual path is z."""
    (h,) = carry
    from_x, from_h = _gates(h, x[0], weights)
    reset_x, update_x, new_x = from_x.chunk(3, -1)
    reset_h, update_h, new_h = from_h.chunk(3, -1)
    reset = torch.sigmoid(reset_x + reset_h)
    update = torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + reset * new_h)
    return ((1 - update) * new + update * h,)


def lstm(carry: Tensors, x: Tensors, weights: Tensors) -> Tensors:
    """``nn.LSTM``: ``c' = f * c + i * g``, ``h' = o * tanh(c')``; the residual path of c is f."""
    h, c = carry
    projection = weights[-1] if len(weights) in (3, 5) else None
    from_x, from_h = _gates(h, x[0], weights if projection is None else weights[:-1])
    in_, forget, cell, out = (from_x + from_h).chunk(4, -1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(in_) * torch.tanh(cell)
    h = torch.sigmoid(out) * torch.tanh(c)
    return (h if projection is None else F.linear(h, projection), c)


def rnn_tanh(carry: Tensors, x: Tensors, weights: Tensors) -> Tensors:
    """``nn.RNN`` with tanh. It has no residual path."""
    return (torch.tanh(torch.add(*_gates(carry[0], x[0], weights))),)


def rnn_relu(carry: Tensors, x: Tensors, weights: Tensors) -> Tensors:
    """``nn.RNN`` with ReLU. It has no residual path."""
    return (torch.relu(torch.add(*_gates(carry[0], x[0], weights))),)


STEPS: dict[str, Step] = {"gru": gru, "lstm": lstm, "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu}
"""By the name under which operators know a cell; :mod:`.capture` adds the user's own."""

FOR_ANY_BATCH: dict[str, Callable[[int], list[Step]]] = {}
"""By name, steps that may be the same with the size of the batch, a constant in them, replaced."""


def steps_for_any_batch(cell: str, batch: int | None) -> list[Step]:
    """The step of a cell, then what may be the same step for another size of the batch than ``batch``."""
    others = FOR_ANY_BATCH[cell](batch) if batch is not None and cell in FOR_ANY_BATCH else []
    return [STEPS[cell], *others]
