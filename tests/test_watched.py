"""Watched steps run op by op, and whatever has nothing to be watched is generated code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_models import compiled, grads, model, settled
from test_global_state import check_unchanged, global_state
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import hwbp_compile
from hwbp_compile import _compat
from hwbp_compile.control.program import Program
from hwbp_compile.control.variants import Variants
from hwbp_compile.passes import worth

AUTO: dict[str, Any] = {"iterations": "auto", "codegen": "inductor", "max_iterations": 4}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How graphs are compiled, in order; what ends before code is generated is in brackets."""
    found: list[str] = []

    def listed(name: str) -> None:
        original = getattr(_compat, name)

        def compile(*args: Any) -> Any:
            found.append(f"({name})")
            result = original(*args)
            found[-1] = name
            return result

        monkeypatch.setattr(_compat, name, compile)

    listed("compile_with_inductor")
    listed("compile_op_by_op")
    return found


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """What is compiled meanwhile."""
    found: list[Program] = []
    compile_for = Variants._compile_for

    def listed(self: Variants, *args: Any) -> Any:
        program, findings = compile_for(self, *args)
        found.append(program)
        return program, findings

    monkeypatch.setattr(Variants, "_compile_for", listed)
    return found


def data() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("apply", ["always", "auto"])
def test_a_watched_step_needs_no_code(apply: str, done: list[str]) -> None:
    """What it records, and its exact gradients, are those of eager code; the next step has code."""
    m, x = settled(), data()
    by_op = hwbp_compile.monitor(m)
    grads(m, compiled(m, **AUTO | {"codegen": "eager", "apply": apply}), x)
    (expected,) = (step.chains for step in by_op.history)
    torch._dynamo.reset()
    done.clear()
    before = global_state()
    c = compiled(m, apply=apply, **AUTO)
    exact = grads(m, m, x)
    equal(grads(m, c, x), exact)
    first = ["(compile_with_inductor)"] if apply == "auto" else []
    assert done == [*first, "compile_op_by_op"]
    check_unchanged(before)
    step = hwbp_compile.monitor(m).history[-1]
    assert step.watched
    assert [chain.steps for chain in step.chains] == [pytest.approx(chain.steps) for chain in expected]
    found = grads(m, c, x)
    assert done[len(first) + 1 :] == ["compile_with_inductor"]
    step = hwbp_compile.monitor(m).history[-1]
    assert not step.watched
    assert any((f - e).abs().max() > 1e-12 for f, e in zip(found, exact, strict=True))
    grads(m, c, x)
    assert len(done) == len(first) + 2


@pytest.mark.measured
def test_what_is_left_exact_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, done: list[str], programs: list[Program]
) -> None:
    monkeypatch.setattr(worth.Comparison, "reason", "too large")
    m, x = model(), data()
    with fresh_cache():
        for _ in range(2):  # the second time the code comes from a cache
            torch._dynamo.reset()
            done.clear()
            programs.clear()
            c = compiled(m, **AUTO)
            for _ in range(3):
                equal(grads(m, c, x), grads(m, m, x))
            assert done == ["compile_with_inductor"]
            assert [(p.records, p.is_sure) for p in programs] == [(False, True)]


def test_where_no_chain_can_be_rewritten_there_is_code_after_all(
    done: list[str], programs: list[Program]
) -> None:
    m, x = model(), data()
    c = compiled(m, apply="always", min_blocks=100, **AUTO)
    for _ in range(3):
        equal(grads(m, c, x), grads(m, m, x))
    assert done == ["compile_op_by_op", "compile_with_inductor"]
    assert [(p.records, p.is_sure) for p in programs] == [(False, True)]


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


@pytest.mark.parametrize("apply", ["always", "auto"])
def test_of_recurrences_it_is_known_before(
    apply: str, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them are iterated is decided before the graph is traced, once for both."""
    monkeypatch.setattr("hwbp_compile.recurrent.capture.why_exact_is_faster", lambda *_: "")
    m = Reader().double()
    x = torch.randn(24, 2, 4, dtype=torch.float64)
    c = compiled(m, apply=apply, group_size=2, **AUTO)
    equal(grads(m, c, x), grads(m, m, x))
    assert done == ["compile_op_by_op"]
    assert hwbp_compile.monitor(m).history[-1].watched
