"""Drawings: the layout, what is told apart in it, and that files come out."""

from __future__ import annotations

import builtins
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from explained_models import Mlp

from hwbp_compile import explain
from hwbp_compile.report.draw import OUTSIDE, _picture
from hwbp_compile.report.explanation import Explanation
from hwbp_compile.report.layout import place
from hwbp_compile.report.roles import STACKING
from hwbp_compile.stage import GRADIENTS, INSIDE, RESIDUAL, stage_of

BLOCKS = 8


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return explain(Mlp(BLOCKS), torch.randn(2, 8), options={"iterations": 2, "apply": "always"})


def kinds(explanation: Explanation, *, rewritten: bool) -> set[Any]:
    roles = _picture(explanation.graphs[0], explanation, rewritten=rewritten).roles.values()
    return {(kind, number) if kind in ("block", "iteration") else kind for kind, _, number in roles}


def test_a_chain_is_long_and_then_short(explanation: Explanation) -> None:
    before = _picture(explanation.graphs[0], explanation, rewritten=False)
    after = _picture(explanation.graphs[0], explanation, rewritten=True)
    assert after.columns < before.columns
    assert max(b.height for b in before.boxes.values()) == 1
    assert max(b.height for b in after.boxes.values()) == BLOCKS


def test_what_is_told_apart(explanation: Explanation) -> None:
    assert kinds(explanation, rewritten=False) == {*(("block", i) for i in range(BLOCKS)), OUTSIDE, GRADIENTS}
    assert kinds(explanation, rewritten=True) == {
        ("iteration", 1),
        ("iteration", 2),
        RESIDUAL,
        OUTSIDE,
        GRADIENTS,
    }
    assert any(role == STACKING for _, role in explanation.graphs[0].roles.schedule.values())


def test_every_iteration_has_the_same_operators() -> None:
    explanation = explain(Mlp(BLOCKS), torch.randn(2, 8), options={"iterations": 3})
    graph = explanation.graphs[0]
    targets: dict[Any, list[str]] = {}
    for node in graph.after_module.graph.nodes:
        if isinstance(number := stage_of(node), int):
            targets.setdefault(number, []).append(str(node.target))
    assert set(targets) == {1, 2, 3}
    assert sorted(targets[1]) == sorted(targets[2]) == sorted(targets[3])


def test_groups_end_with_a_sweep_inside() -> None:
    explanation = explain(Mlp(6), torch.randn(2, 8), options={"iterations": 2, "group_size": 2})
    assert kinds(explanation, rewritten=True) >= {("iteration", 1), ("iteration", 2), INSIDE}


def test_a_chain_that_stays_exact_is_drawn_by_block_twice() -> None:
    explanation = explain(Mlp(3), torch.randn(2, 8))
    assert kinds(explanation, rewritten=True) == kinds(explanation, rewritten=False)
    assert ("block", 2) in kinds(explanation, rewritten=True)


def test_layout() -> None:
    dag = nx.DiGraph([("a", "b"), ("b", "c"), ("c", "d"), ("x", "d"), ("b", "leaf")])
    heights = dict.fromkeys(dag, 1.0) | {"c": 3.0}
    boxes = place(dag, heights, lambda n: "below" if n == "leaf" else "main", late=lambda n: n == "x")
    assert {n: b.column for n, b in boxes.items()} == {"a": 0, "b": 1, "c": 2, "leaf": 2, "x": 2, "d": 3}
    assert boxes["c"].height == 3
    column = sorted((boxes[n] for n in ("c", "leaf", "x")), key=lambda b: b.bottom)
    assert column[0] is boxes["leaf"]
    assert all(low.bottom + low.height < high.bottom for low, high in pairwise(column))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_files(explanation: Explanation, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"backward{suffix}"
    assert explanation.draw(path, title="a stack of blocks") == path
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        ElementTree.parse(path)
        text = path.read_text()
        assert all(f"<!-- {said} -->" in text for said in ("a stack of blocks", "h.7", "iteration 2"))


def test_nothing_is_left_in_pyplot(explanation: Explanation, tmp_path: Path) -> None:
    import matplotlib

    backend = matplotlib.rcParams["backend"]
    explanation.draw(tmp_path / "a.png")
    assert matplotlib.rcParams["backend"] == backend


def test_mistakes(explanation: Explanation, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .svg or .png, but is 'a.pdf'"):
        explanation.draw(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="no graph 3"):
        explanation.draw(tmp_path / "a.svg", graph=3)
    frozen = explain(Mlp(2).requires_grad_(False), torch.randn(2, 8))
    with pytest.raises(ValueError, match="no backward pass"):
        frozen.draw(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(
    explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match=r"pip install hwbp-compile\[draw\]"):
        explanation.draw(tmp_path / "a.svg")


@pytest.mark.slow
def test_thousands_of_nodes(tmp_path: Path) -> None:
    explanation = explain(Mlp(160), torch.randn(2, 8))
    assert explanation.graphs[0].nodes_before > 3000
    start = time.perf_counter()
    explanation.draw(tmp_path / "a.svg")
    assert time.perf_counter() - start < 20
