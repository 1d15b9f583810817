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


@pytest.mark.parametrize(
    ("reentrant", "nested"),
    [(False, False), (True, False), (False, True), pytest.param(True, True, marks=pytest.mark.slow)],
    ids=["not reentrant", "reentrant", "nested", "reentrant and nested"],
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


def test_the_same_graph_several_times_a_step() -> None:
    """Settings do not change before all of it has been computed again."""
    m, x = settled(), rows()
    run = checkpointed(compiled(m, **AUTO))
    for _ in range(30):
        found = grads(m, lambda x: run(run(x) @ torch.ones(3, 4, dtype=x.dtype)), x)
    chosen = settings_of(m)
    k = chosen[-1]
    assert chosen.count("watched") >= 4
    assert isinstance(k, int)
    torch._dynamo.reset()
    c = compiled(m, iterations=k, apply="always")
    assert relative_error(found, grads(m, lambda x: c(c(x) @ torch.ones(3, 4, dtype=x.dtype)), x)) <= 1e-12


def test_settings_wait_for_the_backward_pass() -> None:
    m, x = settled(), rows()
    run = checkpointed(compiled(m, iterations=1, apply="always"))
    few = grads(m, run, x)
    y = run(x)
    hwbp_compile.set_iterations(m, "exact")
    m.zero_grad()
    (y.square().sum() + run(x).square().sum()).backward()
    for p, one in zip(m.parameters(), few, strict=True):
        torch.testing.assert_close(p.grad, 2 * one)
    assert relative_error(grads(m, run, x), grads(m, m, x)) <= 1e-12


def test_a_forward_pass_without_a_backward_pass_holds_settings_for_a_while_only() -> None:
    m, x = settled(), rows()
    run = checkpointed(compiled(m, iterations=1, apply="always"))
    few = grads(m, run, x)
    run(x)
    hwbp_compile.set_iterations(m, "exact")
    exact = grads(m, m, x)
    found = [grads(m, run, x) for _ in range(70)]
    assert relative_error(found[0], few) <= 1e-12
    assert relative_error(found[-1], exact) <= 1e-12


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
