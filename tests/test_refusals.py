"""What cannot be rewritten, or must not be, is left exact with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import recorded, relative_error, rewritten
from families import mlp
from small_models import D, Through, Unbatchable, chain, check_exact, compiled, grads, model
from torch import Tensor, nn
from torch.fx import Graph, Node

import hwbp_compile.passes.pipeline as pipeline
from hwbp_compile.passes import outcomes
from hwbp_compile.passes.linear_ops import FIRST, LINEARITY, register_linear


def test_model_without_residuals() -> None:
    m = nn.Sequential(*[nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(6)]).double()
    check_exact(m, torch.randn(3, D).double(), chains=0, iterations=0)


def test_exact_and_never_apply_no_approximation() -> None:
    m, x = model(), torch.randn(5, 4).double()
    expected = grads(m, m, x)
    for options in (
        {"iterations": "exact"},
        {"apply": "never", "iterations": 0},
        {"min_blocks": 7, "iterations": 0},
    ):
        torch._dynamo.reset()
        for f, e in zip(grads(m, compiled(m, **options), x), expected, strict=True):
            torch.testing.assert_close(f, e)


def test_graph_break_leaves_short_chains_exact() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(*chain(5)), nn.Sequential(*chain(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    check_exact(Broken().double(), torch.randn(5, D).double(), chains=1)


class Clip(torch.autograd.Function):
    """Clips the gradient: not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.05, 0.05)


class Square(torch.autograd.Function):
    """Squares the gradient: every operator is known, their use is not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * g


class AddOne(torch.autograd.Function):
    """Adds a constant to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + 1


class Floor(torch.autograd.Function):
    """Quantises the gradient by a division that rounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.div(g, 0.25, rounding_mode="floor") * 0.25


class Quantise(torch.autograd.Function):
    """Quantises the gradient by a cast to integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (g * 4).to(torch.int32).to(g.dtype) / 4


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Clip, "clamp"),
        (Square, "multiplies two gradients"),
        (AddOne, "constant"),
        (Floor, "rounds"),
        (Quantise, "floating-point"),
    ],
)
def test_blocks_that_are_not_linear(function: Any, reason: str) -> None:
    m = nn.Sequential(nn.Linear(D, D), *chain(4), Through(function), *chain(4)).double()
    x = torch.randn(5, D).double()
    expected = grads(m, m, x)
    with recorded() as records:
        found = grads(m, compiled(m), x)
    assert [n for n, _ in rewritten(records)] == [4, 4]
    assert any(reason in o.reason for r in records for o in r.outcomes)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def beside(g: Tensor) -> Tensor:
    """What lies behind the gradient's own place in a larger memory."""
    return torch.cat([g, 2 * g]).view(-1)[g.numel() :].as_strided(g.shape, g.stride(), 0)


def with_gaps(g: Tensor) -> Tensor:
    rows, columns = g.shape
    memory = torch.empty_strided((rows, columns), (2 * columns, 2), dtype=g.dtype).copy_(g)
    return memory.transpose(0, 1).as_strided((rows, columns), (2 * columns, 2))


def half_of_memory(g: Tensor) -> Tensor:
    memory = torch.ones(2 * g.numel(), dtype=g.dtype)[g.numel() :]
    return torch.as_strided_scatter(memory, g.contiguous(), g.shape, g.stride(), 0).view(g.shape)


def every_other_element(g: Tensor) -> Tensor:
    memory = torch.ones(2 * g.numel(), dtype=g.dtype)[::2]
    return torch.as_strided_scatter(memory, g.contiguous(), g.shape, g.stride(), 0).reshape(g.shape)


def in_another_dtype(g: Tensor) -> Tensor:
    memory = torch.zeros(g.numel(), dtype=g.dtype)
    return torch.as_strided_scatter(memory, g.float(), g.shape, g.contiguous().stride(), 0).view(g.shape)


@pytest.mark.parametrize(
    "backward",
    [
        lambda g: g.contiguous().as_strided(g.shape, (0, 1)),
        beside,
        with_gaps,
        half_of_memory,
        every_other_element,
        in_another_dtype,
    ],
)
def test_backward_that_depends_on_the_memory_layout_is_left_exact(
    backward: Callable[[Tensor], Tensor],
) -> None:
    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return backward(g)

    m = nn.Sequential(nn.Linear(D, D), *[Through(ByHand) for _ in range(5)]).double()
    check_exact(m, torch.randn(5, D).double(), chains=0, iterations=0, apply="always", tolerance=1e-6)


def test_copies_stay_where_a_part_of_one_is_read_by_strides() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = mlp(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            y = self.g(x).clone()
            y.as_strided((5, 4), (D, 1), 0).mul_(2)
            return x + torch.cat([self.f(x), y])[5:]

    m = nn.Sequential(nn.Linear(D, D), *[Odd() for _ in range(5)]).double()
    check_exact(m, torch.randn(5, D).double(), chains=0, iterations=0, apply="always")


def test_operator_that_cannot_be_batched_is_refused_by_name() -> None:
    m, x = nn.Sequential(*[Unbatchable() for _ in range(5)]).double(), torch.randn(3, D).double()
    expected = grads(m, m, x)
    for known in (False, True):
        torch._dynamo.reset()
        if known:
            register_linear("hwbp_test::twice", FIRST)
        with recorded() as records:
            found = grads(m, compiled(m, iterations=1), x)
        assert rewritten(records) == []
        assert all("hwbp_test.twice" in o.reason for r in records for o in r.outcomes)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)
    del LINEARITY["hwbp_test::twice"]


def check_exact_after_internal_error() -> None:
    """An approximation would show: with no iterations it is a poor one."""
    m, x = model(), torch.randn(5, 4).double()
    expected = grads(m, m, x)
    with recorded() as records:
        found = grads(m, compiled(m, iterations=0), x)
    assert "internal error" in records[0].outcomes[0].reason
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_failure_inside_a_pass_leaves_the_chain_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(outcomes, "trace_schedule", fail)
    check_exact_after_internal_error()


def test_failure_while_inserting_leaves_everything_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pipeline.insert_schedule

    def fail_afterwards(*args: Any) -> None:
        original(*args)
        raise KeyError("a bug")

    monkeypatch.setattr(pipeline, "insert_schedule", fail_afterwards)
    check_exact_after_internal_error()


@pytest.mark.parametrize("name", ["join_row_gradients", "sink_stacks", "restack", "take_apart"])
def test_failure_while_simplifying_takes_it_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[Node] = []

    def spoil(graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            a, b = node.args
            node.args = (a, graph.create_node("call_function", torch.ops.aten.neg.default, (b,)))
            changed.append(node)
        raise KeyError("a bug")

    m, x = model(), torch.randn(5, 4).double()
    expected = grads(m, compiled(m, iterations=1), x)
    assert relative_error(expected, grads(m, m, x)) > 1e-3
    torch._dynamo.reset()
    monkeypatch.setattr(pipeline, name, spoil)
    assert relative_error(grads(m, compiled(m, iterations=1), x), expected) <= 1e-12
    assert changed
