"""Torch's caches of compiled code: hit with the same options, missed with others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import compiled, model
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import hwbp_compile.backend as backend
from hwbp_compile import Options, monitor
from hwbp_compile.control.program import Program
from hwbp_compile.passes.record import new_records

SCRIPT = """
import sys, torch
from torch import nn
from torch._dynamo.utils import counters
k = sys.argv[1]
torch.manual_seed(0)
class R(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    def forward(self, x):
        return x + self.f(x)
m = nn.Sequential(*[R() for _ in range(5)])
options = {"iterations": k if k == "exact" else int(k), "apply": "always"}
f = torch.compile(m, backend="highway", options=options)
f(torch.randn(3, 6)).square().sum().backward()
print(sum(p.grad.abs().sum().double().item() for p in m.parameters()))
print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_caches_stay_right_when_options_change(tmp_path: Path) -> None:
    """One process after the other with a shared cache: the same options hit it, others do not."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(k: str, seed: str) -> tuple[float, int]:
        cache = str(tmp_path / "cache")
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, str(script), k], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        return float(out[-2]), int(out[-1])

    values = {k: run(k, "0")[0] for k in ("0", "2", "exact")}
    assert len(set(values.values())) == 3
    for k, value in values.items():
        again, hits = run(k, "1")
        assert again == value
        assert hits > 0


def test_identity_for_the_caches_changes_with_options_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [backend.HighwayPass(Options(iterations=k)).uuid() for k in (1, 2)]
    ids += [backend.HighwayPass(Options(iterations=1, gamma=0.5)).uuid()]
    monkeypatch.setattr(backend, "_source_hash", lambda: "other")
    ids += [backend.HighwayPass(Options(iterations=1)).uuid()]
    assert len(set(ids)) == len(ids)


@pytest.mark.slow
@pytest.mark.parametrize("iterated", [True, False])
def test_code_from_a_cache_shows_what_it_records(iterated: bool, programs: list[Program]) -> None:
    """That it was not rewritten nobody says: the first backward pass does, and not the forward passes."""
    m, x = model(3), torch.randn(5, 4, dtype=torch.float64)
    options = {"iterations": 2, "apply": "always", "min_blocks": 2 if iterated else 100}
    with fresh_cache():
        compiled(m, codegen="inductor", **options)(x).sum().backward()
        expected = [p.grad.clone() for p in m.parameters() if p.grad is not None]
        assert [(p.records, p.is_sure) for p in programs] == [(iterated, True)]
        torch._dynamo.reset()
        counters.clear()
        c = compiled(m, codegen="inductor", **options)
        ys = [c(x), c(x)]
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    (_, program) = programs
    assert (program.records, program.is_sure) == (True, False)
    for y in ys:
        m.zero_grad()
        y.sum().backward()
        assert all(torch.equal(p.grad, e) for p, e in zip(m.parameters(), expected, strict=True))
    assert (program.records, program.is_sure) == (iterated, True)
    m.zero_grad()
    c(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(m.parameters(), expected, strict=True))
    assert [len(chain.steps) for chain in monitor(m).current] == [2] * iterated


def test_results_that_are_views_say_nothing() -> None:
    """They are made again outside of the compiled function, and are differentiated before it."""
    program = Program(lambda *_: None, has_memory=True, is_sure=False)
    y = torch.randn(5, 4, requires_grad=True).t()
    program.watch([], [y, 3], new_records(torch.device("cpu"), False))
    y.sum().backward()
    assert (program.records, program.is_sure) == (True, False)


@pytest.mark.slow
def test_the_graph_that_an_input_comes_from_says_nothing() -> None:
    """It may be returned as it is; its own backward pass is another one's."""
    m = model()
    h = compiled(m)(torch.randn(5, 4, dtype=torch.float64))
    assert type(h.grad_fn).__name__ == "CompiledFunctionBackward"
    program = Program(lambda *_: None, has_memory=True, is_sure=False)
    program.watch([h], [h], new_records(torch.device("cpu"), False))
    h.sum().backward()
    assert (program.records, program.is_sure) == (True, False)


@pytest.mark.slow
def test_a_compiled_backward_pass_says_nothing(programs: list[Program]) -> None:
    """Its hooks are called while it is traced, when nothing has been recorded yet."""
    m, x = model(), torch.randn(5, 4, dtype=torch.float64)
    c = compiled(m, iterations=2, apply="always")
    c(x)
    (program,) = programs
    program.is_sure = False
    with compiled_autograd._enable(torch.compile(backend="eager")):
        c(x).sum().backward()
    assert (program.records, program.is_sure) == (True, False)
    c(x).sum().backward()
    assert (program.records, program.is_sure) == (True, True)
