"""Settings that the whole process shares: none is left changed, and the user's own pass still runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor
from compare import recorded, rewritten
from small_models import D, Unbatchable, compiled, grads, model
from torch import nn
from torch._functorch import partitioners
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

from hwbp_compile import OptionError, _compat, explain
from hwbp_compile.passes.linear_ops import FIRST, LINEARITY

# Inductor itself sets this variable when a process first loads its C++ code, whatever the backend.
SET_BY_INDUCTOR = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"


def global_state() -> dict[str, Any]:
    return {
        "inductor": torch._inductor.config.get_config_copy(),
        "dynamo": torch._dynamo.config.get_config_copy(),
        "functorch": torch._functorch.config.get_config_copy(),
        "vmap": torch._C._functorch._is_vmap_fallback_enabled(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "partitioner": partitioners._size_of,
        "environment": {k: v for k, v in os.environ.items() if k != SET_BY_INDUCTOR},
    }


def check_unchanged(before: dict[str, Any]) -> None:
    after = global_state()
    for name, value in before.items():
        assert after[name] == value, name


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_no_global_setting_is_left_changed(codegen: str) -> None:
    before = global_state()
    m, x = model(), torch.randn(5, 4).double()
    grads(m, compiled(m, codegen=codegen), x)
    check_unchanged(before)


def test_the_partitioner_is_put_back_by_the_last_thread() -> None:
    before = partitioners._size_of
    with _compat._stacks_are_kept:
        others = threading.Barrier(2)

        def compile_beside() -> None:
            with _compat._stacks_are_kept:
                others.wait()
                others.wait()

        thread = threading.Thread(target=compile_beside)
        thread.start()
        others.wait()
        assert partitioners._size_of is not before
    assert partitioners._size_of is not before
    others.wait()
    thread.join()
    assert partitioners._size_of is before


def reasons(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Why a model with an operator that is linear, but cannot be batched, is left exact."""
    monkeypatch.setitem(LINEARITY, "hwbp_test::twice", FIRST)
    m, x = nn.Sequential(*[Unbatchable() for _ in range(5)]).double(), torch.randn(3, D).double()
    with recorded() as records:
        grads(m, compiled(m), x)
    return {o.reason for r in records for o in r.outcomes}


def refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    (reason,) = reasons(monkeypatch)
    assert "cannot be batched" in reason


def internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    # The innermost place, where every setting that a pass changes is changed.
    monkeypatch.setattr(torch, "vmap", fail)
    (reason,) = reasons(monkeypatch)
    assert "internal error" in reason


def wrong_option(_: pytest.MonkeyPatch) -> None:
    m, x = model(), torch.randn(5, 4).double()
    with pytest.raises(OptionError, match="did you mean 'iterations'"):
        explain(m, x, options={"iteration": 3})
    with pytest.raises(Exception, match="did you mean 'iterations'"):
        compiled(m, iteration=3)(x)


@pytest.mark.parametrize("trouble", [refusal, internal_error, wrong_option])
def test_no_global_setting_is_left_changed_by_trouble(
    trouble: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = global_state()
    trouble(monkeypatch)
    check_unchanged(before)


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_users_own_pass_in_the_configuration(codegen: str) -> None:
    m, mine = model(4), Mine()
    with torch._inductor.config.patch(joint_custom_pre_pass=mine), recorded() as records:
        grads(m, compiled(m, codegen=codegen), torch.randn(5, 4).double())
    assert mine.calls == 1
    assert len(rewritten(records)) == 1


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_users_own_pass_as_an_option(codegen: str) -> None:
    m, mine = model(4), Mine()
    with fresh_cache(), recorded() as records:  # no pass is called where code comes from a cache
        grads(m, compiled(m, codegen=codegen, joint_custom_pre_pass=mine), torch.randn(5, 4).double())
    assert mine.calls == 1
    assert len(rewritten(records)) == 1


class Mine(CustomGraphPass):
    """A user's pass."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "mine"
