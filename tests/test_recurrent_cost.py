"""``apply="auto"`` on recurrences: the decision, given what things cost, and what is measured for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import joint_graphs
from marks import some_slow
from scan_cells import CELLS
from test_scans import Model, data
from torch import Tensor, nn

from hwbp_compile import explain
from hwbp_compile.passes.linear_ops import op_name
from hwbp_compile.recurrent import cost, measured
from hwbp_compile.recurrent.backward import Settings
from hwbp_compile.recurrent.case import Case, Line, case_of
from hwbp_compile.recurrent.cells import STEPS
from hwbp_compile.recurrent.cost import fastest_exact
from hwbp_compile.recurrent.function import understand
from hwbp_compile.recurrent.measured import Exact, measure_kernels, measure_library, weights_of_module
from hwbp_compile.recurrent.predicted import _summed_over_steps, around, iteration_seconds
from hwbp_compile.recurrent.recurrence import kernel_name, kernel_program


def pretend(monkeypatch: pytest.MonkeyPatch, exact: float, iterated: float) -> None:
    """Seconds per step of an exact and of an iterated training step."""
    monkeypatch.setattr(cost, "fastest_exact", lambda *_: Exact("kernels", Line(0.0, 0.0), Line(0.0, exact)))
    monkeypatch.setattr(cost, "_iterated", lambda case, settings, steps: iterated * steps)


@pytest.mark.parametrize("kind", [nn.GRU, pytest.param(nn.LSTM, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("exact", "iterated", "applied"),
    [(1.0, 2.0, False), (2.0, 1.0, True), (1.0, 0.96, False), (1.0, 0.94, True)],
)
def test_the_faster_one_is_chosen(
    kind: type[nn.RNNBase], exact: float, iterated: float, applied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, exact * 1e-3, iterated * 1e-3)
    (chain,) = explain(kind(3, 5), torch.randn(20, 2, 3), options={"iterations": 2}).chains
    assert chain.applied == applied
    if not applied:
        assert f"{iterated:.3g} times as long as exact backpropagation" in chain.reason
        assert f"about {20 * iterated:.3g} ms against 20 ms" in chain.reason
        assert 'apply="always"' in chain.reason
    (chain,) = explain(kind(3, 5), torch.randn(20, 2, 3), options={"apply": "always", "group_size": 1}).chains
    assert chain.applied


@pytest.mark.parametrize("iterations", ["exact", 2])
@pytest.mark.parametrize(
    ("kernels", "library"),
    [((1.0, 2.0), (2.0, 2.0)), ((2.0, 2.0), (1.0, 2.0)), ((1.0, 3.0), (2.0, 1.0)), (None, (1.0, 1.0))],
)
def test_exact_is_done_by_the_faster(
    kernels: tuple[float, float] | None,
    library: tuple[float, float],
    iterations: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the library and our kernels, by the sum of both passes."""

    def of(by: str, seconds: tuple[float, float] | None) -> Exact | None:
        return seconds and Exact(by, Line(seconds[0], 0.0), Line(seconds[1], 0.0))

    monkeypatch.setattr(cost, "measure_kernels", lambda *_: of("kernels", kernels))
    monkeypatch.setattr(cost, "measure_library", lambda *_: of("library", library))
    monkeypatch.setattr(cost, "_iterated", lambda *_: 100.0)
    model = nn.Sequential(nn.GRU(3, 5))
    x = torch.randn(7, 2, 3)
    expected = torch.autograd.grad(model(x)[0].sum(), list(model.parameters()))
    options = {"iterations": iterations, "codegen": "eager"}
    compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
    with joint_graphs() as graphs:
        found = torch.autograd.grad(compiled(x)[0].sum(), list(model.parameters()))
    operators = {op_name(n) for graph in graphs for n in graph.nodes if n.op == "call_function"}
    by_kernels = kernels is not None and sum(kernels) < sum(library)
    assert ("hwbp_compile::recurrence" in operators) == by_kernels
    assert ("hwbp_compile::library_training" in operators) != by_kernels
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_scans_are_decided_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(CELLS["layer norm gru"])
    x, *carry = data(model.cell, 6, 2)
    for iterated, applied in ((2.0, False), (0.5, True)):
        pretend(monkeypatch, 1.0, iterated)
        (chain,) = explain(model, x, *carry, options={"iterations": 2}).chains
        assert chain.applied == applied


def test_what_cannot_be_measured_is_left_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Exact:
        raise MemoryError("no room")

    monkeypatch.setattr(cost, "fastest_exact", fails)
    (chain,) = explain(nn.GRU(3, 5), torch.randn(20, 2, 3), options={"iterations": 2}).chains
    assert not chain.applied
    assert "cannot be measured (MemoryError: no room)" in chain.reason


def test_without_gradients_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, math.nan, math.nan)
    module = nn.GRU(3, 5).requires_grad_(False)
    compiled = torch.compile(module, backend="highway", options={"codegen": "eager"}, fullgraph=True)
    x = torch.randn(6, 2, 3)
    torch.testing.assert_close(compiled(x)[0], module(x)[0])


@pytest.mark.parametrize("key", ["gru", "lstm"])
def test_measurements(key: str) -> None:
    """Both ways are measured; predictions grow with the steps and the iterations."""
    module = nn.GRU(3, 8) if key == "gru" else nn.LSTM(3, 8)
    carry = [torch.zeros(2, 8)] * (2 if key == "lstm" else 1)
    case, steps = case_of(key, [torch.randn(40, 2, 3)], carry, list(module.parameters()))
    assert steps == 40
    for found in (measure_kernels(case, 64), measure_library(case, 64), fastest_exact(case, 64)):
        assert found is not None
        assert found.forward.at(100) > 0
        assert found.backward.at(100) > 0

    def predicted(iterations: int, steps: int, group_size: int = 1) -> float:
        return iteration_seconds(case, Settings(iterations, group_size=group_size), steps, again=False)

    assert predicted(1, 100) < predicted(4, 100)
    assert predicted(50, 10) == predicted(10, 10), "more iterations than steps are not done"
    assert predicted(100, 128, 8) == predicted(16, 128, 8)


@pytest.mark.parametrize("name", some_slow(CELLS, set(CELLS) - {"layer norm gru"}))
def test_scans_are_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no failure is taken for a reason to leave them exact."""
    model = Model(CELLS[name])
    x, *carry = data(model.cell, 30, 2)
    measured_: list[Exact | None] = []

    def fastest(case: Case, steps: int) -> Exact | None:
        measured_.append(fastest_exact(case, steps))
        return measured_[-1]

    monkeypatch.setattr(cost, "fastest_exact", fastest)
    (chain,) = explain(model, x, *carry, options={"iterations": 2}).chains
    assert chain.applied or "as long as exact backpropagation" in chain.reason
    assert [found is not None and found.by for found in measured_] == ["kernels"]


def test_around_the_kernels_of_a_cell() -> None:
    """Before them all steps' inputs are projected and normalised; after them this is done backward."""
    cell_of = CELLS["layer norm gru"]
    STEPS["tried"] = lambda carry, x, weights: cell_of.function(lambda y: y, carry, *x, *weights)
    try:
        carry, x = [torch.zeros(2, 6)], [torch.zeros(2, 3)]
        weights = [torch.zeros(shape) for shape in cell_of.weights]
        cell, _ = understand("tried", x, carry, weights)
        wanted = [False] + [True] * len(weights)
        first = kernel_name("tried", cell, carry, x, weights, emit=True)
        then = kernel_name("tried", cell, carry, x, weights, backward=[True], wanted=wanted)
        forward, backward = measured._around(cell, first, then, wanted)
        case, _ = case_of("tried", [torch.zeros(9, 2, 3)], carry, weights)
        sums = _summed_over_steps(cell)
        assert sums.intersection(backward), "added up, and transposed, once"
        rest = [n for n in backward if n not in sums]
        assert around(cell, backward, case, 9).per_step == around(cell, rest, case, 9).per_step > 0
        products = [n for n in cell.nodes if n in sums and op_name(n) == "aten::mm"]
        assert len(products) == 2
        assert around(cell, [*rest, *products], case, 9).per_step > around(cell, rest, case, 9).per_step
        assert around(cell, forward, case, 9).at(9) > around(cell, forward, case, 9).fixed > 0
    finally:
        del STEPS["tried"]
    of_state = cell.depending_on((*cell.carry, *cell.block.entry))
    assert forward
    assert not of_state.intersection(forward)
    assert not set(forward).intersection(backward), "what the forward pass computes is known"
    program = [cell.nodes[i] for name in (first, then) for i in kernel_program(name).emitted]
    assert not set(backward).intersection(program)
    assert cell.of_inputs[0] not in backward, "unwanted"


@pytest.mark.parametrize(
    ("seconds", "lengths", "most_in_all"),
    [(1e-6, (512, 2048), 10**5), (1e-3, (8, 32), 300), (0.5, (1, 2), 4)],
)
def test_no_measurement_takes_long(
    seconds: float, lengths: tuple[int, int], most_in_all: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two parts of a step take so many seconds and twice as many, the first one of all a second more."""
    clock, ran = [0.0], [0]
    monkeypatch.setattr(measured, "now", lambda _: clock[0])

    def stages(steps: int) -> Iterator[None]:
        for share in (0, 1, 2):
            clock[0] += share * steps * seconds + (1.0 if share == 1 and not ran[0] else 0)
            ran[0] += steps if share == 2 else 0
            yield

    case, _ = case_of("gru", [torch.zeros(9, 2, 2)], [torch.zeros(2, 3)], [])
    found, parts = measured._time(case, stages, 2048)
    assert found == lengths
    assert parts == [pytest.approx([share * n * seconds for n in lengths]) for share in (1, 2)]
    assert ran[0] <= most_in_all


def test_nothing_random_and_no_setting_is_touched() -> None:
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    weights: list[Tensor] = list(nn.GRU(2, 3).parameters())
    state = torch.get_rng_state()
    cost.why_exact_is_faster([torch.zeros(9, 2, 2)], [torch.zeros(2, 3)], weights, "gru", Settings(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (grad, threads)
    assert all(w.grad is None for w in weights)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "key", "more"),
    [
        (nn.GRU, "gru", {}),
        (nn.LSTM, "lstm", {}),
        (nn.LSTM, "lstm", {"proj_size": 2}),
        (nn.RNN, "rnn_relu", {"nonlinearity": "relu"}),
    ],
)
def test_the_library_is_measured_with_weights_of_a_module(
    kind: type[nn.RNNBase], key: str, more: dict[str, Any], bias: bool
) -> None:
    module = kind(3, 5, bias=bias, **more)
    weights = list(module.parameters())
    weights[0].requires_grad_(False)
    state = torch.get_rng_state()
    carry = [torch.zeros(2, more.get("proj_size", 5)), torch.zeros(2, 5)][: 2 if key == "lstm" else 1]
    case, _ = case_of(key, [torch.zeros(4, 2, 3)], carry, weights)
    found = weights_of_module(case)
    assert [w.shape for w in found] == [w.shape for w in weights]
    assert [w.requires_grad for w in found] == [False] + [True] * (len(weights) - 1)
    assert torch.equal(state, torch.get_rng_state())
    timed = measure_library(case, 4)
    assert timed is not None
    assert timed.forward.at(10) > 0 < timed.backward.at(10)
