"""Models of equal blocks whose rows do not depend on one another, and their results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, HIDDEN, BLOCKS, BATCH = 24, 40, 6, 5


Activation = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """x + f(x), or one of its relatives."""

    def __init__(
        self,
        act: Activation = F.relu,
        norm: str = "layer",
        *,
        bias: bool = True,
        post: bool = False,
        scale: bool = False,
        glu: bool = False,
        gate: bool = False,
        dropout: float = 0.0,
        d: int = D,
        hidden: int = HIDDEN,
    ) -> None:
        super().__init__()
        norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm1d, "none": nn.Identity}
        self.norm = norms[norm](d)
        self.up, self.down = nn.Linear(d, hidden * (1 + glu), bias=bias), nn.Linear(hidden, d, bias=bias)
        self.act, self.post, self.glu, self.dropout = act, post, glu, dropout
        self.scale = nn.Parameter(torch.randn(d) * 0.3) if scale else None
        self.gate = nn.Linear(d, d) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x if self.post else self.norm(x))
        if self.glu:
            a, b = y.chunk(2, -1)
            y = self.act(a) * b
        else:
            y = self.act(y)
        y = self.down(F.dropout(y, self.dropout, self.training))
        if self.scale is not None:
            y = y * self.scale
        if self.gate is not None:
            t = torch.sigmoid(self.gate(x))
            return x * (1 - t) + y * t
        return self.norm(x + y) if self.post else x + y


def model(*, blocks: int = BLOCKS, inputs: int = 9, d: int = D, **how: Any) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Linear(inputs, d), *(Block(d=d, **how) for _ in range(blocks)), nn.Linear(d, 3)]
    return nn.Sequential(*parts).double()


def compiled(m: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    options = {"iterations": BLOCKS, "apply": "always", "codegen": "eager"} | options
    return torch.compile(m, backend="highway", options=options, dynamic=False)


def results(m: nn.Module, run: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of a function of it."""
    m.zero_grad()
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = run(*given)
    torch.manual_seed(1)
    (y * torch.randn_like(y)).sum().backward()
    values = [*(x for x in given if x.requires_grad), *m.parameters()]
    return [y, *(torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in values)]


def equal(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-11) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)


def x_of(batch: int = BATCH, inputs: int = 9) -> Tensor:
    return torch.randn(batch, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


VARIANTS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gelu, RMSNorm, no bias": {"act": F.gelu, "norm": "rms", "bias": False},
    "tanh, no norm": {"act": torch.tanh, "norm": "none"},
    "post-LN": {"act": F.gelu, "post": True},
    "silu, gated linear": {"act": F.silu, "glu": True},
    "gate on the residual path": {"gate": True, "norm": "none"},
    "elu": {"act": F.elu, "norm": "none"},
}


MORE_VARIANTS: dict[str, dict[str, Any]] = {
    "layer scale": {"scale": True},
    "leaky relu": {"act": F.leaky_relu},
    "gelu by tanh": {"act": lambda x: F.gelu(x, approximate="tanh")},
    "softplus": {"act": F.softplus, "norm": "rms"},
    "mish": {"act": F.mish},
    "hardswish": {"act": F.hardswish},
    "narrow": {"d": 3, "hidden": 1},
    "odd": {"d": 17, "hidden": 33},
}


class Layers(nn.Module):
    """As many linear layers as there are blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(BLOCKS))


class Conditioned(Layers):
    """Blocks that read a tensor with a row for each of the batch, and one weight that they all share."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(D, D) / D)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x) + (condition * (i + 1)).sin() + x @ self.shared)
        return x


class Shared(Layers):
    """One input of the model that all blocks read as it is."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x) * condition)
        return x


class MaskedWeights(Layers):
    """Weights that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(D, D) > 0.3)

    def masked(self, layer: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight * self.mask, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(self.masked(layer, x))
        return x


class Masked(MaskedWeights):
    """And places that are computed for each block and row."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            y = self.masked(layer, x)
            x = x + torch.tanh(y).masked_fill(condition > 0.1 * i, 0.5)
        return x


class Columns(Layers):
    """Blocks that read columns of one tensor, which are no rows of it."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.randn(D, D if wide else BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for layer, column in zip(self.layers, self.columns.unbind(1), strict=False):
            x = x + torch.tanh(layer(x)) * column
        return x


class Truths(nn.Module):
    """What is true or false is computed of numbers that are neither 0 nor 1."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        g = self.g(x)
        some = F.relu(g).bool() | torch.logical_not(F.relu(g - 0.2))
        other = torch.logical_and(g, F.relu(g + 0.3)) & torch.logical_or(F.relu(g), F.relu(-g - 0.1))
        return x + torch.tanh(self.f(x)) * some + torch.sin(self.f(x)) * other


class Added(Truths):
    def forward(self, x: Tensor) -> Tensor:
        g = self.g(x)
        return x + torch.tanh(self.f(x)) * ((g > -0.5) + (g < 0.5))


class Branches(nn.Module):
    """Its states are read forward and backward only by what tells their sign."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)
        self.f.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(F.leaky_relu(x))


class Towers(nn.Module):
    """Two chains, and a head that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(*(Block() for _ in range(BLOCKS))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x.flip(-1))


class Trunk(nn.Module):
    """A second chain that begins at a state of the first one, without a gradient for that."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = (nn.ModuleList(Block() for _ in range(n)) for n in (10, BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, block in enumerate(self.trunk):
            x = block(x)
            if i == 4:
                y = x.detach()
                for other in self.branch:
                    y = other(y)
        return x * y.sin()


class Reading(nn.Module):
    """A chain each block of which reads a state of another chain."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(nn.Linear(D, D) for _ in range(BLOCKS)) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for f, g in zip(self.f, self.g, strict=True):
            a = a + torch.tanh(f(a)) * b.detach()
            b = b + torch.tanh(g(b))
        return a * b


class AllStates(nn.Module):
    """Returns what comes out of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(act=torch.tanh) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return states


class Detached(Layers):
    """Returns what comes out of each block, and some of what is inside, as views without a gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        inside = []
        for layer in self.layers:
            h = layer(x)
            inside.append(h.detach())
            x = x + torch.sigmoid(h) * torch.tanh(h)
        return x, inside


class Attending(nn.Module):
    """Rows of the batch that read one another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.q(x) @ x.T).softmax(-1) @ self.v(x)


class Checkpointed(nn.Module):
    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) if i % self.every else checkpoint(block, x, use_reentrant=False)
        return x


class OneIsDifferent(nn.Module):
    """Blocks of which one has another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(torch.tanh if i == 3 else F.silu) for i in range(2 * BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


_PROGRAM = """
import torch, torch.nn.functional as F
from torch import nn
import hwbp_compile, hwbp_compile.backend
from hwbp_compile.passes.pipeline import rewrite
calls = []
def counted(*args, **kwargs):
    calls.append(rewrite(*args, **kwargs))
    return calls[-1]
hwbp_compile.backend.rewrite = counted
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))
torch.manual_seed(0)
m = nn.Sequential(*(Block() for _ in range(6)))
x = torch.randn(4, 16)
expected = torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
run = torch.compile(m, backend="highway", options=OPTIONS, dynamic=False)
for _ in range(3):
    y = run(x)
    torch.testing.assert_close(y, m(x), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y.square().sum(), list(m.parameters()))
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
print("passes", len(calls), SHOWN)
"""


def said_by_two_processes(folder: Path, options: dict[str, Any], shown: str) -> list[str]:
    """How often the passes run in each of two processes that train a model and share a cache, and ``shown``.

    Outputs and gradients are compared with eager torch.

    Args:
        folder: of the cache.
        options: of the backend.
        shown: an expression, of the records in ``calls``.
    """
    program = _PROGRAM.replace("OPTIONS", repr(options)).replace("SHOWN", shown)
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip().splitlines()[-1])
    return said
