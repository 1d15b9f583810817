"""What :func:`hwbp_compile.explain` returns: plain records, a table, JSON and a drawing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from .. import _compat
from ..options import Options
from .table import amount
from .text import render

if TYPE_CHECKING:
    from .roles import Roles


@dataclass(frozen=True, slots=True)
class CostReport:
    """What a backward pass takes, as far as it is counted, and the time expected of it."""

    flops: str
    """Of the products, as a formula of the shapes' symbols."""
    products: int
    depth: int
    """Products one after the other."""
    bytes: str
    """That all other kernels move, as a formula."""
    kernels: int
    seconds: float
    """Expected on this machine at the sizes of the call; of dynamic ones, at the end of their range."""

    def __str__(self) -> str:
        return (
            f"{_amount(self.flops)}FLOP in {self.products} products, {self.depth} in sequence, "
            f"{_amount(self.bytes)}B in {self.kernels} kernels: about {self.seconds * 1e3:.3g} ms"
        )


@dataclass(frozen=True, slots=True)
class SizesReport:
    """What is chosen for other values of a size that the graph leaves open, the others as they are."""

    symbol: str
    iterated: tuple[tuple[int, bool], ...]
    """Powers of two, and whether the chain is iterated for sizes above half of them, up to them."""

    def __str__(self) -> str:
        said = []
        for applied, run in groupby(self.iterated, key=lambda row: row[1]):
            sizes = [size for size, _ in run]
            to = f" to {sizes[-1]}" if len(sizes) > 1 else ""
            said.append(f"{'iterated' if applied else 'exact'} for {self.symbol} = {sizes[0]}{to}")
        return ", ".join(said)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """What the forward pass keeps for the backward pass, as Inductor's partitioner decides."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    bytes: int
    """At the sizes of the call."""

    def to_dict(self) -> dict[str, Any]:
        """The record as numbers, strings and lists."""
        return asdict(self) | {"shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class ChainReport:
    """One residual chain, or a place that looked like one."""

    blocks: int | str
    """How many blocks it has; for a recurrent layer, steps (as text where their number is symbolic)."""
    classes: tuple[int, ...]
    """How many of them share one structure, and so are computed by one batched program."""
    residual: str
    """The kind of the residual path K, such as ``"identity"`` or ``"gate"``."""
    shapes: tuple[tuple[int | str, ...], ...]
    """The shape of the hidden state, for each tensor it consists of."""
    dtypes: tuple[str, ...]
    modules: tuple[str, ...]
    """The module of each block, from the input to the loss."""
    lines: tuple[str, ...]
    """``file:line`` of the source of the first block."""
    options: Options
    """The options in force."""
    applied: bool
    """Whether it is iterated."""
    reason: str
    """Why it is not; empty if it is. Its exact backward pass may be one kernel still, see ``swept``."""
    iterations: int | None
    """How many iterations are done; None where the backward pass stays exact."""
    new_nodes: int
    """The size of the schedule that replaces its backward pass."""
    notes: tuple[str, ...] = ()
    swept: int = 0
    """For how many of its blocks one kernel computes the exact backward pass, on CPUs; 0 where none does."""
    graph: int = 0
    """Which of the call's graphs it is in."""
    over: str = "depth"
    """``"depth"``, or ``"time"`` for a recurrent layer."""
    costs: tuple[CostReport, CostReport] | None = None
    """Of the backward pass as it is and with this chain iterated, where ``apply="auto"`` compared them."""
    sizes: tuple[SizesReport, ...] = ()
    """With dynamic shapes, what is chosen for others. The rest of the report is for those of the call."""

    @property
    def shape(self) -> tuple[int | str, ...]:
        """The shape of the hidden state (of its first tensor, if there are two)."""
        return self.shapes[0] if self.shapes else ()

    @property
    def dtype(self) -> str:
        """The dtype of the hidden state (of its first tensor, if there are two)."""
        return self.dtypes[0] if self.dtypes else ""

    def to_dict(self) -> dict[str, Any]:
        """The record as numbers, strings, lists and dictionaries."""
        return {
            "blocks": self.blocks, "classes": list(self.classes), "residual": self.residual,
            "shapes": [list(s) for s in self.shapes], "dtypes": list(self.dtypes),
            "modules": list(self.modules), "lines": list(self.lines), "options": self.options.to_dict(),
            "applied": self.applied, "reason": self.reason, "iterations": self.iterations,
            "new_nodes": self.new_nodes, "notes": list(self.notes), "swept": self.swept,
            "graph": self.graph,
            "over": self.over,
            "costs": None if self.costs is None else [asdict(c) for c in self.costs],
            "sizes": [{"symbol": s.symbol, "iterated": [list(i) for i in s.iterated]} for s in self.sizes],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One joint graph (forward and backward), before and after the rewrite."""

    nodes_before: int
    nodes_after: int
    depth_before: int
    """Heavy operators (matrix products, convolutions, attention) one after the other in the backward pass."""
    depth_after: int
    seconds: dict[str, float]
    """What each pass took."""
    graph_break: str = ""
    """What ended the graph, if not the end of the call."""
    calls: int = 1
    """How often it runs in one call of the model."""
    fused: tuple[int, ...] = ()
    """How many blocks each kernel is the forward pass of."""
    before_module: GraphModule | None = field(default=None, repr=False, compare=False)
    after_module: GraphModule | None = field(default=None, repr=False, compare=False)
    roles: Roles | None = field(default=None, repr=False, compare=False)

    @property
    def before(self) -> str:
        """The joint graph in which chains are looked for, as readable code.

        It is what AOTAutograd traced, but for gradients of rows, which are joined, and memory that is written
        or read by strides.
        """
        return _code(self.before_module)

    @property
    def after(self) -> str:
        """The joint graph after the rewrite, as readable code."""
        return _code(self.after_module)

    @property
    def saved_before(self) -> tuple[SavedTensor, ...]:
        """What exact backpropagation keeps of the forward pass."""
        return _saved(self.before_module)

    @property
    def saved_after(self) -> tuple[SavedTensor, ...]:
        """What the rewritten backward pass keeps of the forward pass."""
        return _saved(self.after_module)

    def to_dict(self) -> dict[str, Any]:
        """The numbers; the graphs themselves are left out."""
        return {
            "nodes_before": self.nodes_before, "nodes_after": self.nodes_after,
            "depth_before": self.depth_before, "depth_after": self.depth_after,
            "seconds": dict(self.seconds), "graph_break": self.graph_break,
            "calls": self.calls, "fused": list(self.fused),
            "saved_before": [s.to_dict() for s in self.saved_before],
            "saved_after": [s.to_dict() for s in self.saved_after],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the backend does with a model. ``print`` it, or look at its parts."""

    chains: tuple[ChainReport, ...]
    """In the order of the forward pass."""
    notes: tuple[str, ...]
    """What concerns no chain in particular, such as graph breaks, or that no gradient is needed."""
    graphs: tuple[GraphReport, ...]
    """Joint graphs in the order of the forward pass; a graph break makes two of one."""
    options: Options
    """The options in force."""

    @property
    def before(self) -> tuple[str, ...]:
        """The text of each joint graph before the rewrite."""
        return tuple(g.before for g in self.graphs)

    @property
    def after(self) -> tuple[str, ...]:
        """The text of each joint graph after the rewrite."""
        return tuple(g.after for g in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graphs' text, ready for ``json.dumps``."""
        return {
            "options": self.options.to_dict(),
            "chains": [c.to_dict() for c in self.chains],
            "graphs": [g.to_dict() for g in self.graphs],
            "notes": list(self.notes),
        }

    def draw(self, path: str | os.PathLike[str], *, graph: int | None = None, title: str = "") -> Path:
        """Draw a backward pass before and after the rewrite, as SVG or PNG by the suffix of ``path``.

        Args:
            path: the file to write.
            graph: which of :attr:`graphs`; the one with the longest backward pass by default.
            title: a heading, such as the model's name.

        Raises:
            ImportError: matplotlib is not installed (``pip install hwbp-compile[draw]``).
            ValueError: there is no backward pass to draw, or the suffix is another one.
        """
        from .draw import draw

        return draw(self, Path(path), graph=graph, title=title)

    def __str__(self) -> str:
        return render(self)


def _amount(formula: str) -> str:
    return amount(int(formula)) if formula.isdigit() else f"({formula}) "


def _saved(gm: GraphModule | None) -> tuple[SavedTensor, ...]:
    if gm is None:
        return ()
    if _SAVED not in gm.meta:
        gm.meta[_SAVED] = tuple(_kept(gm))
    saved: tuple[SavedTensor, ...] = gm.meta[_SAVED]
    return saved


_SAVED = "hwbp_compile_saved"


def _kept(gm: GraphModule) -> Iterator[SavedTensor]:
    for name, value in _compat.saved_for_backward(gm):
        if isinstance(value, Tensor):
            shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
            size = _compat.size_hint(value.numel()) * value.dtype.itemsize
            yield SavedTensor(name, shape, str(value.dtype).removeprefix("torch."), size)


def _code(gm: GraphModule | None) -> str:
    return "" if gm is None else gm.print_readable(print_output=False)
