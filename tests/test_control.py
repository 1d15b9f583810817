"""Settings that change while a model trains."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from small_models import Reader, compiled, grads, model, settled
from torch import nn
from torch._dynamo.utils import counters

import hwbp_compile
from hwbp_compile import _compat
from hwbp_compile.control import runs as runs_module
from hwbp_compile.control.choices import Findings
from hwbp_compile.control.variants import KEPT, Variants
from hwbp_compile.options import Options

X = torch.randn(5, 4, dtype=torch.float64)


def fresh(m: nn.Module, x: torch.Tensor = X, **options: Any) -> list[torch.Tensor]:
    """Gradients of a copy that is compiled with these options from the start."""
    torch._dynamo.reset()
    twin = copy.deepcopy(m)
    return grads(twin, compiled(twin, apply="always", **options), x)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(a, b, strict=True))


@contextmanager
def counting() -> Iterator[list[Options]]:
    """The options of each compilation while the context lasts."""
    found: list[Options] = []
    original = Variants._compile_for

    def compile_for(self: Variants, options: Options, inputs: Any) -> Any:
        found.append(options)
        return original(self, options, inputs)

    with mock.patch.object(Variants, "_compile_for", compile_for):
        yield found


def test_a_change_holds_from_the_next_step_and_costs_one_compilation() -> None:
    m = model()
    settings: list[dict[str, Any]] = [
        {"iterations": 1},
        {"iterations": 3},
        {"iterations": 1, "gamma": 0.3},
        {"iterations": 1, "gamma": 0.3, "group_size": 2, "exact_tail": 1},
        {"iterations": "exact"},
    ]
    expected = [fresh(m, **s) for s in settings]
    torch._dynamo.reset()
    c = compiled(m, apply="always", iterations=2)
    with counting() as compilations:
        grads(m, c, X)
        for s, e in zip(settings, expected, strict=True):
            hwbp_compile.set_iterations(c, **s)
            assert same(grads(m, c, X), e), s
        assert len(compilations) == 6
        frames = dict(counters["frames"])
        hwbp_compile.set_iterations(m, 3, gamma=None, group_size=None, exact_tail=None)
        assert same(grads(m, c, X), expected[1])
        hwbp_compile.set_iterations(m, None)
        assert same(grads(m, c, X), fresh(m, iterations=2))
        assert len(compilations) == 7  # the one of the line before is the copy's
    assert counters["frames"]["ok"] - frames["ok"] == 1


def test_equal_models_share_code_but_no_settings() -> None:
    first, second = model(), model()
    exact = grads(second, second, X)
    expected = fresh(first, iterations=1)
    torch._dynamo.reset()
    one, other = (compiled(m, apply="always", iterations=6) for m in (first, second))
    with counting() as compilations:
        grads(first, one, X)
        hwbp_compile.set_iterations(first, 1)
        assert same(grads(second, other, X), exact)
        assert same(grads(first, one, X), expected)
        assert same(grads(second, other, X), exact)
    assert [o.iterations for o in compilations] == [6, 1]


def test_what_is_set_before_compiling_is_all_that_is_compiled() -> None:
    m = model()
    hwbp_compile.set_iterations(m, 1)
    expected = fresh(m, iterations=1)
    torch._dynamo.reset()
    with counting() as compilations:
        assert same(grads(m, compiled(m, apply="always", iterations=6), X), expected)
    assert [o.iterations for o in compilations] == [1]


def test_the_last_word_on_a_part_of_a_model_counts() -> None:
    m = nn.Sequential(model(), nn.Linear(3, 3).double())
    expected = {k: fresh(m, iterations=k) for k in (1, 2)}
    torch._dynamo.reset()
    c = compiled(m, apply="always")
    grads(m, c, X)
    hwbp_compile.set_iterations(m, 2)
    hwbp_compile.set_iterations(m[0], 1)
    assert same(grads(m, c, X), expected[1])
    hwbp_compile.set_iterations(m, 2)
    assert same(grads(m, c, X), expected[2])


def test_replaced_parameters_keep_the_settings_of_their_model() -> None:
    m = model()
    c = compiled(m, apply="always", iterations=6)
    hwbp_compile.set_iterations(m, 1)
    expected = fresh(m, iterations=1)
    torch._dynamo.reset()
    m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)
    assert same(grads(m, c, X), expected)


@pytest.mark.slow
def test_a_new_setting_holds_for_all_sizes_of_a_dynamic_graph() -> None:
    m = model()
    inputs = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 5, 8)]
    expected = [fresh(m, x, iterations=1) for x in inputs]
    torch._dynamo.reset()
    c = compiled(m, apply="always", iterations=2, dynamic=True)
    grads(m, c, X)
    hwbp_compile.set_iterations(m, 1)
    with counting() as compilations:
        for x, e in zip(inputs, expected, strict=True):
            assert same(grads(m, c, x), e)
    assert len(compilations) == 1


def test_where_it_holds_for_some_sizes_only_each_size_is_compiled() -> None:
    m = model()
    inputs = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 5, 3)]
    expected = [fresh(m, x, iterations=1) for x in inputs]
    torch._dynamo.reset()
    c = compiled(m, apply="always", iterations=2, dynamic=True)
    grads(m, c, X)
    hwbp_compile.set_iterations(m, 1)
    later = _compat.compile_later

    def conditional(*args: Any) -> Any:
        return later(*args)[0], False

    with counting() as compilations, mock.patch.object(_compat, "compile_later", conditional):
        for x, e in zip(inputs, expected, strict=True):
            assert same(grads(m, c, x), e)
    assert len(compilations) == 3  # one that is not used, and two sizes


@pytest.mark.slow
def test_what_one_compilation_finds_of_a_length_is_not_taken_for_granted_by_the_next() -> None:
    torch.manual_seed(0)
    m = Reader(3, 4).double()
    inputs = [torch.randn(n, 2, 3, dtype=torch.float64) for n in (16, 17, 5)]
    expected = {1: [fresh(m, x, iterations=1, group_size=8) for x in inputs]}
    torch._dynamo.reset()
    c = compiled(m, apply="always", iterations="exact", group_size=8, dynamic=True)
    grads(m, c, inputs[0])
    for k in (0, 1):
        hwbp_compile.set_iterations(m, k)
        for x, e in zip(inputs, expected.get(k, [None] * 3), strict=True):
            found = grads(m, c, x)
            assert e is None or same(found, e), (k, len(x))


def test_a_thousand_settings_leave_few_compiled_graphs() -> None:
    gm = torch.fx.symbolic_trace(nn.Identity())
    variants = Variants(gm, [X], Options(), lambda *_: (lambda *args: args, Findings((), None)))
    options = [Options(iterations=k) for k in range(1000)]
    for each in options:
        variants._variant(each, [X])
    assert len(variants._compiled) == KEPT
    assert options[-1] in variants._compiled


def test_wrong_settings_change_nothing() -> None:
    m = model()
    hwbp_compile.set_iterations(m, 1)
    with pytest.raises(hwbp_compile.OptionError, match="gamma must be a number"):
        hwbp_compile.set_iterations(m, 2, gamma=3.0)
    with pytest.raises(hwbp_compile.OptionError, match="iterations must be an integer"):
        hwbp_compile.set_iterations(m, -1)
    with counting() as compilations:
        grads(m, compiled(m), X)
    assert [o.iterations for o in compilations] == [1]
    with pytest.raises(TypeError, match="takes a module"):
        hwbp_compile.set_iterations(torch.relu, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has none"):
        hwbp_compile.set_iterations(nn.ReLU(), 1)
    with pytest.raises(ValueError, match='backend="inductor"'):
        hwbp_compile.set_iterations(torch.compile(m), 1)  # type: ignore[arg-type]


def test_a_schedule_steps_through_its_phases() -> None:
    m = model()
    c = compiled(m, apply="always")
    phases = {0: 1, 2: {"iterations": 2, "gamma": 0.25}, 3: "exact"}
    schedule = hwbp_compile.IterationsSchedule(m, phases)
    seen = []
    with counting() as compilations:
        for _ in range(5):
            grads(m, c, X)
            seen.append(schedule.settings)
            schedule.step()
    assert [s["iterations"] for s in seen] == [1, 1, 2, "exact", "exact"]
    assert [(o.iterations, o.gamma) for o in compilations] == [(1, 0.0), (2, 0.25), ("exact", 0.0)]
    other = hwbp_compile.IterationsSchedule(m, phases)
    assert other.settings == {"iterations": 1}
    other.load_state_dict(schedule.state_dict())
    assert other.settings == {"iterations": "exact"}
    # What was set meanwhile does not stay.
    hwbp_compile.set_iterations(m, 4)
    other.load_state_dict(schedule.state_dict())
    assert same(grads(m, c, X), fresh(m, iterations="exact"))
    assert other.last_step == 5


def test_a_part_of_a_model_that_has_not_its_first_parameter() -> None:
    m = model()
    c = compiled(m, apply="always", iterations=2)
    grads(m, c, X)
    hwbp_compile.set_iterations(m[3], 1)
    found = grads(m, c, X)
    assert [s.iterations for s in hwbp_compile.monitor(m[-1]).history] == [2, 1]
    assert same(found, fresh(m, iterations=1))


def test_a_graph_that_runs_two_models() -> None:
    teacher, student = model(), model()

    def both(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = teacher(x)
        return student(x) - y

    c = compiled(both, apply="always", iterations=2)
    for k in (2, 1):
        hwbp_compile.set_iterations(student, k)
        c(X).square().sum().backward()
    assert [s.iterations for s in hwbp_compile.monitor(student).history] == [2, 1]


def test_a_schedule_may_be_a_function() -> None:
    schedule = hwbp_compile.IterationsSchedule(model(), lambda step: 1 + step // 2)
    seen = []
    for _ in range(4):
        seen.append(schedule.settings["iterations"])
        schedule.step()
    assert seen == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("phases", "error", "message"),
    [
        ({}, ValueError, "at least one phase"),
        ({-1: 2}, ValueError, "integer >= 0"),
        ({0: -2}, hwbp_compile.OptionError, "iterations"),
        ({0: {"min_blocks": 2}}, hwbp_compile.OptionError, "cannot change"),
    ],
)
def test_wrong_phases_are_refused(phases: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hwbp_compile.IterationsSchedule(model(), phases)


def test_a_captured_step_has_the_last_k(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As while a CUDA graph is captured, when nothing can be compiled or asked."""
    m = settled()
    c = compiled(m, apply="always", iterations="auto")
    x = torch.randn(5, 4, dtype=torch.float64)

    def captured() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(runs_module, "_captures", lambda: True)
            grads(m, c, x)
        seen = [r for r in runs_module.all_runs() if r.history]
        return max(seen, key=lambda r: r.last).last_options

    grads(m, c, x)
    with caplog.at_level(logging.WARNING):
        assert captured().watch
        assert "Run more steps before" in caplog.text
    while not hwbp_compile.monitor(m).history[-1].watched or len(hwbp_compile.monitor(m).history) < 5:
        grads(m, c, x)  # up to the next watched step
    k = captured().iterations
    assert isinstance(k, int)
    hwbp_compile.set_iterations(m, 5)
    assert captured().iterations == 5
