"""Rows of stacked parameters that are copied, so that equal layers share their kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import joint_graphs, kept_beside, relative_error
from small_models import compiled, grads, model
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, Node

from hwbp_compile import stack_parameters, unstack_parameters
from hwbp_compile.passes import apart
from hwbp_compile.passes.linear_ops import op_name

BLOCKS = 6
SETTINGS: list[dict[str, Any]] = [{"apply": "never"}, {"apply": "always", "iterations": 2}]


@pytest.fixture(autouse=True)
def _no_pass_is_left_out(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, "hwbp_compile"):
        yield
    assert not [r for r in caplog.get_records("call") if "internal error" in r.getMessage()]


def graph_of(m: nn.Module, x: Tensor, dynamic: bool = False, **options: Any) -> Graph:
    """The joint graph as it is compiled."""
    with joint_graphs() as seen:
        compiled(m, dynamic, **options)(x).square().sum().backward()
    (graph,) = seen
    return graph


def named(graph: Graph, name: str) -> list[Node]:
    """The operators of this name that read an input."""
    calls = [n for n in graph.nodes if n.op == "call_function" and op_name(n) == name]
    return [n for n in calls if n.all_input_nodes[0].op == "placeholder"]


def copies(graph: Graph) -> tuple[int, int]:
    """How many inputs the forward and the backward pass copy."""
    found = named(graph, "hwbp_compile::rows")
    late = [n for n in found if n.meta.get("partitioner_tag") == "must_be_in_backward"]
    return len(found) - len(late), len(late)


def kept_by(m: nn.Module, x: Tensor, **options: Any) -> list[tuple[int, ...]]:
    """The shapes of what is kept for the backward pass, beside inputs and parameters."""
    torch._dynamo.reset()
    with kept_beside(x, *m.parameters()) as kept:
        y = compiled(m, **options)(x)
    y.sum().backward()
    return sorted(tuple(tensor.shape) for tensor in kept.values())


@pytest.mark.parametrize("options", [SETTINGS[0], pytest.param(SETTINGS[1], marks=pytest.mark.slow)])
def test_norms_read_copies(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights and biases, in the forward pass, and with exact backpropagation the weights in both."""
    m, x = model(BLOCKS), torch.randn(5, 4, dtype=torch.float64)
    expected = grads(m, compiled(m, **options), x)
    m.zero_grad()
    stack_parameters(m)
    graph = graph_of(m, x, **options)
    assert copies(graph) == ((2, 1) if options["apply"] == "never" else (2, 0))
    norms = {n.all_input_nodes[0] for n in named(graph, "hwbp_compile::rows")}
    rows = named(graph, "aten::select")
    assert not any(n.all_input_nodes[0] in norms for n in rows)
    assert len(rows) == 4 * BLOCKS, "weights and biases of products stay where they are"
    kept = kept_by(m, x, **options)
    monkeypatch.setattr(apart, "_FEWEST", 1 << 30)
    assert kept == kept_by(m, x, **options), "no copy is kept"
    m.zero_grad()
    graph_of(m, x, **options)
    unstack_parameters(m)
    found = [p.grad for p in m.parameters() if p.grad is not None]
    assert relative_error(found, expected) <= 1e-10


class Convolutional(nn.Module):
    """``relu(x + bn(conv(x)))``"""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return torch.relu(x + y)


def convolutional(depth: int) -> nn.Module:
    return nn.Sequential(*(Convolutional() for _ in range(depth))).double()


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize(
    ("large", "iterated", "exact"),
    [pytest.param(1 << 12, (3, 1), (3, 2), marks=pytest.mark.slow), (2, (1, 0), (1, 1))],
)
def test_convolutions_read_copies(
    options: dict[str, Any],
    large: int,
    iterated: tuple[int, int],
    exact: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Generated kernels lay their weights out anew. Norms are such kernels."""
    monkeypatch.setattr(apart, "_LARGE", large)
    m, x = convolutional(BLOCKS), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = grads(m, compiled(m, **options), x)
    m.zero_grad()
    stack_parameters(m)
    assert copies(graph_of(m, x, **options)) == (exact if options["apply"] == "never" else iterated)
    unstack_parameters(m)
    found = [p.grad for p in m.parameters() if p.grad is not None]
    assert relative_error(found, expected) <= 1e-10


def test_what_is_convolved_is_not_copied() -> None:
    weight = torch.randn(3, 3, 3, 3, requires_grad=True)

    class Frames(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.conv2d(frame, weight) for frame in x.unbind()])

    assert copies(graph_of(Frames(), torch.randn(5, 2, 3, 4, 4), apply="never")) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"), [(model, (5, 4)), (convolutional, (2, 3, 4, 4))], ids=["products", "convolutions"]
)
def test_equal_layers_share_their_kernels(make: Callable[[int], nn.Module], shape: tuple[int, ...]) -> None:
    counts = []
    for depth in (BLOCKS, 2 * BLOCKS):
        torch._dynamo.reset()
        m = make(depth)
        x = torch.randn(shape, dtype=torch.float64)
        expected = grads(m, m, x)
        m.zero_grad()
        stack_parameters(m)
        c = compiled(m, codegen="inductor", apply="never")
        with torch._inductor.config.patch(force_disable_caches=True):
            _, code = run_and_get_code(lambda m=m, c=c, x=x: grads(m, c, x))
        counts.append([text.count("async_compile.cpp_pybinding(") for text in code])
        unstack_parameters(m)
        assert relative_error([p.grad for p in m.parameters() if p.grad is not None], expected) <= 1e-10
    few, more = map(sum, counts)
    assert few > 0
    # The partitioner does not decide alike each time, so a few differ; with views there are two a layer more.
    assert more - few < BLOCKS


class Rows(nn.Module):
    """Reads rows of one tensor, from both ends and in several ways."""

    def __init__(self, rows: Tensor, learned: bool, how: str = "") -> None:
        super().__init__()
        self.rows = nn.Parameter(rows) if learned else rows
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "first reduced":
            x = x * self.rows[2].amax()
        for i in (0, -1, 1, -2, 1):
            x = (x * (self.rows[i].unsqueeze(0) if self.how == "unsqueezed" else self.rows[i])).sin()
        if self.how == "last reduced":
            x = x * self.rows[2].amax()
        if self.how == "strided":
            x = x + self.rows[1].as_strided((x.shape[1],), (1,), x.shape[1]) * self.rows[0]
        return x


@pytest.mark.parametrize(
    ("rows", "learned", "how", "forward", "backward"),
    [
        (torch.randn(5, 3), True, "", 1, 1),
        (torch.randn(5, 3), False, "", 1, 1),
        (torch.randn(5, 3), True, "unsqueezed", 0, 0),  # by a view that both passes read
        (torch.randn(5, 3), True, "first reduced", 1, 1),
        (torch.randn(5, 3), True, "last reduced", 1, 1),
        (torch.randn(5, 3), True, "strided", 1, 1),
        (torch.randn(3, 5).T, True, "", 0, 0),
        (torch.ones(5, 3, dtype=torch.int64), False, "", 0, 0),
        (torch.randn(5, (1 << 12) - 1), True, "", 1, 1),
        (torch.randn(5, 1 << 12), True, "", 0, 0),
        (torch.randn(3, 3), True, "", 0, 0),
        (torch.randn(9, 3), True, "", 0, 0),  # of which four are read
    ],
)
def test_what_is_copied(rows: Tensor, learned: bool, how: str, forward: int, backward: int) -> None:
    m, x = Rows(rows, learned, how), torch.randn(2, rows.shape[1], requires_grad=True)
    wanted = [x, *m.parameters()]
    expected = torch.autograd.grad(m(x).sum(), wanted)
    assert copies(graph_of(m, x, apply="never")) == (forward, backward)
    torch._dynamo.reset()
    found = torch.autograd.grad(compiled(m, apply="never")(x).sum(), wanted)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_rows_of_dynamic_inputs_stay_where_they_are() -> None:
    m, x = nn.Linear(3, 3), torch.randn(6, 3, requires_grad=True)

    class Reversed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return m(x[-1] * x[0].sin() * x[1] * x[2])

    assert copies(graph_of(Reversed(), x, dynamic=True, apply="never")) == (0, 0)


class Budgeted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.region_activation_memory_budget(1.0):
            y: Tensor = self.inner(x)
        return y


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"),
    reason="this torch has no such regions",
)
@pytest.mark.parametrize("options", SETTINGS)
def test_a_memory_budget(options: dict[str, Any]) -> None:
    """The partitioner wants all of the forward pass to be in its region."""
    m, x = Budgeted(model(BLOCKS)), torch.randn(5, 4, dtype=torch.float64)
    expected = grads(m, compiled(m.inner, **options), x)
    m.zero_grad()
    stack_parameters(m)
    assert copies(graph_of(m, x, **options))[0] == 2
    unstack_parameters(m)
    assert relative_error([p.grad for p in m.parameters() if p.grad is not None], expected) <= 1e-10


def test_the_operator() -> None:
    for stack in (torch.randn(4, 3), torch.randn(3, 4, dtype=torch.bfloat16).T, torch.randn(2, 3, 5)):
        rows = torch.ops.hwbp_compile.rows(stack)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(rows, stack, strict=True))
        assert len({r.untyped_storage().data_ptr() for r in rows} | {stack.data_ptr()}) == len(rows) + 1
        torch.library.opcheck(torch.ops.hwbp_compile.rows.default, (stack,))
