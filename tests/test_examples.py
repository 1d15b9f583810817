"""The demo, from its data to its plot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--quick", "--only", "gru", "--codegen", "eager", "--output", str(tmp_path / "results")]
    done = subprocess.run([sys.executable, str(DEMO), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    written = (tmp_path / "results" / "results.md").read_text()
    rows = {line.split("|")[1].strip() for line in written.splitlines() if line.startswith("|")}
    assert {"exact", "highway, exact", "k = 2"} <= rows
    assert (tmp_path / "results" / "demo.png").stat().st_size > 1000
