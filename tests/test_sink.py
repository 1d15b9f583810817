"""What is kept for a rewritten backward pass: few stacks, of what the rest is computed from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import kept_beside
from torch import Tensor, nn
from torch._inductor.lowering import needs_realized_inputs
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compile import _compat
from hwbp_compile.passes.linear_ops import op_name
from hwbp_compile.passes.sink import sink_stacks
from hwbp_compile.passes.views import concatenated

ROWS, WIDTH = 64, 48
"""Large enough for values to count for more than the number of tensors."""


class Block(nn.Module):
    """A norm, a product, and an activation with a formula of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.up(self.norm(x)))


class Shifted(nn.Module):
    """Reads the state through an elementwise function, as the state's own update does."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return x + y * torch.sigmoid(self.up(y))


class Attention(nn.Module):
    """Three values that are parts of one product."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(2, ROWS // 2, 2, WIDTH // 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(2, ROWS // 2, WIDTH))


def kept_by(model: nn.Module, x: Tensor, options: dict[str, Any]) -> tuple[list[int], list[Tensor]]:
    """Bytes of what is kept beside inputs and parameters, and the gradients."""
    compiled = torch.compile(model, backend="highway", options={"codegen": "eager", **options})
    with kept_beside(x, *model.parameters()) as kept:
        y = compiled(x)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return sorted(tensor.nbytes for tensor in kept.values()), gradients


@pytest.mark.parametrize("make", [Block, Shifted, pytest.param(Attention, marks=pytest.mark.slow)])
def test_what_is_kept(make: Any) -> None:
    """No more tensors for more blocks, and no more bytes than exact backpropagation needs, or few."""
    found = []
    for depth in (8, 12):
        torch._dynamo.reset()
        model = nn.Sequential(*(make() for _ in range(depth))).double()
        x = torch.randn((2, ROWS // 2, WIDTH) if make is Attention else (ROWS, WIDTH), dtype=torch.float64)
        exact, expected = kept_by(copy.deepcopy(model), x, {"apply": "never"})
        torch._dynamo.reset()
        kept, gradients = kept_by(model, x, {"iterations": depth, "apply": "always"})
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert sum(kept) <= 1.1 * sum(exact)
        found.append(len(kept))
    if make is not Shifted:  # in which stacks would have some rows in common
        assert found[0] == found[1] < 8


def stacks_after(function: Any, *inputs: Tensor) -> list[list[str]]:
    """What is concatenated in a graph of a backward pass, once stacks are sunk; results stay as they were."""
    traced = make_fx(function, tracing_mode="fake")(*inputs)
    expected = traced(*inputs)
    for node in traced.graph.nodes:
        if node.op == "call_function":
            node.meta["partitioner_tag"] = "is_backward"
    sink_stacks(traced.graph)
    traced.graph.lint()
    traced.recompile()
    torch.testing.assert_close(traced(*inputs), expected)
    parts = [concatenated(n) for n in traced.graph.nodes]
    return sorted(
        [op_name(n) if n.op == "call_function" else n.op for n in column] for column in parts if column
    )


def test_functions_of_one_value_share_its_stack() -> None:
    def function(*rows: Tensor) -> tuple[Tensor, Tensor]:
        made = [x @ x.t() for x in rows]
        twice = [m * m.sigmoid() for m in made]
        return torch.cat([t * 2 for t in twice]), torch.cat([m.tanh().t() for m in made[1:]])

    rows = [torch.randn(3, 3) for _ in range(4)]
    assert stacks_after(function, *rows) == [["aten::mm"] * 4]


def test_of_equal_values_one_is_stacked() -> None:
    def function(*rows: Tensor) -> tuple[Tensor, Tensor]:
        first = [(x @ x).exp() + 1 for x in rows]
        again = [(x @ x).exp() for x in rows]
        return torch.cat(first), torch.cat(again)

    assert stacks_after(function, *(torch.randn(3, 3) for _ in range(3))) == [["aten::exp"] * 3]


def test_the_smaller_one_is_stacked() -> None:
    """A result that is smaller than what it is made of, and one whose parts differ in how they are made."""

    def narrow(*rows: Tensor) -> Tensor:
        return torch.cat([(x @ x).sum(1, keepdim=True).exp().expand(-1, 600) for x in rows])

    wide = [torch.rand(600, 600) / 600 for _ in range(2)]
    assert stacks_after(narrow, *wide) == [["aten::exp"] * 2]

    def added(*rows: Tensor) -> Tensor:
        return torch.cat([(x @ x) + (y @ y) for x, y in zip(rows[::2], rows[1::2], strict=True)])

    assert stacks_after(added, *(torch.randn(3, 3) for _ in range(4))) == [["aten::add"] * 2]

    def unlike(*rows: Tensor) -> Tensor:
        return torch.cat([x.exp() if i % 2 else x.sin() for i, x in enumerate(rows)])

    assert stacks_after(unlike, *(torch.randn(3, 3) for _ in range(2))) == [["aten::sin", "aten::exp"]]


def test_random_numbers_stay_where_they_are() -> None:
    def function(*rows: Tensor) -> Tensor:
        return torch.cat([torch.bernoulli(x) * x for x in rows])

    traced = make_fx(function, tracing_mode="fake")(torch.rand(3), torch.rand(3))
    for node in traced.graph.nodes:
        node.meta["partitioner_tag"] = "is_backward"
    sink_stacks(traced.graph)
    drawn = [n for n in traced.graph.nodes if n.op == "call_function" and op_name(n) == "aten::bernoulli"]
    assert [tuple(n.meta["val"].shape) for n in drawn] == [(3,), (3,)]


def test_rows_in_another_order() -> None:
    def function(*rows: Tensor) -> tuple[Tensor, Tensor]:
        made = [x @ x for x in rows]
        return torch.cat([m.exp() for m in made]), torch.cat([m.sin() for m in reversed(made)])

    parts = stacks_after(function, *(torch.randn(3, 3) for _ in range(3)))
    assert parts == [["aten::mm"] * 3, ["aten::slice"] * 3]


class Turned(nn.Module):
    """Values that are laid out in another order than others of their shape."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.mixed, self.conv = nn.Linear(channels, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.conv(F.gelu(y) * torch.sigmoid(y))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_other_layouts(memory_format: torch.memory_format) -> None:
    model = nn.Sequential(*(Turned() for _ in range(5))).double().to(memory_format=memory_format)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    options = {"codegen": "eager", "iterations": 5, "apply": "always"}
    compiled = torch.compile(model, backend="highway", options=options)
    found = torch.autograd.grad(compiled(x).square().sum(), [x, *model.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Scaled(nn.Module):
    """A scalar of a wider type, which a tensor's type does not follow."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.down = nn.Linear(width, width, dtype=torch.float32)
        self.up = nn.Linear(width, width, dtype=torch.float32)
        self.shift = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        return x + self.up(torch.sin(h + self.shift) * torch.cos(h))


def test_scalars_of_a_wider_type() -> None:
    model, x = nn.Sequential(*(Scaled() for _ in range(5))), torch.randn(256, 64)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    options = {"codegen": "eager", "iterations": 5, "apply": "always"}
    compiled = torch.compile(model, backend="highway", options=options)
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_stacks_take_no_kernels_of_their_own() -> None:
    """Their rows are computed where they are in the graph, not where a stack is made."""
    # As in a new process.
    needs_realized_inputs.discard(torch.ops.hwbp_compile.stack.default)
    _compat._compute_operands_where_they_are.cache_clear()
    counts = []
    for backend, options in (("highway", {"iterations": 2, "apply": "always"}), ("inductor", None)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(Block(32) for _ in range(12)))
        compiled = torch.compile(model, backend=backend, options=options, dynamic=False)
        with fresh_cache():
            _, code = run_and_get_code(lambda c=compiled: c(torch.randn(4, 32)).sum().backward())
        counts.append(code[0].count("async_compile.cpp_pybinding("))
        assert ("hwbp_compile.stack" in code[0]) is (backend == "highway")
    ours, theirs = counts
    assert 0 < ours <= theirs
