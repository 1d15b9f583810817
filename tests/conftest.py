"""Shared settings: deterministic, one thread a test process, and nothing left behind."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from hwbp_compile.blocks import op
from hwbp_compile.control.program import Program
from hwbp_compile.control.variants import Variants
from hwbp_compile.passes import kernels
from hwbp_compile.remembered import SWITCH

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=2,
    print_blob=True,
    # Each example compiles a model, so shrinking a failure would take longer than looking at it.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("default"), max_examples=25)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)
os.environ[SWITCH] = "0"  # no test depends on what was measured before it, nor leaves what it measured


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True)
def _everything_is_worth_it(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fast on this machine at this moment decides about no test."""
    if "measured" not in request.keywords:
        monkeypatch.setattr("hwbp_compile.passes.worth.Comparison.reason", "")
        monkeypatch.setattr("hwbp_compile.passes.kernels.prefers_kernels", lambda: False)


@pytest.fixture
def kernels_op_by_op(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Blocks are kernels, and all else runs op by op, which takes no compilation; no pass may fail."""
    monkeypatch.setattr(kernels, "uses_kernels", lambda options: True)
    op._warn_once.cache_clear()
    op._of.cache_clear()
    with caplog.at_level(logging.WARNING, "hwbp_compile"):
        yield
    op._of.cache_clear()
    assert not [r for r in caplog.get_records("call") if "internal error" in r.getMessage()]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """What is compiled meanwhile."""
    found: list[Program] = []
    compile_for = Variants._compile_for

    def listed(self: Variants, *args: Any) -> Any:
        program, findings = compile_for(self, *args)
        found.append(program)
        return program, findings

    monkeypatch.setattr(Variants, "_compile_for", listed)
    return found
