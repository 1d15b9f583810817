"""Watched steps run op by op, and whatever has nothing to be watched is generated code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_models import Reader, compiled, grads, model, settled
from test_global_state import check_unchanged, global_state
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import hwbp_compile
import hwbp_compile.backend as backend
from hwbp_compile import Options, _compat
from hwbp_compile.control.program import Program
from hwbp_compile.passes import worth
from hwbp_compile.residual import ResidualPath
from hwbp_compile.solvers import solve
from hwbp_compile.system import ReferenceSystem

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


def data() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("apply", [pytest.param("always", marks=pytest.mark.slow), "auto"])
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


@pytest.mark.parametrize("apply", ["always", "auto"])
def test_of_recurrences_it_is_known_before(
    apply: str, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them are iterated is decided before the graph is traced, once for both."""
    monkeypatch.setattr("hwbp_compile.recurrent.capture.why_exact_is_faster", lambda *_: "")
    m = Reader(4, 5).double()
    x = torch.randn(24, 2, 4, dtype=torch.float64)
    c = compiled(m, apply=apply, group_size=2, **AUTO)
    equal(grads(m, c, x), grads(m, m, x))
    assert done == ["compile_op_by_op"]
    assert hwbp_compile.monitor(m).history[-1].watched


@pytest.mark.slow
def test_what_was_found_before_an_abort_is_forgotten(
    done: list[str], programs: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph may be another one then, as some of a user's passes are Inductor's only."""
    rewrite, calls = backend.rewrite, []

    def once(graph: Any, options: Options, **more: Any) -> Any:
        calls.append(options)
        return rewrite(graph, options if len(calls) == 1 else Options(apply="never"), **more)

    monkeypatch.setattr(backend, "rewrite", once)
    m, x = model(), data()
    equal(grads(m, compiled(m, **AUTO), x), grads(m, m, x))
    assert done == ["(compile_with_inductor)", "compile_op_by_op", "compile_with_inductor"]
    assert [(p.records, p.is_sure) for p in programs] == [(False, True)]


def test_nothing_is_watched_where_nothing_trains(done: list[str]) -> None:
    m, x = model(), data()
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, apply="always", **AUTO)(x), m(x))
    assert done == ["compile_with_inductor"]


@pytest.mark.slow
def test_one_program_of_each_setting_holds_for_all_sizes(done: list[str]) -> None:
    """What Inductor finds out about sizes is known from the first program on, so that is its own."""
    m = settled()
    c = compiled(m, dynamic=True, apply="always", **AUTO)
    for rows in (5, 5, 7, 9, 12):
        x = torch.randn(rows, 4, dtype=torch.float64)
        found, exact = grads(m, c, x), grads(m, m, x)
        assert all((f - e).norm() <= 0.1 * e.norm() for f, e in zip(found, exact, strict=True))
    # Dynamo may begin anew where it finds a size in an unexpected place.
    assert [each for each in done if each[0] != "("] == ["compile_with_inductor"] * 2
    assert [s.watched for s in hwbp_compile.monitor(m).history] == [True, *[False] * 4]


@pytest.mark.parametrize("codegen", ["inductor", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_watched_step_records_where_the_backward_pass_is_compiled_anew(codegen: str) -> None:
    m, x = settled(), data()
    c = compiled(m, **AUTO | {"apply": "always", "codegen": codegen})
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = grads(m, c, x)
    equal(found, grads(m, m, x))
    (step,) = hwbp_compile.monitor(m).history
    assert step.watched
    assert step.chains


def test_no_iterate_is_kept_until_the_last_one_is_there() -> None:
    """How far a step went is computed as soon as it is made."""

    def cotangents(first: Tensor) -> tuple[Tensor, ...]:
        vjps = [lambda w: (w[0].sin(),)] * 8
        path = ResidualPath(((1.0,),))
        return solve(ReferenceSystem((first,), vjps, path), iterations=5)

    names = [str(n.target) for n in make_fx(cotangents)(torch.randn(3)).graph.nodes]
    events = [name for name in names if "cdist" in name or "sin." in name]
    distances = [i for i, name in enumerate(events) if "cdist" in name]
    assert distances == [8 * (j + 1) + j for j in range(5)], events


def test_what_a_graph_is_given_is_freed_when_it_has_been_read() -> None:
    gm = make_fx(lambda x: x.sin().cos())(torch.randn(3))
    assert isinstance(gm, GraphModule)
    given = [torch.randn(3)]
    expected = given[0].sin().cos()
    torch.testing.assert_close(_compat._run_as_it_is(gm, given)(given), expected)
    assert given == []
