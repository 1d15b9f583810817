"""What ``apply="auto"`` counts, and what it decides from that."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch
from compare import recorded
from marks import some_slow
from small_models import LENGTH, D, chain, compiled, grads, model, settled
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compile import explain
from hwbp_compile.options import Options
from hwbp_compile.passes import kernels, unstacked, worth
from hwbp_compile.passes.outcomes import Outcome
from hwbp_compile.passes.work import Amount, Work

pytestmark = pytest.mark.measured


@pytest.fixture(autouse=True)
def _no_kernels_are_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs decide, also about chains for which there is one."""
    monkeypatch.setattr(kernels, "prefers_kernels", lambda: False)


def decided(x: Tensor, monkeypatch: pytest.MonkeyPatch, call: float, flops: float, **kwargs: Any) -> Outcome:
    """The outcome for the small model on a machine with so many seconds a call and FLOPs a second."""
    monkeypatch.setattr(worth, "operator_seconds", lambda *_: call)
    monkeypatch.setattr(worth, "product_rate", lambda *_: flops)
    monkeypatch.setattr(worth, "bandwidth", lambda *_, **__: 4 * flops)
    m = model()
    expected = grads(m, m, x)
    with recorded() as records:
        found = grads(m, compiled(m, **kwargs), x)
    ((outcome,),) = [record.outcomes for record in records]
    if outcome.reason:
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)
    return outcome


def test_latency_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_READ", "_RETURNED", "_COPIED", "_UNSTACKED", "_MATRIX"):
        monkeypatch.setattr(worth, name, 0.0)
    outcome = decided(torch.randn(3, 4).double(), monkeypatch, call=1.0, flops=1e30, iterations=1)
    assert outcome.schedule is not None
    assert outcome.comparison is not None
    exact, iterated = outcome.comparison.exact, outcome.comparison.iterated
    # Two products of each of two layers in every block, and those around the chain.
    assert 4 * LENGTH <= len(exact.products) <= 4 * LENGTH + 4
    assert len(iterated.products) < len(exact.products) / 2
    assert iterated.depth < 2 * LENGTH <= exact.depth
    assert len(iterated.kernels) < len(exact.kernels)
    blocks = 4 * LENGTH * 2 * 3 * D * 2 * D
    assert blocks <= exact.flops.value <= blocks + 3 * 2 * 3 * D * (4 + 3)
    assert iterated.flops.value > exact.flops.value


@pytest.mark.parametrize(
    ("constant", "exact", "iterated"),
    # Two gradients of each of three layers in a block, and of the two around them; of a block, the weights of
    # the two products and of the normalisation.
    [("_RETURNED", 6 * LENGTH + 4, 6 * LENGTH + 4), ("_COPIED", 0, 3 * LENGTH)],
)
def test_calls_beside_the_work(
    constant: str, exact: int, iterated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_READ", "_RETURNED", "_COPIED", "_KEPT", "_UNSTACKED", "_MATRIX"):
        monkeypatch.setattr(worth, name, float(name == constant))
    outcome = decided(torch.randn(3, 4).double(), monkeypatch, call=1.0, flops=1e30, iterations=2)
    assert outcome.comparison is not None
    assert outcome.comparison.calls == (exact, iterated)


def test_arithmetic_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = decided(torch.randn(3, 4).double(), monkeypatch, call=1e-30, flops=1.0, iterations=2)
    assert outcome.schedule is None
    assert "times as long as exact backpropagation, about" in outcome.reason


@pytest.mark.parametrize(("share", "iterated"), [(0.79, True), (0.81, False), (1.5, False)])
def test_what_is_gained_has_to_be_enough(share: float, iterated: bool) -> None:
    cpu = torch.device("cpu")
    found = worth.Comparison(Work(), Work(), 2e-3, share * 2e-3, cpu, calls=(0.0, 0.0))
    assert bool(found.reason) != iterated
    if not iterated:
        said = f"{share:.3g} times as long as exact backpropagation, about {share * 2:.3g} ms against 2 ms"
        assert said in found.reason
        assert "0.8 is the most" in found.reason


@pytest.mark.parametrize(
    ("own", "iterated"),
    [
        ([2.0, 2.0, 2.0], [True, True, True]),  # 1 - 3 * 0.1 of the time, each 0.9
        ([2.0, 2.0, 2.6], [True, True, False]),  # the last takes more than 0.8 of its own share of 3
        ([2.2, 2.6, 2.8], [False, False, False]),  # a single one contributes
        ([0.5, 2.0, 3.5], [True, True, False]),
        ([2.4, 2.4], [False, False]),  # 0.88 together
        ([None, 0.9], [None, True]),  # 0.79
    ],
)
def test_chains_together(
    own: list[float | None], iterated: list[bool | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 3 of the 10 seconds of a backward pass."""
    monkeypatch.setattr(worth, "seconds_of", lambda work, *_: work.depth / 10)
    cpu, ten = torch.device("cpu"), 10.0
    comparisons = [
        seconds
        and worth.Comparison(
            Work(), Work(), ten, ten - 3 + seconds, cpu, (0.0, 0.0), Work(depth=round(10 * seconds))
        )
        for seconds in own
    ]
    reasons = worth.verdicts(comparisons)
    expected = [i in (None, True) for i in iterated]
    assert [not reason for reason in reasons] == expected


def test_a_model_of_several_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of four equal chains takes enough of the time to be worth it alone; all of them are iterated."""
    parts = [[*chain(), nn.Sequential(nn.Linear(D, D + 1), nn.Linear(D + 1, D))] for _ in range(4)]
    m = nn.Sequential(nn.Linear(4, D), *(block for part in parts for block in part)).double()
    monkeypatch.setattr(worth, "seconds_of", lambda work, *_: float(len(work.products)))
    x = torch.randn(3, 4).double()
    expected = grads(m, m, x)
    with recorded() as records:
        found = grads(m, compiled(m, iterations=1), x)
    (record,) = records
    assert [outcome.schedule is not None for outcome in record.outcomes] == [True] * 4
    assert all(outcome.comparison.reason for outcome in record.outcomes if outcome.comparison is not None)
    assert max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)) > 1e-4
    torch._dynamo.reset()
    chains = explain(m, x, options={"iterations": 1}).chains
    assert [c.applied for c in chains if c.blocks == LENGTH] == [True] * 4
    assert all("together with other chains" in str(c.notes) for c in chains if c.applied)


def test_always(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4).double()
    assert decided(x, monkeypatch, 1e-30, 1.0, iterations=2, apply="always").schedule is not None


@pytest.mark.parametrize(("limit", "k"), [(9, 4), (3, 1), (0, None)])
def test_explain_where_k_is_chosen(limit: int, k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training watches where one iteration is worth it, whatever four are."""

    def seconds(work: Work, *_: Any) -> float:
        return 1.0 + len(work.products)

    monkeypatch.setattr(worth, "seconds_of", seconds)
    of_one = explain(model(), torch.randn(3, 4).double(), options={"iterations": 1}).chains[0]
    of_four = explain(model(), torch.randn(3, 4).double(), options={"iterations": 4}).chains[0]
    assert of_one.costs is not None
    assert of_four.costs is not None
    ends = sorted(c.costs[1].products for c in (of_one, of_four) if c.costs is not None)
    most = {9: ends[1] + 1, 3: sum(ends) / 2, 0: ends[0] - 1}[limit]
    exact = of_one.costs[0].products
    monkeypatch.setattr(worth, "_ENOUGH", (1 + most) / (1 + exact))
    found = explain(model(), torch.randn(3, 4).double())
    assert found.chains[0].iterations == k
    chosen = [n for n in found.notes if n.startswith('iterations="auto" chooses k while training')]
    assert [f"k = {k}" in note for note in chosen] == ([] if k is None else [True])
    assert ["not expected to be worth it" in note for note in chosen] == ([] if k is None else [k == 1])


def test_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a batch of any size they have its symbol, and its values at the end of the range at hand."""
    fixed = decided(torch.randn(4, 4).double(), monkeypatch, 1.0, 1e30, iterations=1).comparison
    torch._dynamo.reset()
    free = decided(torch.randn(3, 4).double(), monkeypatch, 1.0, 1e30, iterations=1, dynamic=True).comparison
    assert fixed is not None
    assert free is not None
    for a, b in ((fixed.exact, free.exact), (fixed.iterated, free.iterated)):
        assert a.flops.value == b.flops.value
        assert (len(a.products), len(a.kernels)) == (len(b.products), len(b.kernels))
        (symbol,) = b.flops.formula.free_symbols
        assert b.flops.formula.subs(symbol, 4) == a.flops.formula == sympy.Integer(a.flops.value)
    assert "FLOP in" in str(free)
    assert str(symbol) in str(free)


def test_kernels_are_as_fast_as_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is charged at the rate of its own bytes: small ones stay in a cache."""
    monkeypatch.setattr(worth, "operator_seconds", lambda *_: 0.0)
    monkeypatch.setattr(worth, "bandwidth", lambda _, __, size, fresh: 1.0 / size)
    sizes = (3 << 14, 3 << 20, 5, 1 << 40, 1 << 20)
    work = Work(kernels=[Amount(sympy.Integer(n), n) for n in sizes])
    rates = (1 << 16, 1 << 22, 1 << 14, 1 << 25, 1 << 20)
    found = worth.seconds_of(work, torch.device("cpu"), 0.0)
    assert found == sum(n * rate for n, rate in zip(sizes, rates, strict=True))


def test_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a product's rate is the same for all sizes, small batches are iterated and large ones are not."""
    monkeypatch.setattr(worth, "operator_seconds", lambda *_: 1e-6)
    monkeypatch.setattr(worth, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(worth, "bandwidth", lambda *_, **__: 1e12)
    for name in ("_READ", "_RETURNED", "_COPIED", "_UNSTACKED", "_MATRIX"):
        monkeypatch.setattr(worth, name, 0.0)
    m = torch.compile(model(), backend="highway", options={"iterations": 2}, dynamic=True)
    for batch in (8, 128):
        (chain,) = explain(m, torch.randn(batch, 4).double()).chains
        (sizes,) = chain.sizes
        assert [size for size, _ in sizes.iterated] == [
            1 << e for e in range(1, 11) if batch <= 8 << e <= 64 * batch
        ]
        worth_it = [applied for _, applied in sizes.iterated]
        assert worth_it == sorted(worth_it, reverse=True)
        assert chain.applied == dict(sizes.iterated)[batch]
        assert f"for {sizes.symbol} = " in str(sizes)
    assert (explain(model(), torch.randn(8, 4).double()).chains[0].sizes) == ()


def test_gradients_that_a_schedule_returns_in_a_stack_are_not_copied() -> None:
    """What is replaced may itself be a view, and be seen through another one."""

    def rows(x: Tensor) -> Tensor:
        return x.sum(0).reshape(2, 2).unsqueeze(0)

    *_, total, replaced, row, _ = make_fx(rows)(torch.ones(3, 4)).graph.nodes
    assert worth._is_view_of_any(row, {replaced})
    assert worth._is_view_of_any(row, {total})
    assert not worth._is_view_of_any(total, {replaced, row})


def test_what_cannot_be_estimated_is_exact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no clock")

    monkeypatch.setattr(worth, "seconds_of", fail)
    outcome = decided(torch.randn(3, 4).double(), monkeypatch, 1.0, 1e30)
    assert outcome.reason == "its cost cannot be estimated (RuntimeError: no clock)"
    assert "left exact as its cost" in caplog.text


def test_a_real_machine() -> None:
    """Whatever is decided here, it is decided, and said."""
    m = model()
    with recorded() as records:
        grads(m, compiled(m, iterations=1), torch.randn(3, 4).double())
    ((outcome,),) = [record.outcomes for record in records]
    assert outcome.comparison is not None
    assert 0 < outcome.comparison.exact_seconds < 1
    assert (outcome.schedule is None) == bool(outcome.comparison.reason)


def test_weights_that_stay_in_no_cache_count_as_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unstacked, "VECTOR", 1)
    x = torch.randn(3, 4).double()
    found = []
    for near in (1 << 22, 0):
        torch._dynamo.reset()
        monkeypatch.setattr(worth, "_NEAR", near)
        comparison = decided(x, monkeypatch, 1.0, 1e30, iterations=1).comparison
        assert comparison is not None
        found.append(comparison.iterated.bytes.value)
    weights = 2 * LENGTH * 2 * D * D * 8
    assert found[1] - found[0] >= 2 * weights, "they are read and written"


@pytest.mark.parametrize("pays", some_slow(["any k", "one iteration", "nothing"], {"any k", "nothing"}))
def test_the_defaults_together(pays: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """k is chosen where a single iteration would pay, and then only what pays at that k is iterated."""
    m, x = settled(), torch.randn(3, 4).double()
    expected = grads(m, m, x)
    products = {
        k: explain(m, x, options={"iterations": k, "apply": "always"}).graphs[0].depth_after for k in (1, 2)
    }
    assert products[1] < products[2]
    most = {"any k": math.inf, "one iteration": products[1], "nothing": 0}[pays]

    def seconds(work: Work, *_: Any) -> float:
        # Exact backpropagation, which has more in sequence than all others, takes a second.
        return 1.0 if work.depth > 2 * 3 * LENGTH else float(work.depth > most)

    monkeypatch.setattr(worth, "seconds_of", seconds)
    torch._dynamo.reset()
    forward = torch.compile(m, backend="highway", options={"codegen": "eager"})
    done = []
    with recorded() as records:
        for _ in range(4):
            found = grads(m, forward, x)
            error = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
            done.append("exact" if error < 1e-10 else "iterated")
    assert done == ["exact", *(["iterated"] * 3 if pays == "any k" else ["exact"] * 3)]
    # A program that watches, unless nothing pays, and one that does what was chosen.
    assert len(records) == (1 if pays == "nothing" else 2)


@pytest.mark.parametrize(
    ("device", "options", "has_kernels"),
    [
        ("cpu", {}, True),
        ("cpu", {"iterations": "exact"}, True),
        ("cpu", {"apply": "always"}, True),
        ("cpu", {"apply": "never"}, False),
        ("cpu", {"codegen": "eager"}, False),
        ("meta", {}, False),
    ],
)
def test_where_chains_may_be_kernels(device: str, options: dict[str, Any], has_kernels: bool) -> None:
    graph = torch.fx.Graph()
    graph.placeholder("x").meta["val"] = torch.empty(2, device=device)
    assert kernels.may_have_kernels(graph, Options(**options)) == has_kernels
