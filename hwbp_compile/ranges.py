"""Ranges of the sizes that a graph leaves open: each ends at a power of two.

What is faster is decided once for each range, for the sizes at which it ends. So it does not depend on which
of them came first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from . import _compat

Range = tuple[int, ...]
"""The exponent of the power of two at which it ends, for each open size."""
Sizes = Mapping[Any, int]
"""Values of symbols."""


def named(sizes: Sizes) -> str:
    """Sizes by the names of their symbols, for people to read."""
    return ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())


def open_sizes_of(gm: GraphModule) -> OpenSizes:
    """Those of a graph that Dynamo made."""
    return OpenSizes([n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")])


class OpenSizes:
    """The sizes that a graph leaves open.

    Args:
        inputs: those that it was traced with, fake tensors and symbolic sizes.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.symbols = _compat.symbols_of(inputs)
        self._positions = tuple(s.position for s in self.symbols)

    def __bool__(self) -> bool:
        return bool(self.symbols)

    def range_of(self, args: Sequence[Any]) -> Range:
        """That of a call, which passes the sizes beside the tensors."""
        return tuple([(args[i] - 1).bit_length() for i in self._positions])

    @property
    def traced(self) -> Range:
        """That of the sizes with which the graph was traced."""
        return tuple((s.value - 1).bit_length() for s in self.symbols)

    def ends_of(self, range: Range) -> dict[Any, int]:
        """The sizes for which a range is decided: at its end, as far as the graph allows them."""
        ends = zip(self.symbols, range, strict=True)
        return {s.expression: min(max(1 << exponent, s.low), s.high) for s, exponent in ends}
