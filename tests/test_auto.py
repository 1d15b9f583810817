"""k chosen while training: the rules on made-up records, then models."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from compare import float64
from families import FAMILIES, Size
from reference import plain_run
from small_models import LENGTH, Reader, compiled, grads, model, settled
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import hwbp_compile
from hwbp_compile.control.auto import AT_ONCE, FIRST_PERIOD, LONGEST_PERIOD, RECENT, SELDOM, AutoIterations
from hwbp_compile.control.runs import ChainRecord
from hwbp_compile.options import Options

Steps = Callable[[int, int], Sequence[float] | None]
"""``steps(step, k)``: what k iterations record at a training step; None if nothing is."""


@dataclass
class Entry:
    number: int
    options: Options
    records: tuple[ChainRecord, ...]
    is_here: bool = True

    def chains(self) -> tuple[ChainRecord, ...]:
        return self.records


def play(
    steps: Steps, count: int, *, blocks: int = 40, largest: float = 1.0, delay: int = 0, **options: Any
) -> list[Any]:
    """What is chosen for so many training steps: k, "exact", or "watched"."""
    auto = AutoIterations(Options(iterations="auto", **options))
    history: list[Entry] = []
    chosen: list[Any] = []
    for number in range(count):
        for entry in history:
            entry.is_here = entry.number < number - delay
        now = auto.next_options(history)  # type: ignore[arg-type]
        k = now.watch or now.iterations
        chosen.append("watched" if now.watch else k)
        found = None if k == "exact" else steps(number, k)
        records = () if found is None else (ChainRecord(blocks, False, k, tuple(found), largest),)
        history.append(Entry(number, now, records))
    return chosen


def geometric(ratio: float, start: float = 1.0) -> Steps:
    return lambda _, k: [start * ratio**j for j in range(1, k + 1)]


def test_the_smallest_k_within_the_tolerance() -> None:
    # One more iteration after k changes the cotangents by 0.4 ** (k + 1).
    chosen = play(geometric(0.4), 60)
    assert chosen[0] == "watched"
    assert set(chosen[1:]) == {"watched", 3}
    assert set(play(geometric(0.4), 9, tolerance=0.001)[1:]) == {7}
    assert set(play(geometric(0.01), 9)[1:]) == {1}


def test_it_is_watched_less_and_less_often() -> None:
    chosen = play(geometric(0.4), 2000)
    at = [i for i, c in enumerate(chosen) if c == "watched"]
    gaps = [b - a - 1 for a, b in pairwise(at)]
    assert gaps[0] == FIRST_PERIOD
    assert gaps[-1] == LONGEST_PERIOD
    assert gaps == sorted(gaps)


@pytest.mark.parametrize("steps", [geometric(1.3), geometric(0.9), lambda _, k: [math.nan] * k])
def test_exact_where_no_k_is_enough(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert set(play(steps, 100)) == {"watched", "exact"}
    assert len(caplog.records) == 1
    assert "Try gamma or group_size" in caplog.text


def test_exact_where_half_the_blocks_are_not_enough() -> None:
    assert set(play(geometric(0.4), 9, blocks=6)[1:]) == {3}
    assert set(play(geometric(0.4), 9, blocks=5)[1:]) == {"exact"}


def test_exact_where_nothing_is_recorded() -> None:
    """A watched step is one without iterations then, and needs no second compilation."""
    assert set(play(lambda *_: None, 50)) == {"watched"}
    # From some step on, such as behind a condition in the model.
    chosen = play(lambda step, k: None if step > 20 else geometric(0.4)(step, k), 2000)
    assert chosen[-1] == 3
    assert chosen.count("watched") < 20


@pytest.mark.parametrize("at_once", [4, 8, 16, 32])
def test_several_forward_passes_before_their_backward_passes(at_once: int) -> None:
    """No record is lost: what has been recorded decides about the very next step."""
    auto = AutoIterations(Options(iterations="auto"))
    history: list[Entry] = []
    used: list[list[Any]] = []
    for step in range(100):
        ratio = 1.5 if 20 <= step < 24 else 0.3
        used.append([])
        for _ in range(at_once):
            now = auto.next_options(history)  # type: ignore[arg-type]
            k = now.watch or now.iterations
            used[-1].append("watched" if now.watch else k)
            found = () if k == "exact" else tuple(ratio**j for j in range(1, k + 1))
            records = (ChainRecord(40, False, len(found), found, 1.0),) if found else ()
            history.append(Entry(len(history), now, records, False))
        for entry in history:
            entry.is_here = True
    assert set(used[0]) == {"watched"}
    assert all(set(each) <= {2, "watched"} for each in used[1:21])
    assert sum(each.count("watched") for each in used[1:20]) <= 20
    assert not any(2 in each for each in used[21:24])
    assert used[-1].count(2) >= at_once - 1


@pytest.mark.parametrize("last", [False, True])
def test_a_watched_step_counts_though_others_came_since(last: bool) -> None:
    """Its record comes with those of the steps after it, or (``last``) when they have been read."""
    auto, history = AutoIterations(Options(iterations="auto")), []

    def begin(ratio: float) -> Any:
        now = auto.next_options(history)
        k = now.watch or now.iterations
        steps = tuple(ratio**j for j in range(1, k + 1))
        history.append(Entry(len(history), now, (ChainRecord(40, False, k, steps, 1.0),)))
        return now

    begin(0.3)
    while not begin(0.3).watch:
        pass
    watched = replace(history[-1], records=(ChainRecord(40, False, 9, geometric(0.45)(0, 9), 1.0),))
    watched.is_here = False
    history[-1] = watched
    for _ in range(7):
        begin(0.3)
        history[-1].is_here = False
        assert auto.awaited() == [watched]
    for entry in history:
        entry.is_here = entry is not watched or not last
    begin(0.3)
    assert auto.iterations == (2 if last else 3)
    watched.is_here = True
    begin(0.3)
    assert auto.iterations == 3
    assert auto.awaited() == []


def test_few_looks_where_nothing_is_recorded() -> None:
    looks = []

    @dataclass
    class Never(Entry):
        @property
        def is_here(self) -> bool:
            looks.append(self.number)
            return False

        @is_here.setter
        def is_here(self, value: bool) -> None:
            pass

    auto, history = AutoIterations(Options(iterations="auto")), []
    for number in range(400):
        history.append(Never(number, auto.next_options(history), ()))
    before = len(looks)
    for number in range(400, 800):
        history.append(Never(number, auto.next_options(history), ()))
    assert len(looks) - before <= 400 * (AT_ONCE + RECENT / SELDOM)


@pytest.mark.parametrize(("delay", "within"), [(0, 5), (2, 5), (5, 8)])
def test_a_growing_error_is_seen_within_some_steps(
    delay: int, within: int, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = geometric(0.3), geometric(1.5)
    with caplog.at_level(logging.WARNING):
        chosen = play(lambda step, k: (good if step < 50 else bad)(step, k), 120, delay=delay)
    assert chosen[49] == 2
    after = chosen[50:]
    assert after.index("watched") <= within
    assert 2 not in after[within:]
    assert after.count("exact") > 50
    assert len(caplog.records) == 1


def test_k_rises_at_once_and_falls_with_a_margin() -> None:
    worse = play(lambda step, k: geometric(0.3 if step < 5 else 0.45)(step, k), 60)
    assert set(worse[1:5]) == {2}
    assert worse[-1] == 3
    # At 0.36 two iterations are just enough: 0.0467. That is no reason to leave three.
    better = play(lambda step, k: geometric(0.45 if step < 5 else 0.36)(step, k), 60)
    assert better[-1] == 3
    assert play(lambda step, k: geometric(0.45 if step < 5 else 0.3)(step, k), 60)[-1] == 2


def test_steps_without_a_finite_gradient_say_nothing() -> None:
    assert set(play(geometric(0.4), 30, largest=math.inf)) == {"watched"}


def test_steps_without_a_gradient_say_nothing() -> None:
    assert set(play(lambda _, k: [0.0] * k, 30)) == {"watched"}
    chosen = play(lambda step, k: [0.0] * k if step in (0, 12) else geometric(0.4)(step, k), 40)
    assert chosen[:2] == ["watched"] * 2
    assert set(chosen[2:]) == {"watched", 3}


def train(m: nn.Module, c: Callable[..., Any], *x: Tensor, steps: int) -> list[float]:
    """Mean cosines of the parameters' gradients to the exact ones, step by step, under SGD."""
    cosines = []
    for _ in range(steps):
        exact = grads(m, m, *x)
        found = grads(m, c, *x)
        pairs = [(a, b) for a, b in zip(found, exact, strict=True) if b.norm() > 0]
        each = [float(cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs]
        cosines.append(sum(each) / len(each))
        with torch.no_grad():
            for p, g in zip(m.parameters(), found, strict=True):
                p -= 1e-3 * g
    return cosines


def test_a_model_trains_with_k_chosen() -> None:
    m = settled()
    c = compiled(m, apply="always", iterations="auto")
    cosines = train(m, c, torch.randn(5, 4, dtype=torch.float64), steps=14)
    history = hwbp_compile.monitor(m).history
    assert [s.watched for s in history] == [i in (0, 11) for i in range(14)]
    assert cosines[0] == pytest.approx(1, abs=1e-12)
    assert {s.iterations for s in history[1:11]} <= {1, 2, 3, 4}
    assert min(cosines) >= 0.99
    assert max(cosines[1:11]) < 1 - 1e-12


def test_a_small_transformer_keeps_good_gradients() -> None:
    torch.manual_seed(0)
    case = float64(FAMILIES["pre_ln_transformer"](Size(depth=8)))
    case.model.run = plain_run
    c = compiled(case.model, apply="always", iterations="auto")
    cosines = train(case.model, c, *case.inputs, steps=40)
    assert sum(cosine >= 0.99 for cosine in cosines) >= 0.95 * len(cosines)
    assert any(not s.watched for s in hwbp_compile.monitor(case.model).history)


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + 3 * self.f(x))
        return y


def test_a_diverging_model_is_exact_from_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 6), *(PostNorm() for _ in range(8)), nn.Linear(6, 3)).double()
    c = compiled(m, apply="always", iterations="auto", max_iterations=3)
    with caplog.at_level(logging.WARNING, "hwbp_compile"):
        cosines = train(m, c, torch.randn(5, 4, dtype=torch.float64), steps=5)
    assert cosines == pytest.approx([1] * 5, abs=1e-10)
    assert "uses exact backpropagation for now" in caplog.text


def test_recurrences_are_watched_too() -> None:
    torch.manual_seed(0)

    m = Reader(3, 5).double()
    c = compiled(m, apply="always", iterations="auto", group_size=2)
    cosines = train(m, c, torch.randn(40, 2, 3, dtype=torch.float64), steps=30)
    history = hwbp_compile.monitor(m).history
    assert [s.watched for s in history[:4]] == [True, False, False, False]
    assert history[0].chains[0].over_time
    assert cosines[0] == pytest.approx(1, abs=1e-12)
    assert min(cosines) >= 0.99


class Pixels(nn.Module):
    """Reads an image one pixel after the other and names the digit at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(1, 48), nn.Linear(48, 10)
        with torch.no_grad():  # units that forget over times from one pixel to all of them
            self.rnn.bias_hh_l0.zero_()
            self.rnn.bias_ih_l0.zero_()
            self.rnn.bias_ih_l0[48:96] = torch.empty(48).uniform_(1, 63).log()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0][-1])
        return y


@pytest.mark.slow
def test_a_recurrence_that_has_learned_to_look_back_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.tensor(digits.images).float().flatten(1) / 8 - 1, torch.tensor(digits.target)
    torch.manual_seed(0)
    m = Pixels()
    c = compiled(m, apply="always", iterations="auto")
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=600)

    def gradients(f: Any) -> tuple[float, list[Tensor]]:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(f(images[rows].T.unsqueeze(-1)), labels[rows])
        loss.backward()
        return loss.item(), [p.grad.clone() for p in m.parameters() if p.grad is not None]

    for _ in range(600):
        rows = torch.randint(len(images), (32,))
        loss, _ = gradients(m)
        optimizer.step()
        schedule.step()
    assert loss < 0.6, "it has not learned"
    with caplog.at_level(logging.WARNING, "hwbp_compile"):
        for _ in range(8):
            rows = torch.randint(len(images), (32,))
            _, exact = gradients(m)
            _, found = gradients(c)
            assert all(torch.allclose(f, e, rtol=1e-3, atol=1e-6) for f, e in zip(found, exact, strict=True))
    assert caplog.text.count("uses exact backpropagation for now") == 1


def test_it_begins_again_when_a_setting_changes() -> None:
    m = model()
    x = torch.randn(5, 4, dtype=torch.float64)
    c = compiled(m, apply="always", iterations=2)
    grads(m, c, x)
    hwbp_compile.set_iterations(m, "auto")
    grads(m, c, x)
    assert [s.watched for s in hwbp_compile.monitor(m).history] == [False, True]


@pytest.mark.slow
def test_another_split_is_not_judged_by_records_of_the_one_before() -> None:
    m, x = settled(), torch.randn(5, 4, dtype=torch.float64)
    c = compiled(m, apply="always", iterations="auto")
    assert min(train(m, c, x, steps=3)) >= 0.99
    hwbp_compile.set_iterations(m, gamma=0.9)
    assert min(train(m, c, x, steps=4)) >= 0.99
    assert hwbp_compile.monitor(m).history[3].watched
    # What does not change anything does not begin anew.
    for _ in range(3):
        hwbp_compile.set_iterations(m, "auto", gamma=0.9)
        train(m, c, x, steps=1)
    assert sum(s.watched for s in hwbp_compile.monitor(m).history) == 2


def test_the_user_is_told_once_though_settings_change(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 6), *(PostNorm() for _ in range(8)), nn.Linear(6, 3)).double()
    c = compiled(m, apply="always", iterations="auto", max_iterations=2)
    with caplog.at_level(logging.WARNING, "hwbp_compile"):
        for gamma in (0.0, 0.1):
            hwbp_compile.set_iterations(m, gamma=gamma)
            train(m, c, torch.randn(5, 4, dtype=torch.float64), steps=2)
    assert caplog.text.count("uses exact backpropagation for now") == 1


def test_forward_passes_without_a_backward_pass_hide_nothing() -> None:
    m, x = settled(), torch.randn(5, 4, dtype=torch.float64)
    c = compiled(m, apply="always", iterations="auto")
    for _ in range(2):
        grads(m, c, x)
        for _ in range(12):
            c(x)
    found = [s for s in hwbp_compile.monitor(m).history if not s.watched]
    assert found
    assert {s.iterations for s in found} <= {1, 2, 3, 4}


def test_a_single_group_is_iterated_once(caplog: pytest.LogCaptureFixture) -> None:
    assert set(play(lambda _, k: [0.5] + [0.0] * (k - 1), 9, blocks=1)[1:]) == {1}
    assert not caplog.records


@pytest.mark.parametrize("iterations", [pytest.param("auto", marks=pytest.mark.slow), LENGTH])
def test_a_gradient_scaler_leaves_out_the_same_steps(iterations: Any) -> None:
    """Inf in one batch: the weights stay, the scale is halved, training goes on, as with exact gradients."""
    torch.manual_seed(0)
    start = model().float()
    batches = [torch.randn(5, 4) for _ in range(4)]
    batches[1][0, 0] = math.inf
    results = []
    for highway in (False, True):
        torch._dynamo.reset()
        m = model().float()
        m.load_state_dict(start.state_dict())
        # A tolerance that no k meets: what is compared is exact, step by step.
        c = compiled(m, apply="always", iterations=iterations, tolerance=0.0) if highway else m
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scales, weights = [], []
        for x in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = c(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            weights.append([p.detach().clone() for p in m.parameters()])
        results.append((scales, weights))
    (exact_scales, exact), (scales, found) = results
    assert scales == exact_scales == [64.0, 32.0, 32.0, 32.0]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    for step, expected in zip(found, exact, strict=True):
        for a, b in zip(step, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_a_gradient_scaler_while_k_is_chosen() -> None:
    """Inf in one batch while the backward pass is iterated: the same scales as with exact gradients."""
    batches = [torch.randn(5, 4) for _ in range(6)]
    batches[3][0, 0] = math.inf
    results = []
    for highway in (False, True):
        m = settled(0.05).float()
        c = compiled(m, apply="always", iterations="auto") if highway else m
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scales = []
        for x in batches:
            optimizer.zero_grad()
            scaler.scale(c(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((scales, [p.detach().clone() for p in m.parameters()]))
    history = hwbp_compile.monitor(m).history
    assert [s.watched for s in history[:3]] == [True, False, False]
    assert not history[3].watched, "the step with Inf is an iterated one"
    (exact_scales, exact), (scales, found) = results
    assert scales == exact_scales
    assert scales[2] == 2 * scales[3]
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-2, atol=1e-3)
