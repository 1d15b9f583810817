"""Torch's caches of compiled code: hit with the same options, missed with others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hwbp_compile.backend as backend
from hwbp_compile import Options

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
