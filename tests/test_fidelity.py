"""The fidelity report: its numbers, and that it leaves no trace."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.compile_fx
from small_models import LENGTH, Reader, compiled, grads, model
from torch import Tensor, nn

import hwbp_compile
from hwbp_compile.__main__ import main
from hwbp_compile.report.recommend import sweeps_of


def loss_fn(m: nn.Module, batch: Tensor) -> Tensor:
    return m(batch).square().sum()


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_numbers_are_those_of_the_gradients() -> None:
    m = model()
    exact = torch.cat([g.flatten() for g in grads(m, m, X)])
    report = hwbp_compile.fidelity(m, loss_fn, X, iterations=[0, 1, LENGTH], gamma=0.1)
    assert [r.iterations for r in report.rows] == [0, 1, LENGTH]
    before = torch.zeros_like(exact)
    for row in report.rows:
        torch._dynamo.reset()
        each = grads(m, compiled(m, apply="always", iterations=row.iterations, gamma=0.1), X)
        found = torch.cat([g.flatten() for g in each])
        assert row.overall.cosine == pytest.approx(
            float(found @ exact / found.norm() / exact.norm()), abs=1e-9
        )
        assert row.overall.relative_error == pytest.approx(
            float((found - exact).norm() / exact.norm()), rel=1e-6, abs=1e-10
        )
        assert row.contribution == pytest.approx(float((found - before).norm() / found.norm()), rel=1e-6)
        before = found
    last = report.rows[-1]
    assert set(last.parameters) == {name for name, _ in m.named_parameters()}
    assert last.mean_cosine == pytest.approx(1, abs=1e-9)
    assert report.rows[0].estimates == ()
    assert len(last.estimates) == 1
    assert report.rows[0].mean_cosine < report.rows[1].mean_cosine < last.mean_cosine
    assert json.loads(json.dumps(report.to_dict()))["splits"] == {"gamma": 0.1}


class Noisy(nn.Module):
    """Dropout, running statistics, and a bias that batch normalisation takes away again."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.blocks = model()[1:]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(nn.functional.dropout(self.norm(self.enter(x)), 0.5, self.training))
        return y


def test_the_model_stays_as_it_was() -> None:
    m = Noisy().double()
    hwbp_compile.set_iterations(m, 3)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(m.state_dict())
    state = torch.get_rng_state()
    report = hwbp_compile.fidelity(m, loss_fn, X, iterations=[1, LENGTH])
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in m.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in m.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in m.parameters())
    assert hwbp_compile.monitor(m).current == ()
    # Dropout drew the same numbers for each k, or the last row would not be exact.
    assert report.rows[-1].overall.relative_error < 1e-9
    assert report.without_gradient == ("enter.bias",)
    assert "left out, as their gradient is zero: enter.bias" in str(report)
    c = compiled(m.eval(), apply="always", iterations=1)
    grads(m, c, X)
    assert hwbp_compile.monitor(m).history[-1].iterations == 3


@pytest.mark.slow
def test_gradients_of_generated_code() -> None:
    """With the same random numbers, and it is generated code that is looked at."""
    m = Noisy().double()
    settings: dict[str, Any] = {"iterations": [1], "gamma": 0.1}
    by_operators = hwbp_compile.fidelity(m, loss_fn, X, **settings)
    inductor = torch._inductor.compile_fx
    with mock.patch.object(inductor, "compile_fx", wraps=inductor.compile_fx) as ran:
        generated = hwbp_compile.fidelity(m, loss_fn, X, codegen="inductor", **settings)
    assert ran.called
    assert generated.rows[0].overall.cosine == pytest.approx(by_operators.rows[0].overall.cosine, abs=1e-12)
    assert generated.rows[0].overall.cosine < 1 - 1e-6


def test_a_compiled_model_and_several_arguments() -> None:
    m = model()
    c = torch.compile(m, backend="highway")
    report = hwbp_compile.fidelity(
        c,
        lambda m, batch: nn.functional.mse_loss(m(batch["x"]), batch["y"]),
        {"x": X, "y": torch.zeros(5, 3, dtype=X.dtype)},
        [LENGTH],
    )
    assert report.rows[0].overall.cosine == pytest.approx(1, abs=1e-9)


def test_plot(tmp_path: Path) -> None:
    report = hwbp_compile.fidelity(model(), loss_fn, X, [0, 1])
    report.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.relu, loss_fn, X), TypeError, "takes a module"),
        ((model(), loss_fn, X, []), ValueError, "at least one k"),
        ((model(), loss_fn, X, ["exact"]), hwbp_compile.OptionError, "integers k"),
        ((model(), loss_fn, X, [1], "cpp"), hwbp_compile.OptionError, "'eager' or 'inductor'"),
        ((model(), loss_fn, X, [-1]), hwbp_compile.OptionError, "iterations must be"),
        ((model(), lambda m, x: m(x).sum() / 0 * 0, X), hwbp_compile.ModelError, "is not finite"),
        ((model(), lambda m, x: m(x), X), hwbp_compile.ModelError, "a tensor of one element"),
        ((model(), lambda m, x: x.sum(), X), hwbp_compile.ModelError, "depends on no parameter"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hwbp_compile.fidelity(*arguments)


def test_the_loss_is_given_the_model_itself() -> None:
    m = model().eval()
    seen: list[Any] = []

    def loss(given: nn.Module, batch: Tensor) -> Tensor:
        seen.extend([given is m, given.training, next(given.parameters()).device.type])
        penalty = torch.stack([p.square().sum() for p in given.parameters()]).sum()
        result: Tensor = given(batch).square().sum() + 10 * penalty
        return result

    report = hwbp_compile.fidelity(m, loss, X, [1])
    assert seen == [True, False, "cpu"] * 2
    m.zero_grad()
    loss(m, X).backward()
    exact = torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
    m.zero_grad()
    without = hwbp_compile.fidelity(m, loss_fn, X, [1]).rows[0].overall.relative_error
    assert 0 < report.rows[0].overall.relative_error < without
    assert "_compiled_call_impl" not in m.__dict__
    assert exact.isfinite().all()


class Centred(nn.Module):
    """Subtracts a running mean, which each call moves."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.5)
        y: Tensor = self.inner(x - self.mean)
        return y


def test_every_k_sees_the_same_buffers() -> None:
    m = Centred()
    report = hwbp_compile.fidelity(m, loss_fn, X + 2, [LENGTH, LENGTH + 1])
    assert [r.overall.relative_error < 1e-10 for r in report.rows] == [True, True]
    assert not m.mean.any()


def test_a_model_without_chains() -> None:
    m = nn.Linear(4, 3).double()
    assert str(hwbp_compile.fidelity(m, loss_fn, X, [1])).startswith("no chain of this model is iterated")
    found = hwbp_compile.recommend(m, loss_fn, [X])
    assert found.options == {"iterations": "exact"}
    assert "no chain of this model is iterated" in str(found)


def test_sweeps() -> None:
    assert sweeps_of(2, {}, 16) == 2
    assert sweeps_of(2, {"exact_tail": 2}, 16) == (2 * 14 + 2) / 16
    assert sweeps_of(1, {"exact_tail": 4}, 5) == 1, "a block and an exact sweep"
    assert sweeps_of(1, {"group_size": 4}, 16) == 1.75


def test_recommended_options_say_that_there_are_no_groups_over_time() -> None:
    m, x = Reader(4, 5).double(), torch.randn(20, 2, 4, dtype=torch.float64)
    found = hwbp_compile.recommend(m, loss_fn, [x], splits=[{}])
    assert found.options == {"iterations": found.tried[0].iterations, "group_size": 1}


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(hwbp_compile.OptionError, match="'min_blocks' is unknown"):
        hwbp_compile.fidelity(model(), loss_fn, X, min_blocks=2)


FACTORY = """
import torch
from torch import nn

def block(d):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Linear(d, d), nn.Tanh())
        def forward(self, x):
            return x + self.f(x)
    return Block()

def make():
    model = nn.Sequential(*(block(4) for _ in range(5)))
    return model, lambda model, batch: model(batch).square().mean(), torch.randn(3, 4)

def make_mistaken():
    return block(4), lambda model, batch: model(batch).sum() + "1", torch.randn(3, 4)

def make_function():
    return torch.relu, lambda model, batch: model(batch).sum(), torch.randn(3, 4)
"""


def test_from_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "factory.py"
    file.write_text(FACTORY)
    where = f"{file}:make"
    assert (
        main(
            [
                "fidelity",
                where,
                "--iterations",
                "1",
                "5",
                "-o",
                "gamma=0.1",
                "--plot",
                str(tmp_path / "a.png"),
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["k", "cosine"]
    assert [line.split()[0] for line in lines[2:4]] == ["1", "5"]
    assert (tmp_path / "a.png").exists()
    assert main(["fidelity", where, "--iterations", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["iterations"] == 5
    # A mistake inside the user's functions is shown as it is; one in what they return is said in a sentence.
    with pytest.raises(TypeError, match="unsupported operand"):
        main(["fidelity", f"{file}:make_mistaken"])
    assert main(["fidelity", f"{file}:make_function"]) == 2
    assert "takes a module" in capsys.readouterr().err
    assert main(["fidelity", where, "--plot", "a.txt"]) == 2
    assert "must end in" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], [{"gamma": 0.9}]])
def test_recommend_finds_the_smallest_k(more: list[dict[str, Any]]) -> None:
    m = model()
    splits: list[dict[str, Any]] = [{}, {"group_size": 3}, *more]
    found = hwbp_compile.recommend(m, loss_fn, [X, -X], target=0.99, splits=splits)
    for tried in found.tried:
        for k, expected in tried.cosines.items():
            assert (expected >= 0.99) == (k == tried.iterations)
            if k == max(tried.cosines):
                rows = [hwbp_compile.fidelity(m, loss_fn, x, [k], **tried.splits).rows[0] for x in (X, -X)]
                assert expected == pytest.approx(sum(r.mean_cosine for r in rows) / 2, abs=1e-9)
    sweeps = [t.sweeps for t in found.tried]
    assert sweeps == sorted(sweeps)
    by_group = {t.splits.get("group_size", 1): t for t in found.tried if "gamma" not in t.splits}
    k = by_group[3].iterations
    assert k is not None
    assert (by_group[3].sweeps, by_group[3].sequential) == (pytest.approx(k + 2 / 3), 3 * k + 2)
    assert found.options == {"iterations": found.tried[0].iterations, **found.tried[0].splits}
    assert str(found).endswith(f"for a cosine of 0.99: options={found.options}")
    hwbp_compile.Options(**found.options)


def test_recommend_says_exact_where_nothing_is_enough() -> None:
    found = hwbp_compile.recommend(model(), loss_fn, [X], target=1.0, max_iterations=1, splits=[{}])
    assert found.options == {"iterations": "exact"}
    assert "> 1" in str(found)
    with pytest.raises(ValueError, match="target must be"):
        hwbp_compile.recommend(model(), loss_fn, [X], target=2)
    with pytest.raises(ValueError, match="at least one batch"):
        hwbp_compile.recommend(model(), loss_fn, [])
