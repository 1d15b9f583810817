"""What backward passes record of their error, against the definition."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from small_models import LENGTH, D, chain, compiled, grads, model
from torch import Tensor, nn

import hwbp_compile
from hwbp_compile.control import runs as runs_module
from hwbp_compile.control.monitor import Monitor
from hwbp_compile.control.runs import Runs, all_runs
from hwbp_compile.passes import record


def cotangents(m: nn.Sequential, x: Tensor, iterations: int) -> list[list[Tensor]]:
    """``w0 .. wk``, each from the loss to the input, for blocks with an identity beside them."""
    states = [m[0](x)]
    for block in m[1:-1]:
        states.append(block(states[-1]))
    (first,) = torch.autograd.grad(m[-1](states[-1]).square().sum(), states[-1], retain_graph=True)

    def vjp(p: int, w: Tensor) -> Tensor:
        """Of block p, counted from the loss, without its identity."""
        state = states[LENGTH - 1 - p].detach().requires_grad_()
        (found,) = torch.autograd.grad(m[LENGTH - p](state), state, w)
        return found - w

    iterates = [[first] * (LENGTH + 1)]
    for _ in range(iterations):
        v = [vjp(p, iterates[-1][p]) for p in range(LENGTH)]
        iterates.append([first + sum(v[:p], torch.zeros_like(first)) for p in range(LENGTH + 1)])
    return iterates


def steps_of(iterates: list[list[Tensor]]) -> list[float]:
    """By the definition in the documentation."""
    last = iterates[-1]
    return [
        sum(float((b - a).norm() / c.norm()) for a, b, c in zip(p[1:], q[1:], last[1:], strict=True)) / LENGTH
        for p, q in pairwise(iterates)
    ]


def watched(m: nn.Module, x: Tensor, **options: Any) -> tuple[Monitor, list[Tensor]]:
    torch._dynamo.reset()
    found = grads(m, compiled(m, **({"apply": "always"} | options)), x)
    return hwbp_compile.monitor(m), found


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_steps_are_what_they_are_defined_to_be(codegen: str) -> None:
    m, x = model(), torch.randn(5, 4, dtype=torch.float64)
    expected = steps_of(cotangents(m, x, 3))
    seen, _ = watched(m, x, iterations=3, codegen=codegen)
    (chain,) = seen.current
    assert (chain.blocks, chain.iterations, chain.over_time) == (LENGTH, 3, False)
    assert chain.steps == pytest.approx(expected, rel=1e-5)
    assert chain.estimate == pytest.approx(expected[2] * min(1, expected[2] / expected[1]), rel=1e-5)
    first = cotangents(m, x, 0)[0][0]
    assert chain.largest == pytest.approx(float(first.abs().max()), rel=1e-6)


@pytest.mark.parametrize("group_size", [1, 4])
def test_blocks_are_recorded_on_demand(group_size: int) -> None:
    m, x = model(), torch.randn(5, 4, dtype=torch.float64)
    c = compiled(m, apply="always", iterations=2, group_size=group_size)
    grads(m, c, x)
    seen = hwbp_compile.monitor(m)
    assert seen.current[0].block_steps == ()
    seen.record_blocks()
    grads(m, c, x)
    (chain,) = seen.current
    assert chain.steps == pytest.approx(seen.history[0].chains[0].steps, rel=1e-5)
    assert sum(chain.block_steps) / chain.blocks == pytest.approx(chain.steps[-1], rel=1e-5, abs=1e-12)
    if group_size == 1:
        _, before, after = cotangents(m, x, 2)
        each = [float((b - a).norm() / b.norm()) for a, b in zip(before[1:], after[1:], strict=True)]
        assert chain.block_steps == pytest.approx(each[::-1], rel=1e-4)
    seen.record_blocks(False)
    grads(m, c, x)
    assert seen.current[0].block_steps == ()


def test_what_records_nothing_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a graph without a chain nor a step that is exact."""
    made: list[Any] = []
    original = runs_module.new_records
    monkeypatch.setattr(runs_module, "new_records", lambda *a: made.append(a) or original(*a))
    short = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch._inductor.config.patch(force_disable_caches=True):
        expected = grads(short, short, x)
        for found, exact in zip(grads(short, compiled(short, iterations=2), x), expected, strict=True):
            torch.testing.assert_close(found, exact)
    m = model()
    c = compiled(m, apply="always", iterations="exact")
    grads(m, c, x)
    assert not made
    assert sum(runs.steps for runs in all_runs() if any(p is m[0].weight for p in runs.parameters())) == 1
    hwbp_compile.set_iterations(m, 2)
    grads(m, c, x)
    assert len(made) == 1
    assert [s.step for s in hwbp_compile.monitor(m).history] == [1]


def test_history_counts_steps_whose_backward_pass_ran() -> None:
    m = model()
    c = compiled(m, apply="always", iterations=2)
    for i in range(4):
        x = torch.randn(5, 4, dtype=torch.float64)
        loss = c(x).square().sum()
        if i != 1:
            loss.backward()
        with torch.no_grad():
            c(x)
    seen = hwbp_compile.monitor(c)
    assert [s.step for s in seen.history] == [0, 2, 3]
    assert all(s.iterations == 2 and not s.watched for s in seen.history)
    assert len(seen.graphs()) == 1
    assert set(seen.scalars()) == {"highway/chain 1/estimate", "highway/chain 1/iterations"}
    assert "chain 1: 6 blocks, k = 2, estimate" in str(seen)


def test_two_forward_passes_before_their_backward_passes() -> None:
    m = model()
    c = compiled(m, apply="always", iterations=2)
    inputs = [torch.randn(5, 4, dtype=torch.float64) for _ in range(2)]
    losses = [c(x).square().sum() for x in inputs]
    for loss in reversed(losses):
        loss.backward()
    found = [s.chains[0].steps for s in hwbp_compile.monitor(m).history]
    for x, steps in zip(inputs, found, strict=True):
        assert steps == pytest.approx(steps_of(cotangents(m, x, 2)), rel=1e-5)


@pytest.fixture
def one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record as code in CUDA graphs does, which there are none of on a CPU."""
    original = Runs.__init__
    monkeypatch.setattr(Runs, "__init__", lambda self, *args: original(self, *args[:3], True))


@pytest.mark.usefixtures("one_address")
@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_records_at_one_address(codegen: str) -> None:
    m = model()
    c = compiled(m, apply="always", iterations=2, codegen=codegen)
    inputs = [torch.randn(5, 4, dtype=torch.float64) for _ in range(5)]
    seen = hwbp_compile.monitor(m)
    for i, x in enumerate(inputs[:3]):
        seen.record_blocks(i == 1)
        grads(m, c, x)
    losses = [c(x).square().sum() for x in inputs[3:]]
    for loss in losses:
        loss.backward()
    found = seen.history
    assert [s.step for s in found] == [0, 1, 2, 4]  # of two at once the last one has a record
    assert [len(s.chains[0].block_steps) for s in found] == [0, LENGTH, 0, 0]
    for x, entry in zip([*inputs[:3], inputs[4]], found, strict=True):
        assert entry.chains[0].steps == pytest.approx(steps_of(cotangents(m, x, 2)), rel=1e-5)
    assert len({e._records.data_ptr() for runs in all_runs() for e in runs.history if e.number > 2}) == 2


@pytest.mark.usefixtures("one_address")
def test_each_setting_has_its_address() -> None:
    """Backward passes come in the other order, and each step has a record of its own iterations."""
    m = model()
    c = compiled(m, apply="always", iterations=1)
    seen = hwbp_compile.monitor(m)
    inputs = [torch.randn(5, 4, dtype=torch.float64) for _ in range(6)]
    for pair in (inputs[:2], inputs[2:4], inputs[4:]):
        losses = []
        for k, x in enumerate(pair, start=1):
            hwbp_compile.set_iterations(m, k)
            losses.append(c(x).square().sum())
        sum(reversed(losses)).backward()
    assert [s.chains[0].iterations for s in seen.history] == [1, 2] * 3
    for x, entry in zip(inputs, seen.history, strict=True):
        expected = steps_of(cotangents(m, x, entry.chains[0].iterations))
        assert entry.chains[0].steps == pytest.approx(expected, rel=1e-5)


def test_what_is_current_is_of_the_last_step() -> None:
    """Another size makes another graph; the chains of the one before are not there any more."""
    m = model()
    c = compiled(m, apply="always", iterations=2, dynamic=False)
    seen = hwbp_compile.monitor(m)
    for size in (5, 7, 5, 7, 7):
        grads(m, c, torch.randn(size, 4, dtype=torch.float64))
    assert len(seen.graphs()) == 2
    assert len(seen.current) == 1
    assert seen.current == seen.graphs()[1][-1].chains
    assert len(seen.scalars()) == 2
    grads(m, c, torch.randn(5, 4, dtype=torch.float64))
    assert seen.current == seen.graphs()[0][-1].chains


def test_a_forward_pass_alone_hides_no_history() -> None:
    m = nn.Sequential(model(), nn.Dropout()).double()
    c = compiled(m, apply="always", iterations=2)
    x = torch.randn(5, 4, dtype=torch.float64)
    grads(m, c, x)
    m.eval()
    c(x)
    assert len(hwbp_compile.monitor(m).history) == 1
    assert len(hwbp_compile.monitor(m).current) == 1


def test_more_chains_than_rows_are_summed_up_by_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lengths = (4, 6, 3, 5)
    parts = [part for n in lengths for part in (*chain(n), nn.Sequential(nn.Linear(D, D), nn.Tanh()))]
    m = nn.Sequential(nn.Linear(4, D), *parts).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    grads(m, compiled(m, apply="always", iterations=3, min_blocks=2), x)
    each = hwbp_compile.monitor(m).current
    assert [c.blocks for c in each] == list(lengths)
    monkeypatch.setattr(record, "CHAINS", 2)
    torch._dynamo.reset()
    grads(m, compiled(m, apply="always", iterations=3, min_blocks=2), x)
    first, worst = hwbp_compile.monitor(m).current
    assert first == each[0]
    assert (worst.blocks, worst.iterations) == (3, 3)
    assert worst.steps == pytest.approx([max(c.steps[i] for c in each[1:]) for i in range(3)])


def test_equal_models_are_told_apart() -> None:
    first, second = model(), model()
    x = torch.randn(5, 4, dtype=torch.float64)
    one, other = (compiled(m, apply="always", iterations=2) for m in (first, second))
    for m, c in ((first, one), (second, other), (second, other)):
        grads(m, c, x)
    assert len(hwbp_compile.monitor(first).history) == 1
    assert len(hwbp_compile.monitor(second).history) == 2
    (chain,) = hwbp_compile.monitor(first).current
    assert chain.steps == pytest.approx(steps_of(cotangents(first, x, 2)), rel=1e-5)


@pytest.mark.parametrize("setting", [{"iterations": 0}, {"iterations": "exact"}, {"apply": "never"}])
def test_nothing_is_recorded_where_nothing_is_iterated(setting: dict[str, Any]) -> None:
    m = model()
    seen, _ = watched(m, torch.randn(5, 4, dtype=torch.float64), **setting)
    assert seen.current == ()
    assert seen.scalars() == {}
    assert "nothing is recorded yet" in str(seen)


def test_a_gradient_that_is_not_finite_is_told_from_an_error() -> None:
    m = model()
    c = compiled(m, apply="always", iterations=2)
    (c(torch.randn(5, 4, dtype=torch.float64)).square().sum() * float("inf")).backward()
    (chain,) = hwbp_compile.monitor(m).current
    assert not chain.is_finite


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 5)
        self.blocks = model()
        self.enter = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.enter(self.rnn(x)[0]))
        return y


@pytest.mark.parametrize("group_size", [1, 4])
def test_recurrences_come_first(group_size: int) -> None:
    m = Recurrent().double()
    x = torch.randn(10, 2, 3, dtype=torch.float64)
    options = {"iterations": 2, "group_size": group_size, "apply": "always"}
    seen, _ = watched(m, x, **options)
    time, depth = seen.current
    assert (time.over_time, time.blocks) == (True, -(-10 // group_size))
    assert (depth.over_time, depth.blocks) == (False, -(-6 // group_size))
    assert 0 < time.steps[1] < time.steps[0] < 10


def test_records_on_a_device_are_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a given k nothing sends them; those that the backward pass has not written yet come later."""
    m, x = model(), torch.randn(5, 4, dtype=torch.float64)
    c = compiled(m, apply="always", iterations=2)
    for _ in range(3):
        grads(m, c, x)
    pending = c(x).sum()
    (runs,) = [r for r in all_runs() if r.steps == 4]
    for entry in runs.history:
        monkeypatch.setattr(entry, "_host", None)  # as if they were on another device
        monkeypatch.setattr(entry, "_came", False)
    with monkeypatch.context() as patched:
        stacked, together = [], torch.stack
        patched.setattr(torch, "stack", lambda rows: stacked.append(len(rows)) or together(rows))
        assert [s.step for s in Monitor(m).history] == [0, 1, 2]
        assert stacked == [4]
        assert all(len(s.chains[0].steps) == 2 for s in Monitor(m).history)
        assert stacked == [4, 1], "only what had not come"
    pending.backward()
    assert [s.step for s in Monitor(m).history] == [0, 1, 2, 3]
