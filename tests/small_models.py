"""A small chain for tests of one property each, and the check that its gradients are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compare import recorded, rewritten
from families import Residual, mlp
from torch import Tensor, nn

D = 6
LENGTH = 6


def chain(depth: int = LENGTH, d: int = D) -> list[nn.Module]:
    return [Residual(nn.LayerNorm(d), mlp(d, 2 * d)) for _ in range(depth)]


def model(depth: int = LENGTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, D), *chain(depth), nn.Linear(D, 3)).double()


def settled(scale: float = 0.3) -> nn.Sequential:
    """A chain that settles within a few iterations."""
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, D), *chain(3 * LENGTH), nn.Linear(D, 3)).double()
    for block in list(m)[1:-1]:
        block.f[-1].weight.data *= scale
    return m


class Reader(nn.Module):
    """A recurrent layer, and a linear function of its outputs."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(inputs, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


def compiled(m: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    options = {"codegen": "eager", "iterations": LENGTH} | options
    return torch.compile(m, backend="highway", options=options, dynamic=dynamic)


def grads(m: nn.Module, forward: Callable[..., Any], *inputs: Tensor, repeat: int = 1) -> list[Tensor]:
    m.zero_grad()
    for _ in range(repeat):
        forward(*inputs).square().sum().backward()
    return [p.grad.clone() for p in m.parameters() if p.grad is not None]


def check_exact(
    m: nn.Module, *inputs: Tensor, chains: int | None = 1, tolerance: float = 1e-10, **kwargs: Any
) -> None:
    """With as many iterations as blocks the gradients are exact, and so many chains were rewritten."""
    expected = grads(m, m, *inputs)
    with recorded() as records:
        found = grads(m, compiled(m, **kwargs), *inputs)
    if chains is not None:
        assert len(rewritten(records)) == chains, [o.reason for r in records for o in r.outcomes]
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)


@torch.library.custom_op("hwbp_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


twice.register_fake(torch.empty_like)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return twice(g)


class Through(nn.Module):
    """x + function(f(x)), of a function with a backward of its own."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.f, self.function = mlp(D, D), function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function.apply(self.f(x))


class Unbatchable(Through):
    """Its backward is linear, but has an operator that vmap could only run in a loop."""

    def __init__(self) -> None:
        super().__init__(Twice)
