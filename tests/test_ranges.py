"""``apply="auto"`` with sizes that a graph leaves open: one choice for each range of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from scan_cells import CELLS
from small_models import Reader, compiled, grads
from test_scans import Model, data
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hwbp_compile
from hwbp_compile import _compat
from hwbp_compile.backend import HighwayPass
from hwbp_compile.control import auto, choices
from hwbp_compile.control.variants import Variants
from hwbp_compile.options import Choice, Options
from hwbp_compile.passes import worth
from hwbp_compile.passes.worth import Comparison
from hwbp_compile.ranges import OpenSizes
from hwbp_compile.recurrent import capture

pytestmark = pytest.mark.measured

LENGTH = 4
LIMIT = 8
"""What is iterated in these tests is what has no more rows than that."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.f(x))


def model(depth: int = LENGTH) -> nn.Sequential:
    """As little as makes a chain: symbolic shapes take long to trace."""
    return nn.Sequential(nn.Linear(4, 4), *(Block() for _ in range(depth)), nn.Linear(4, 2)).double()


def rows(n: int, d: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, d, dtype=torch.float64, generator=generator)


def decide(monkeypatch: pytest.MonkeyPatch, pays: Callable[[Comparison], bool]) -> list[Comparison]:
    """What pays is what ``pays`` says; what it was asked is listed."""
    asked: list[Comparison] = []

    def reason(self: Comparison) -> str:
        asked.append(self)
        return "" if pays(self) else "too large"

    monkeypatch.setattr(Comparison, "reason", property(reason))
    monkeypatch.setattr(worth, "seconds_of", lambda *_: 1.0)
    return asked


def small(comparison: Comparison) -> bool:
    return all(size <= LIMIT for size in comparison.sizes.values())


@contextmanager
def counting() -> Iterator[list[Options]]:
    """The options of each compilation from the second one on, which must be made without Dynamo.

    The first may be made twice, as Dynamo begins anew where it finds a size in an unexpected place.
    """
    found: list[Options] = []
    original = Variants._compile_for

    def compile_for(self: Variants, options: Options, inputs: Any) -> Any:
        if hasattr(self, "_choices"):
            found.append(options)
        return original(self, options, inputs)

    with (
        mock.patch.object(Variants, "_compile_for", compile_for),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        yield found


def iterated(options: list[Options]) -> list[bool]:
    return [o.is_iterated for o in options]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(a, b, strict=True))


def expected(m: nn.Module, *x: Tensor, **options: Any) -> list[Tensor]:
    """Gradients of a copy that is compiled for one setting and these sizes."""
    torch._dynamo.reset()
    twin = copy.deepcopy(m)
    found = grads(twin, compiled(twin, apply="always", **options), *x)
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("first", [5, 40])
def test_each_range_runs_what_is_faster_there(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = decide(monkeypatch, small)
    m = model()
    sizes = (first, 7, 40, 6, 33, 8, 20)
    want = [expected(m, rows(n), iterations=1) if n <= LIMIT else grads(m, m, rows(n)) for n in sizes]
    c = compiled(m, iterations=1, dynamic=True)
    with counting() as compilations:
        for _ in range(2):
            for n, w in zip(sizes, want, strict=True):
                assert equal(grads(m, c, rows(n)), w), n
            once = len(asked)
    assert iterated(compilations) == [first > LIMIT]
    assert len(asked) == once, "a decision is made once"
    assert {size for each in asked for size in each.sizes.values()} == {8, 32, 64}


def test_nothing_is_compiled_where_one_program_is_right_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for pays in (True, False):
        decide(monkeypatch, lambda _, pays=pays: pays)
        m = model()
        c = compiled(m, iterations=1, dynamic=True)
        with counting() as compilations, mock.patch.object(_compat, "capture_joint_graphs") as traced:
            for n in (3, 100, 17):
                grads(m, c, rows(n))
        assert not compilations
        traced.assert_not_called()


def test_sizes_that_decide_nothing_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without open sizes, and without chains, no call looks at its sizes."""
    decide(monkeypatch, small)
    m, plain = model(), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    static = compiled(m, iterations=1, dynamic=False)
    free = compiled(plain, iterations=1, dynamic=True)
    grads(m, static, rows(40))
    grads(plain, free, rows(40))
    with mock.patch.object(OpenSizes, "range_of") as looked:
        grads(m, static, rows(40))
        grads(plain, free, rows(40))
        grads(plain, free, rows(3))
    looked.assert_not_called()


def test_what_dynamo_makes_dynamic_later(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, small)
    m = model()
    want = {n: expected(m, rows(n), iterations=1) if n <= LIMIT else grads(m, m, rows(n)) for n in (5, 40)}
    c = compiled(m, iterations=1)
    grads(m, c, rows(3))
    grads(m, c, rows(4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (5, 40, 5):
            assert equal(grads(m, c, rows(n)), want[n])


class Two(nn.Module):
    """Two chains over depth, of rows of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = model(), model()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(y)])


def test_each_chain_has_its_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, lambda c: all(c.sizes[s] <= LIMIT for s in free(c)))
    m = Two()
    want = {
        n: [grads(p, p, rows(n)) if n > LIMIT else expected(p, rows(n), iterations=2) for p in (m.a, m.b)]
        for n in (5, 6, 40, 50)
    }
    c = compiled(m, iterations=2, dynamic=True)
    with counting() as compilations:
        for n, k in [(40, 50), (5, 40), (40, 5), (5, 6), (6, 50)]:
            assert equal(grads(m, c, rows(n), rows(k)), [*want[n][0], *want[k][1]]), (n, k)
    chosen = [o.chosen.over_depth for o in compilations if o.chosen]
    assert sorted(chosen) == [(False, True), (True, False), (True, True)]
    assert len(compilations) == 3


def free(comparison: Comparison) -> set[Any]:
    """The sizes of one chain: those of which its schedule has more to do than the exact pass."""
    more = comparison.iterated.flops.formula - comparison.exact.flops.formula
    return set(more.free_symbols)


def test_many_choices_do_not_make_many_programs() -> None:
    gm = torch.fx.symbolic_trace(nn.Identity())
    found = choices.Choices(gm, [], mock.MagicMock())
    options = Options(iterations=1)
    wanted = [Choice((), tuple(bool(i >> bit & 1) for bit in range(4))) for i in range(16)]
    made = [found._within_limit(options, w, lambda _: True) for w in wanted]
    assert made[:4] == wanted[:4]
    assert len({c for c in made if any(c.over_depth)}) == choices.MOST
    assert all(b or not a for c, w in zip(made, wanted, strict=True) for a, b in zip(c[1], w[1], strict=True))
    assert made[-1] == wanted[3], "the one that iterates most"
    assert found._within_limit(options, wanted[8], lambda _: True) == wanted[0]
    # Of several chains each may be worth it with the others only.
    assert not any(found._within_limit(options, wanted[8], lambda _: False).over_depth)


def test_a_change_of_k(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, small)
    m = model()
    want: dict[int | str, list[Tensor]] = {k: expected(m, rows(5), iterations=k) for k in (1, 2, "exact")}
    exact = grads(m, m, rows(40))
    c = compiled(m, iterations=1, dynamic=True)
    with counting() as compilations:
        for k in (1, 2, "exact", 1):
            hwbp_compile.set_iterations(m, k)
            assert equal(grads(m, c, rows(5)), want[k])
            assert equal(grads(m, c, rows(40)), exact)
    assert [o.iterations for o in compilations] == ["exact", 2]


def test_k_is_chosen_by_the_steps_in_which_something_is_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, small)
    monkeypatch.setattr(auto, "RECENT", 1)  # so that what is not read at once is never read
    m = model(2 * LENGTH)
    for block in list(m)[1:-1]:
        block.f.weight.data *= 0.1
    exact = grads(m, m, rows(40))
    c = compiled(m, iterations="auto", max_iterations=3, dynamic=True)
    seen = hwbp_compile.monitor(m)
    with counting() as compilations:
        for _ in range(3):
            assert equal(grads(m, c, rows(40)), exact)
            assert seen.history == []
        for _ in range(3):
            assert equal(grads(m, c, rows(40)), exact)
            grads(m, c, rows(5))
    assert [s.watched for s in seen.history] == [True, False, False]
    k = seen.history[-1].iterations
    assert isinstance(k, int)
    # The first program, which was to be watched, is the exact one.
    assert [(o.iterations, o.watch > 0) for o in compilations] == [("exact", True), (k, False)]


def test_records_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, small)
    m = model()
    c = compiled(m, iterations=2, dynamic=True)
    grads(m, c, rows(5))
    hwbp_compile.monitor(m).record_blocks()
    for n in (5, 40, 6):
        grads(m, c, rows(n))
    history = hwbp_compile.monitor(m).history
    assert [len(s.chains[0].block_steps) for s in history] == [0, LENGTH, LENGTH]


def test_what_is_found_out_inside_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes again what ran, and counts nothing of what was measured or compiled meanwhile."""
    decide(monkeypatch, small)

    def seconds(*_: Any) -> float:
        with _compat.outside_of_tracing():
            torch.ones(2, requires_grad=True).square()
        return 1.0

    monkeypatch.setattr(worth, "seconds_of", seconds)
    m = model()
    c = compiled(m, iterations=1, dynamic=True)
    for n in (5, 40, 5):
        again = grads(m, lambda x: checkpoint(c, x, use_reentrant=False), rows(n))
        assert equal(again, grads(m, c, rows(n)))


def test_programs_from_a_cache_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no pass ran, the graph is traced when the second range comes."""
    decide(monkeypatch, small)
    m = model()
    want = {n: expected(m, rows(n), iterations=1) if n <= LIMIT else grads(m, m, rows(n)) for n in (5, 40)}
    c = compiled(m, iterations=1, dynamic=True)
    with (
        mock.patch.object(choices.Choices, "found"),
        mock.patch.object(_compat, "capture_joint_graphs", wraps=_compat.capture_joint_graphs) as traced,
        counting() as compilations,
    ):
        for n, traces in ((5, 0), (5, 0), (40, 1), (5, 1), (40, 1)):
            assert equal(grads(m, c, rows(n)), want[n])
            assert traced.call_count == traces
    assert iterated(compilations) == [False]


def test_what_cannot_be_chosen_again_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decide(monkeypatch, small)
    m = model()
    want = expected(m, rows(40), iterations=1)
    c = compiled(m, iterations=1, dynamic=True)
    grads(m, c, rows(5))
    with mock.patch.object(Comparison, "at", side_effect=RuntimeError("no clock")), counting() as more:
        assert equal(grads(m, c, rows(40)), want)
    assert not more
    assert "holds for others too" in caplog.text


def test_what_cannot_be_compiled_for_all_sizes_is_not_compiled_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide(monkeypatch, small)
    m = model()
    exact = {n: grads(m, m, rows(n)) for n in (40, 5, 6)}
    c = compiled(m, iterations=1, dynamic=True)
    grads(m, c, rows(40))
    later = _compat.compile_later

    def conditional(*args: Any) -> Any:
        return later(*args)[0], False

    with counting() as compilations, mock.patch.object(_compat, "compile_later", conditional):
        for n in (5, 6, 40, 5):
            assert equal(grads(m, c, rows(n)), exact[n])
    assert iterated(compilations) == [True]


def test_one_line_tells_of_each_change(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decide(monkeypatch, small)
    m = model()
    c = compiled(m, iterations=1, dynamic=True)
    with caplog.at_level(logging.INFO, "hwbp_compile"):
        for n in (5, 3, 40, 20, 5):
            grads(m, c, rows(n))
    said = [r.getMessage() for r in caplog.records if "sizes up to" in r.getMessage()]
    assert [line.partition(" = ")[2] for line in said] == ["64, 0 of 1 chains are iterated."]


def test_caches_tell_ranges_apart() -> None:
    def identity(range: tuple[int, ...], **options: Any) -> Any:
        return HighwayPass(Options(iterations=1, **options), True, range).uuid()

    assert identity((3,)) != identity((4,))
    chosen = Choice((), (True,))
    assert identity((3,), chosen=chosen) == identity((4,), chosen=chosen) != identity((4,))
    assert identity((3,), apply="always") == identity((4,), apply="always")


@pytest.mark.parametrize("scans", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recurrences_are_chosen_by_their_length(scans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def why(inputs: Any, carry: Any, weights: Any, key: str, settings: Any, sizes: Any) -> str:
        steps = _compat.size_at(inputs[0].shape[0], sizes)
        asked.append(steps)
        return "" if steps > 16 else "too short"

    monkeypatch.setattr(capture, "why_exact_is_faster", why)
    m = Model(CELLS["layer norm gru"]) if scans else Reader(3, 4).double()
    calls = {
        n: data(m.cell, n, 2) if isinstance(m, Model) else [torch.randn(n, 2, 3, dtype=torch.float64)]
        for n in (9, 30, 16, 17)
    }
    want = {n: expected(m, *x, iterations=1 if n > 16 else "exact", group_size=1) for n, x in calls.items()}
    for x, *_ in calls.values():
        torch._dynamo.mark_dynamic(x, 0)
    c = compiled(m, iterations=1, group_size=1)
    with counting() as compilations, mock.patch.object(_compat, "capture_joint_graphs") as traced:
        for _ in range(2):
            for n, inputs in calls.items():
                assert equal(grads(m, c, *inputs), want[n]), n
            once = len(asked)
    assert iterated(compilations) == [True]
    assert len(asked) == once
    assert set(asked) == {16, 32}
    traced.assert_not_called()  # there is nothing to compare over depth
