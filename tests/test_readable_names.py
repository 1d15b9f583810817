"""Names of modules and lines, as a report shows them."""

from __future__ import annotations

import pytest

from hwbp_compile.report.where import readable, shorten, shorten_lines


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].h.0.attn", "h.0.attn"),
        ("L['self']", ""),
        ("L['self']._modules['h']._modules['3'].mlp", "h.3.mlp"),
        ("getattr(L['self'].h, '3').mlp", "h.3.mlp"),
        ("L['self'].h[3].mlp", "h.3.mlp"),
        ("L['self']._orig_mod.h.1", "h.1"),
        ("L['self'].h.1._checkpoint_wrapped_module.attn", "h.1.attn"),
        ("L['function'].h.1", "h.1"),
        ("G['model'].h.1", "model.h.1"),
        ("L['self']._original_module.h", "_original_module.h"),
    ],
)
def test_readable(path: str, name: str) -> None:
    assert readable(path) == name


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["h.0", "h.1", "h.2"], "h.0 ... h.2"),
        (["h.0.mlp", "h.1.mlp"], "h.0.mlp ... h.1.mlp"),
        (["h.0.a", "h.0.b", "h.1.a", "h.1.b"], "h.0 ... h.1 (a, b)"),
        (["cell", "cell", "cell"], "cell (x 3)"),
        (["left", "right"], "left, right"),
        (["", ""], "(the model itself)"),
        (["1", "2"], "1 ... 2"),
        ([], ""),
    ],
)
def test_shorten(names: list[str], short: str) -> None:
    assert shorten(names) == short


def test_shorten_lines() -> None:
    assert shorten_lines(["/a/m.py:3", "/a/m.py:4", "/a/m.py:9", "/b/n.py:1"]) == "m.py:3-4, 9; n.py:1"
