"""Cells for torch's ``scan``, each in one formula that serves three purposes.

``cell(mixed, carry, x, *weights)`` returns the next carry. ``mixed`` is applied to everything in which units
of the state are mixed: the identity in a model; to find K by hand it is ``detach``, so that only the
elementwise path is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
Mixed = Callable[[Tensor], Tensor]


def _gates(r: Tensor, z: Tensor, n: Tensor, of_h: tuple[Tensor, ...], h: Tensor) -> State:
    r, z = torch.sigmoid(r + of_h[0]), torch.sigmoid(z + of_h[1])
    return ((1 - z) * torch.tanh(n + r * of_h[2]) + z * h,)


def layer_norm_gru(
    mixed: Mixed, carry: State, x: Tensor, w_x: Tensor, w_h: Tensor, a: Tensor, b: Tensor
) -> State:
    """Projections of input and state normalised, each with its own scale."""
    (h,) = carry
    size = (w_h.shape[0],)
    of_x = F.layer_norm(x @ w_x.t(), size, a)
    of_h = F.layer_norm(mixed(h) @ w_h.t(), size, a, b)
    return _gates(*of_x.chunk(3, -1), of_h.chunk(3, -1), h)


def layer_norm_lstm(
    mixed: Mixed, carry: State, x: Tensor, w_x: Tensor, w_h: Tensor, a: Tensor, b: Tensor
) -> State:
    """All gates normalised together."""
    h, c = carry
    gates = F.layer_norm(x @ w_x.t() + mixed(h) @ w_h.t(), (w_h.shape[0],), a, b)
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def s_lstm(mixed: Mixed, carry: State, x: Tensor, w_x: Tensor, w_h: Tensor, b: Tensor) -> State:
    """Exponential gates with a stabiliser and a normaliser, the state mixed within heads."""
    h, c, n, m = carry
    heads, width, _ = w_h.shape
    of_h = torch.einsum("bhi,hij->bhj", mixed(h).view(h.shape[0], heads, width), w_h)
    i, f, z, o = (x @ w_x.t() + of_h.reshape(h.shape[0], -1) + b).chunk(4, -1)
    f = F.logsigmoid(f)
    largest = torch.maximum(f + m, i)
    i, f = torch.exp(i - largest), torch.exp(f + m - largest)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, largest


def highway_network(mixed: Mixed, carry: State, x: Tensor, w_x: Tensor, w_1: Tensor, w_2: Tensor) -> State:
    """A recurrent highway network of two layers a step."""
    (h,) = carry
    for weight, of_x in ((w_1, x @ w_x.t()), (w_2, 0.0)):
        new, gate = (mixed(h) @ weight.t() + of_x).chunk(2, -1)
        gate = torch.sigmoid(gate - 1)
        h = torch.tanh(new) * gate + h * (1 - gate)
    return (h,)


def block_gru(mixed: Mixed, carry: State, x: Tensor, w_x: Tensor, w_1: Tensor, w_2: Tensor) -> State:
    """As in Dreamer: a small network per block of the state, normalised, whose outputs are the gates."""
    (h,) = carry
    blocks, width, _ = w_2.shape
    inside = torch.cat([mixed(h).view(-1, blocks, width), (x @ w_x.t()).view(-1, blocks, width)], -1)
    inside = F.silu(F.rms_norm(torch.einsum("bgi,gij->bgj", inside, w_1), (width,)))
    reset, new, update = torch.einsum("bgi,gij->bgj", inside, w_2).view(-1, blocks, 3, width).unbind(2)
    new, update = torch.tanh(torch.sigmoid(reset) * new), torch.sigmoid(update - 1)
    return ((update * new + (1 - update) * h.view(-1, blocks, width)).reshape(h.shape),)


@dataclass(frozen=True)
class Cell:
    """A cell and the shapes it needs, for 3 inputs."""

    function: Callable[..., State]
    components: int
    hidden: int
    weights: tuple[tuple[int, ...], ...]

    def carry(self, batch: int) -> list[Tensor]:
        """Random initial states; the normaliser of the exponential gates is positive."""
        states = [torch.randn(batch, self.hidden, dtype=torch.float64) for _ in range(self.components)]
        return [x.abs() + 1 if i == 2 else x for i, x in enumerate(states)]


CELLS = {
    "layer norm gru": Cell(layer_norm_gru, 1, 6, ((18, 3), (18, 6), (18,), (18,))),
    "layer norm lstm": Cell(layer_norm_lstm, 2, 6, ((24, 3), (24, 6), (24,), (24,))),
    "s lstm": Cell(s_lstm, 4, 6, ((24, 3), (2, 3, 12), (24,))),
    "highway network": Cell(highway_network, 1, 6, ((12, 3), (12, 6), (12, 6))),
    "block gru": Cell(block_gru, 1, 6, ((6, 3), (2, 6, 3), (2, 3, 9))),
}
