"""Parameters of tests of which some are left to the slow tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_slow(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """All names, as ``parametrize`` takes them; those in ``slow`` are marked."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]
