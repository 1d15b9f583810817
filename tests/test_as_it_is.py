"""Graphs of nothing but layers that the library runs, which are not compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from compare import relative_error
from torch import Tensor, nn

import hwbp_compile
from hwbp_compile import _compat
from hwbp_compile.control.runs import all_runs
from hwbp_compile.recurrent import as_it_is, layer


@pytest.fixture
def by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where our kernels are the slower ones, and an iteration too."""
    for module in (as_it_is, layer):
        monkeypatch.setattr(module, "why_library", lambda *_: "for a test")
    monkeypatch.setattr("hwbp_compile.recurrent.capture.why_exact_is_faster", lambda *_: "for a test")
    torch._dynamo.reset()


@contextmanager
def compilations() -> Iterator[list[None]]:
    """One entry for each that is made inside."""
    made: list[None] = []
    original = _compat.compile_with_inductor

    def compile(*args: Any) -> Any:
        made.append(None)
        return original(*args)

    with mock.patch.object(_compat, "compile_with_inductor", compile):
        yield made


class First(nn.Module):
    """What a module returns first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Tensor:
        y: Tensor = self.module(*inputs)[0]
        return y


def gradients(model: nn.Module, forward: Any, x: Tensor, *more: Any) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *model.parameters()]
    results = forward(leaf, *more)
    y, *last = [results] if isinstance(results, Tensor) else results
    states = [t for s in last for t in (s if isinstance(s, tuple) else (s,))]
    loss = sum((i + 2) * t.sin().sum() for i, t in enumerate([y, *states]))
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.usefixtures("by_the_library")
@pytest.mark.parametrize("options", [{}, {"iterations": "exact"}, {"apply": "never"}])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False, "num_layers": 2}],
)
def test_gradients(kind: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    module = getattr(nn, kind)(3, 5, **settings).double()
    compiled = torch.compile(module, backend="highway", fullgraph=True, options=options)
    with compilations() as made:
        for size in (6, 6, 7):
            x = torch.randn(size, 4, 3).double()
            expected = gradients(module, module, x)
            assert relative_error(gradients(module, compiled, x), expected) <= 1e-14
        with torch.no_grad():
            torch.testing.assert_close(compiled(x)[0], module(x)[0], rtol=0, atol=0)
    assert not made
    first = next(module.parameters())
    runs = [r for r in all_runs() if any(p is first for p in r.parameters())]
    assert sum(r.steps for r in runs) == 3
    assert not any(r.history for r in runs)


@pytest.mark.usefixtures("by_the_library")
def test_given_states_projections_and_dropout() -> None:
    module = nn.LSTM(3, 5, num_layers=2, proj_size=2, dropout=0.5).double()
    compiled = torch.compile(module, backend="highway", fullgraph=True)
    x = torch.randn(6, 4, 3).double()
    states = torch.randn(2, 4, 2).double(), torch.randn(2, 4, 5).double()
    with compilations() as made:
        torch.manual_seed(1)
        found = gradients(module, compiled, x, states)
    torch.manual_seed(1)
    assert relative_error(found, gradients(module, module, x, states)) <= 1e-14
    assert not made


def test_half_precision_without_a_kernel() -> None:
    """By what is found out of the layer itself."""
    torch._dynamo.reset()
    module = nn.LSTM(3, 5).to(torch.bfloat16)
    compiled = torch.compile(module, backend="highway", options={"iterations": "exact"})
    x = torch.randn(6, 4, 3, dtype=torch.bfloat16)
    with compilations() as made:
        found = gradients(module, compiled, x)
    for a, b in zip(found, gradients(module, module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not made


def test_on_the_device_meta() -> None:
    torch._dynamo.reset()
    module = nn.GRU(3, 5).to("meta")
    compiled = torch.compile(module, backend="highway", options={"iterations": "exact"})
    y, _ = compiled(torch.randn(6, 4, 3, device="meta"))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("by_the_library")
def test_what_is_iterated_later_is_compiled() -> None:
    module = nn.GRU(3, 5).double()
    compiled = torch.compile(module, backend="highway", options={"group_size": 1})
    x = torch.randn(6, 4, 3).double()
    expected = gradients(module, module, x)
    with compilations() as made, pytest.MonkeyPatch.context() as patch:
        assert relative_error(gradients(module, compiled, x), expected) <= 1e-14
        assert not made
        patch.setattr("hwbp_compile.recurrent.capture.why_exact_is_faster", lambda *_: "")
        hwbp_compile.set_iterations(module, 0)
        assert relative_error(gradients(module, compiled, x), expected) > 1e-3
        assert len(made) == 1
        assert len(hwbp_compile.monitor(module).history) == 0  # k = 0 makes no step
        hwbp_compile.set_iterations(module, 6)
        assert relative_error(gradients(module, compiled, x), expected) <= 1e-10
        hwbp_compile.set_iterations(module, "exact")
        assert relative_error(gradients(module, compiled, x), expected) <= 1e-14


@pytest.mark.usefixtures("by_the_library")
@pytest.mark.parametrize("kind", ["more work", "autocast", "own kernels"])
def test_what_is_compiled(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = nn.GRU(3, 5)
    if kind == "more work":
        model = nn.Sequential(First(model), nn.Linear(5, 2))
    if kind == "own kernels":
        monkeypatch.setattr(as_it_is, "why_library", lambda *_: "")
    compiled = torch.compile(model, backend="highway", options={"iterations": "exact"})
    x = torch.randn(6, 4, 3)
    with compilations() as made, torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = gradients(model, compiled, x)
        expected = gradients(model, model, x)
    assert len(made) == 1
    assert relative_error(found, expected) <= (0.1 if kind == "autocast" else 1e-5)
