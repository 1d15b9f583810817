"""A compiled model in a checkpoint, and under hooks for saved tensors: what is computed again is the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import relative_error
from small_models import compiled, grads, settled
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hwbp_compile
from hwbp_compile.control.auto import RECENT

AUTO = {"iterations": "auto", "apply": "always"}


def rows() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, requires_grad=True)


def checkpointed(call: Callable[..., Tensor], reentrant: bool = False) -> Callable[..., Tensor]:
    return lambda x: checkpoint(call, x, use_reentrant=reentrant)


def settings_of(m: torch.nn.Module) -> list[Any]:
    """k of each step of which something came; "watched" where it only was."""
    return ["watched" if s.watched else s.iterations for s in hwbp_compile.monitor(m).history]


def grads_of(m: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    m.zero_grad()
    loss.backward()
    return [p.grad for p in m.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("reentrant", "nested"),
    [
        (False, False),
        *(pytest.param(True, n, marks=pytest.mark.slow) for n in (False, True)),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
    ids=["not reentrant", "reentrant", "reentrant and nested", "nested"],
)
def test_k_is_chosen(reentrant: bool, nested: bool) -> None:
    m, x = settled(), rows()
    c = compiled(m, **AUTO)
    run = checkpointed(c, reentrant)
    if nested:
        run = checkpointed(run, reentrant)
    for _ in range(6):
        found = grads(m, run, x)
    chosen = settings_of(m)
    k = chosen[-1]
    assert chosen == ["watched", *[k] * 5]
    assert [s.step for s in hwbp_compile.monitor(m).history] == list(range(6)), "none is counted twice"
    assert isinstance(k, int)
    torch._dynamo.reset()
    expected = grads(m, compiled(m, iterations=k, apply="always"), x)
    assert relative_error(found, expected) <= 1e-12


W = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


@pytest.mark.parametrize("nested", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_same_graph_several_times_a_step(nested: bool) -> None:
    """Each time is computed again with its own settings, also if a checkpoint around both does that too."""
    m, x = settled(), rows()
    part = checkpointed(compiled(m, **AUTO))

    def twice(x: Tensor) -> Tensor:
        return part(part(x) @ W)

    run = checkpointed(twice) if nested else twice
    for _ in range(30):
        found = grads(m, run, x)
    chosen = settings_of(m)
    k = chosen[-1]
    assert len(chosen) == 60
    assert 3 <= chosen.count("watched") <= 8
    assert isinstance(k, int)
    c = compiled(m, iterations=k, apply="always")
    assert relative_error(found, grads(m, lambda x: c(c(x) @ W), x)) <= 1e-12
    hwbp_compile.set_iterations(m, "exact")
    assert relative_error(grads(m, run, x), grads(m, lambda x: m(m(x) @ W), x)) <= 1e-12


@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_each_forward_pass_keeps_the_settings_that_it_had(first: int) -> None:
    """Whichever backward pass comes first, and though one of a third never comes."""
    m, x = settled(), rows()
    run = checkpointed(compiled(m, iterations=1, apply="always"))
    expected = [grads(m, run, x)]
    hwbp_compile.set_iterations(m, iterations=1, group_size=3)
    expected.append(grads(m, run, x))
    assert relative_error(*expected) > 1e-3
    hwbp_compile.set_iterations(m, iterations=1, group_size=1)
    losses = [run(x).square().sum()]
    run(x)
    hwbp_compile.set_iterations(m, iterations=1, group_size=3)
    losses.append(run(x).square().sum())
    for i in (first, 1 - first):
        assert relative_error(grads_of(m, losses[i]), expected[i]) <= 1e-12


def test_the_function_in_a_checkpoint_asks_for_a_gradient_itself() -> None:
    """It does so once more when it is computed again, and settings may have changed."""
    m, x = settled(), rows()
    part = checkpointed(compiled(m, iterations=1, apply="always"))

    def scaled(x: Tensor) -> Tensor:
        y = part(x)
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        return y * slope.detach()[:, :1]

    run = checkpointed(scaled)
    expected = grads(m, run, x)
    m.zero_grad()
    loss = run(x).square().sum()
    hwbp_compile.set_iterations(m, "exact")
    assert relative_error(grads_of(m, loss), expected) <= 1e-12


@pytest.mark.slow
def test_code_that_is_compiled_again_in_between() -> None:
    """For other sizes, for which the older ones are run again, with the settings that they had."""
    m, x, more = settled(), rows(), torch.randn(7, 4, dtype=torch.float64)
    run = checkpointed(compiled(m, iterations=1, apply="always"))
    expected = grads(m, run, x)
    torch._dynamo.reset()
    m.zero_grad()
    loss = run(x).square().sum()
    hwbp_compile.set_iterations(m, iterations=1, group_size=3)
    run(more).square().sum().backward()
    assert relative_error(grads_of(m, loss), expected) <= 1e-12


def test_a_backward_pass_that_comes_twice() -> None:
    m, x = settled(), rows()
    run = checkpointed(compiled(m, iterations=1, apply="always"))
    few = grads(m, run, x)
    m.zero_grad()
    loss = run(x).square().sum()
    hwbp_compile.set_iterations(m, "exact")
    with torch._functorch.config.patch(donated_buffer=False):
        loss.backward(retain_graph=True)
        loss.backward()
    for p, one in zip(m.parameters(), few, strict=True):
        torch.testing.assert_close(p.grad, 2 * one)


def test_hooks_that_copy_what_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    """The backward pass records into the copies, so nothing comes: no step is watched for ever."""
    m, x = settled(), rows()
    c = compiled(m, **AUTO)
    with (
        caplog.at_level(logging.WARNING, logger="hwbp_compile"),
        torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved),
    ):
        for _ in range(RECENT + 8):
            found = grads(m, c, x)
    assert not settings_of(m)
    assert relative_error(found, grads(m, m, x)) <= 1e-12
    assert ["as nothing has come of" in r.getMessage() for r in caplog.records] == [True]
    for _ in range(30):
        grads(m, c, x)
    assert isinstance(settings_of(m)[-1], int)
