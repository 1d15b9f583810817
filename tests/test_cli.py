"""``python -m hwbp_compile``, and what torch's logging shows of a compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hwbp_compile.__main__ import main

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))

def stack(blocks=4):
    return nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(blocks)))

def factory():
    return stack(), (torch.randn(2, 8),)

def with_keywords():
    return stack(), (), {"input": torch.randn(2, 8)}

def no_tuple():
    return stack()

constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small_model_for_the_cli.py"
    path.write_text(MODEL)
    return path


def test_explain(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{file}:factory", "--option", "iterations=2", "-o", "gamma=0.5"]) == 0
    said = capsys.readouterr().out
    assert "1 of 1 residual chain is rewritten. (iterations=2, gamma=0.5)" in said
    assert "1 ... 4" in said


def test_json_graphs_and_a_drawing(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, graphs = tmp_path / "out.svg", tmp_path / "a" / "b"
    arguments = [
        "explain",
        f"{file}:with_keywords",
        "--json",
        "--draw",
        str(picture),
        "--graphs",
        str(graphs),
    ]
    assert main(arguments) == 0
    (chain,) = json.loads(capsys.readouterr().out)["chains"]
    assert chain["modules"] == ["1", "2", "3", "4"]
    assert picture.read_text().count("<path") > 10
    assert "aten.bmm" in (graphs / "graph0_after.txt").read_text()
    assert "aten.bmm" not in (graphs / "graph0_before.txt").read_text()


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("iterations ") and "(default 'auto')" in line for line in lines)
    assert main(["options", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gamma"]["default"] == 0.0


@pytest.mark.parametrize(
    ("spec", "arguments", "said"),
    [
        ("{file}:nothing", [], "has no 'nothing'"),
        ("{file}:constant", [], "must be a function, but is of type int"),
        ("{file}:no_tuple", [], "must return (model, args)"),
        ("{file}", [], "must be package.module:function"),
        ("missing.py:factory", [], "there is no file 'missing.py'"),
        ("no_such_package.module:factory", [], "there is no module 'no_such_package'"),
        ("{file}:factory", ["-o", "iterations"], "name=value"),
        ("{file}:factory", ["-o", "iterations=-1"], "Option iterations must be"),
        ("{file}:factory", ["-o", "itterations=1"], "did you mean 'iterations'?"),
        ("{file}:factory", ["--draw", "a.pdf"], "must end in .svg or .png"),
    ],
)
def test_mistakes(
    file: Path, spec: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", spec.format(file=file), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_as_a_program(file: Path) -> None:
    done = run(file.parent, "-m", "hwbp_compile", "explain", f"{file.stem}:factory")
    assert done.returncode == 0, done.stderr
    assert "identity" in done.stdout


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_logs_and_trace(file: Path, tmp_path: Path, codegen: str) -> None:
    script = (
        f"import torch, {file.stem} as m; model, args = m.factory(); "
        f"options = {{'codegen': '{codegen}', 'apply': 'always'}}\n"
        "torch.compile(model, backend='highway', options=options)(*args)"
    )
    traces = tmp_path / "trace"
    done = run(
        file.parent, "-c", script, TORCH_LOGS="+hwbp_compile", TORCH_TRACE=str(traces),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rewritten: a chain of 4 blocks (1 ... 4; K: identity)" in done.stderr
    assert "pass find:" in done.stderr
    written = "".join(p.read_text() for p in traces.iterdir())
    assert '"hwbp_compile_chains"' in written
    assert '"hwbp_compile_joint_graph"' in written
