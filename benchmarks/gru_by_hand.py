"""A GRU's training step written by hand, exactly: loops of operators without autograd, and all else at once.

What can be had from PyTorch without a compiler: gates are kept, coefficients are computed for all steps, and
a step of the backward pass is four products, three of them elementwise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GRUByHand(nn.Module):
    """The function of a one-layer ``nn.GRU`` and its weights, from a state of zeros."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.weights = nn.ParameterList(gru.parameters())

    def forward(self, x: Tensor) -> tuple[Tensor]:
        states: Tensor = _Run.apply(x, *self.weights)
        return (states,)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor) -> Tensor:
        steps, batch, width = *x.shape[:2], w_h.shape[1]
        of_x, transposed = F.linear(x, w_x, b_x), w_h.t()
        states = x.new_zeros(steps + 1, batch, width)
        of_h, gates, new = (
            torch.empty_like(of_x),
            x.new_empty(steps, batch, 2 * width),
            torch.empty_like(states[1:]),
        )
        both, last = of_x[..., : 2 * width], of_x[..., 2 * width :]
        for t in range(steps):
            h = torch.addmm(b_h, states[t], transposed, out=of_h[t])
            rz = torch.add(both[t], h[:, : 2 * width], out=gates[t]).sigmoid_()
            n = torch.addcmul(last[t], rz[:, :width], h[:, 2 * width :], out=new[t]).tanh_()
            torch.lerp(n, states[t], rz[:, width:], out=states[t + 1])
        ctx.save_for_backward(x, w_x, w_h, states, of_h, gates, new)
        return states[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w_x, w_h, states, of_h, gates, new = ctx.saved_tensors
        (cotangents,), width = grads, w_h.shape[1]
        r, z = gates[..., :width], gates[..., width:]
        to_new = (1 - z) * (1 - new * new)
        to_z = (states[:-1] - new) * z * (1 - z)
        to_r = to_new * of_h[..., 2 * width :] * r * (1 - r)
        coefficients = torch.cat([to_r, to_z, to_new * r], -1).unflatten(-1, (3, width))
        inside, g = torch.empty_like(coefficients), torch.zeros_like(states[0])
        through = torch.empty_like(states[1:])
        for t in range(len(x) - 1, -1, -1):
            g = torch.add(g, cotangents[t], out=through[t])
            torch.mul(coefficients[t], g.unsqueeze(1), out=inside[t])
            g = torch.addmm(g * z[t], inside[t].flatten(1), w_h)
        of_h_ = inside.flatten(2).flatten(0, 1)
        of_x_ = torch.cat([inside[..., :2, :].flatten(2), to_new * through], -1).flatten(0, 1)
        d_x = (of_x_ @ w_x).view_as(x) if ctx.needs_input_grad[0] else None
        d_w_h = of_h_.t() @ states[:-1].flatten(0, 1)
        return d_x, of_x_.t() @ x.flatten(0, 1), d_w_h, of_x_.sum(0), of_h_.sum(0)
