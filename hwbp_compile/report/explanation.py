"""What :func:`hwbp_compile.explain` returns: plain records, a table, JSON and a drawing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from ..options import Options
from .text import render

if TYPE_CHECKING:
    from .roles import Roles


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
    """Whether its backward pass is rewritten."""
    reason: str
    """Why it is not; empty if it is."""
    iterations: int | None
    """How many iterations are done; None where the backward pass stays exact."""
    new_nodes: int
    """The size of the schedule that replaces its backward pass."""
    notes: tuple[str, ...] = ()
    graph: int = 0
    """Which of the call's graphs it is in."""
    over: str = "depth"
    """``"depth"``, or ``"time"`` for a recurrent layer."""

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
            "new_nodes": self.new_nodes, "notes": list(self.notes), "graph": self.graph,
            "over": self.over,
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
    before_module: GraphModule | None = field(default=None, repr=False, compare=False)
    after_module: GraphModule | None = field(default=None, repr=False, compare=False)
    roles: Roles | None = field(default=None, repr=False, compare=False)

    @property
    def before(self) -> str:
        """The joint graph as AOTAutograd traced it, as readable code."""
        return _code(self.before_module)

    @property
    def after(self) -> str:
        """The joint graph after the rewrite, as readable code."""
        return _code(self.after_module)

    def to_dict(self) -> dict[str, Any]:
        """The numbers; the graphs themselves are left out."""
        return {
            "nodes_before": self.nodes_before, "nodes_after": self.nodes_after,
            "depth_before": self.depth_before, "depth_after": self.depth_after,
            "seconds": dict(self.seconds), "graph_break": self.graph_break,
            "calls": self.calls,
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


def _code(gm: GraphModule | None) -> str:
    return "" if gm is None else gm.print_readable(print_output=False)
