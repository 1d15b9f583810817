"""Draw a backward pass before and after the rewrite: long and thin, then short and tall.

A node is a bar. Its place to the right is the length of the longest path that leads to it, so a figure is
as wide as the backward pass is sequential. Its height is the number of blocks it computes at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch.fx import Node

from ..passes.linear import linear_part
from ..passes.linear_ops import is_heavy, op_name
from ..stage import GRADIENTS, INSIDE, RESIDUAL, SWEEP, stage_of
from .layout import Box, place
from .roles import STACKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .explanation import Explanation, GraphReport

OUTSIDE = "outside of the chains"

INK, QUIET, EDGE = "#22272e", "#6b7280", "#9aa3af"
FIXED = {
    OUTSIDE: "#b8c0cc",
    GRADIENTS: "#8fbf9f",
    STACKING: "#d9b98a",
    RESIDUAL: "#e4572e",
    INSIDE: "#7a5195",
    SWEEP: "#2a6f97",
}
CHAIN_MAPS = ("viridis", "magma", "cividis", "plasma")
ITERATION_MAPS = ("Blues", "Purples", "Greens", "Oranges")
MANY = 4000
"""So many nodes are drawn without gaps, and their edges as pixels, also in an SVG."""

SCHEDULE = ("iteration", RESIDUAL, INSIDE, SWEEP)
"""Kinds of nodes that compute all blocks at once, and wait for one another."""

Role = tuple[str, int, int]
"""A kind, and for blocks and iterations the chain and the number."""


def draw(explanation: Explanation, path: Path, *, graph: int | None = None, title: str = "") -> Path:
    """See :meth:`.explanation.Explanation.draw`."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"The file must end in .svg or .png, but is {path.name!r}.")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install hwbp-compile[draw]") from error
    report = _choose(explanation, graph)
    before, after = (
        _picture(report, explanation, rewritten=False),
        _picture(report, explanation, rewritten=True),
    )
    columns = max(before.columns, after.columns)
    heights = [min(max(0.055 * p.extent, 1.5), 7.0) for p in (before, after)]
    width = min(max(columns * 0.09, 11.0), 16.0)
    head, gap, foot = 0.95 if title else 0.5, 0.7, 1.2
    height = head + sum(heights) + gap + foot
    figure = Figure(figsize=(width, height), facecolor="white")
    tops = (height - head, foot + heights[1])
    axes = [
        figure.add_axes((0.02, (top - size) / height, 0.96, size / height))
        for top, size in zip(tops, heights, strict=True)
    ]
    for axis, picture in zip(axes, (before, after), strict=True):
        _paint(axis, picture, columns)
    axes[1].set_xlabel(
        "operators on the longest path from the loss; "
        "a bar is as high as the number of blocks it computes at once",
        color=QUIET,
        fontsize=9,
    )
    _headings(figure, axes, report, (before, after), _how(explanation, report), title)
    _legend(figure, (before, after))
    # The same graph gives the same file, so that a drawing can be kept under version control.
    with rc_context({"svg.hashsalt": "hwbp_compile"}):
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _choose(explanation: Explanation, graph: int | None) -> GraphReport:
    if graph is not None and not 0 <= graph < len(explanation.graphs):
        raise ValueError(f"There is no graph {graph}: the call has {len(explanation.graphs)}.")
    candidates = explanation.graphs if graph is None else explanation.graphs[graph : graph + 1]
    report = max(candidates, key=lambda g: g.depth_before, default=None)
    if report is None or report.before_module is None or not linear_part(report.before_module.graph).order:
        raise ValueError("There is no backward pass to draw.")
    return report


@dataclass(frozen=True)
class _Picture:
    """Everything about one of the two graphs that is drawn."""

    boxes: dict[str, Box]
    dag: nx.DiGraph
    roles: dict[str, Role]
    heavy: frozenset[str]
    labels: dict[Role, str]
    """Names of blocks and iterations, written below their columns."""
    sizes: dict[int, int]
    """Blocks or iterations of each chain."""
    stacked: int
    """How many operators put the saved values of all blocks together. They wait for nothing."""

    @property
    def columns(self) -> int:
        return 1 + max(b.column for b in self.boxes.values())

    @property
    def extent(self) -> float:
        boxes = self.boxes.values()
        return max(b.bottom + b.height for b in boxes) - min(b.bottom for b in boxes)


def _picture(report: GraphReport, explanation: Explanation, *, rewritten: bool) -> _Picture:
    gm = report.after_module if rewritten else report.before_module
    assert gm is not None
    assert report.roles is not None
    named: dict[str, Role] = {}
    labels: dict[Role, str] = {}
    if rewritten:
        for name, (chain, role) in report.roles.schedule.items():
            named[name] = ("iteration", chain, role) if isinstance(role, int) else (role, chain, 0)
            if isinstance(role, int):
                labels[named[name]] = f"iteration {role}"
    there = {node.name for node in gm.graph.nodes}
    exact = {i for i, chain in enumerate(explanation.chains) if not chain.applied}
    for name, (chain, block) in report.roles.blocks.items():
        if not rewritten or (chain in exact and name in there):
            named.setdefault(name, ("block", chain, block))
            modules = explanation.chains[chain].modules
            labels[named[name]] = modules[block] if block < len(modules) else ""
    sizes: dict[int, int] = {}
    for kind, chain, number in named.values():
        if kind in ("block", "iteration"):
            sizes[chain] = max(sizes.get(chain, 0), number + (kind == "block"))
    dependent = linear_part(gm.graph).order
    nodes = [n for n in gm.graph.nodes if n in dependent]
    dag = _dag(nodes)
    roles = _complete(dag, named)
    blocks = {i: int(c.blocks) for i, c in enumerate(explanation.chains) if c.over == "depth"}
    heights = {n.name: _height(n, roles[n.name], blocks) for n in nodes}
    boxes = place(
        dag,
        heights,
        lane=lambda name: "below" if roles[name][0] == GRADIENTS else "main",
        late=lambda name: roles[name][0] in SCHEDULE,
    )
    heavy = frozenset(n.name for n in nodes if is_heavy(n))
    stacked = sum(role[0] == STACKING for role in named.values())
    return _Picture(boxes, dag, roles, heavy, labels, sizes, stacked)


def _dag(nodes: Iterable[Node]) -> nx.DiGraph:
    dag: nx.DiGraph[Any] = nx.DiGraph()
    for node in nodes:
        dag.add_node(node.name)
        dag.add_edges_from((n.name, node.name) for n in node.all_input_nodes if n.name in dag)
    return dag


def _complete(dag: nx.DiGraph, named: dict[str, Role]) -> dict[str, Role]:
    """A role for every node: what leads to no chain any more only computes gradients."""
    roles: dict[str, Role] = {}
    leads: dict[str, bool] = {}
    for name in reversed(list(nx.topological_sort(dag))):
        leads[name] = name in named or any(leads[n] for n in dag.successors(name))
        roles[name] = named.get(name, (OUTSIDE if leads[name] else GRADIENTS, 0, 0))
    return roles


def _height(node: Node, role: Role, blocks: Mapping[int, int]) -> float:
    """How many blocks a node of a schedule computes at once: the rows of its stack."""
    value = node.meta.get("val")
    if stage_of(node) is None or not isinstance(value, torch.Tensor) or value.dim() == 0:
        return 1.0
    if op_name(node) in ("getitem", "aten::select") or not isinstance(value.shape[0], int):
        return 1.0
    return float(max(1, min(value.shape[0], blocks[role[1]])))


def _colour(role: Role, sizes: Mapping[int, int]) -> Any:
    from matplotlib import colormaps

    kind, chain, number = role
    if kind == "block":
        return colormaps[CHAIN_MAPS[chain % len(CHAIN_MAPS)]](0.12 + 0.76 * number / max(sizes[chain] - 1, 1))
    if kind == "iteration":
        return colormaps[ITERATION_MAPS[chain % len(ITERATION_MAPS)]](
            0.4 + 0.5 * number / max(sizes[chain], 1)
        )
    return FIXED[kind]


def _paint(axis: Axes, picture: _Picture, columns: int) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    boxes, many = picture.boxes, len(picture.boxes) > MANY
    half = 0.48 if many else 0.4
    lines = [
        ((boxes[a].column + half, boxes[a].middle), (boxes[b].column - half, boxes[b].middle))
        for a, b in picture.dag.edges
    ]
    axis.add_collection(
        LineCollection(lines, colors=EDGE, linewidths=0.4, alpha=0.35, zorder=1, rasterized=many)
    )
    for heavy in (False, True):
        names = [n for n in boxes if (n in picture.heavy) is heavy]
        rectangles = [_rectangle(boxes[n], half) for n in names]
        colours = [_colour(picture.roles[n], picture.sizes) for n in names]
        edge, width = (INK, 0.7) if heavy else ("white", 0.0 if many else 0.2)
        axis.add_collection(
            PolyCollection(
                rectangles, facecolors=colours, edgecolors=edge, linewidths=width, zorder=2 + heavy
            )
        )
    low = min(b.bottom for b in boxes.values())
    high = max(b.bottom + b.height for b in boxes.values())
    # The names of the blocks take a third of an inch.
    unit = (high - low + 1) / (axis.get_window_extent().height / axis.figure.dpi - 0.5)
    if picture.stacked:
        _paint_stacking(axis, picture)
    axis.set_xlim(-3.2, columns)
    axis.set_ylim(low - 0.4 * unit, high + 0.1 * unit)
    _label_columns(axis, picture, low - 0.12 * unit)
    axis.set_yticks([])
    axis.tick_params(colors=QUIET, labelsize=8, length=2)
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(EDGE)


def _paint_stacking(axis: Axes, picture: _Picture) -> None:
    """One bar for all operators that stack: each is read in every iteration, at once from the start."""
    tallest = max(box.height for box in picture.boxes.values())
    axis.bar(-2.2, tallest, width=0.8, bottom=-tallest / 2, color=FIXED[STACKING], zorder=2)


def _rectangle(box: Box, half: float) -> list[tuple[float, float]]:
    left, right, top = box.column - half, box.column + half, box.bottom + box.height
    return [(left, box.bottom), (right, box.bottom), (right, top), (left, top)]


def _label_columns(axis: Axes, picture: _Picture, below: float) -> None:
    """A strip in the colour of each block or iteration, with its name, under the columns it takes."""
    spans: dict[Role, tuple[int, int]] = {}
    for name, role in picture.roles.items():
        if role in picture.labels:
            column = picture.boxes[name].column
            low, high = spans.get(role, (column, column))
            spans[role] = min(low, column), max(high, column)
    shared = _shared_prefix([label for role, label in picture.labels.items() if role[0] == "block"])
    free = -1.0
    for role, (low, high) in sorted(spans.items(), key=lambda item: item[1]):
        colour = _colour(role, picture.sizes)
        axis.plot(
            [low - 0.4, high + 0.4],
            [below, below],
            color=colour,
            linewidth=4,
            solid_capstyle="butt",
            zorder=4,
        )
        label = picture.labels[role]
        label = label.removeprefix(shared) if role[0] == "block" else label
        width = _text_columns(axis, label)
        middle = (low + high) / 2
        if label and middle - width / 2 > free:
            axis.annotate(
                label, (middle, below), xytext=(0, -4), textcoords="offset points",
                ha="center", va="top", fontsize=7, color=INK,
            )  # fmt: skip
            free = middle + width / 2


def _text_columns(axis: Axes, text: str) -> float:
    """Roughly how many columns a label takes."""
    low, high = axis.get_xlim()
    inches = axis.get_window_extent().width / axis.figure.dpi
    return (0.055 * len(text) + 0.05) * (high - low) / inches


def _shared_prefix(labels: list[str]) -> str:
    """What all names begin with, but for its last part: ``transformer.`` of ``transformer.h.0``."""
    parts = [label.split(".")[:-1] for label in labels]
    prefix: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return "".join(f"{part}." for part in prefix[:-1])


def _how(explanation: Explanation, report: GraphReport) -> str:
    """What became of the chains of a graph."""
    roles = [] if report.roles is None else list(report.roles.schedule.values())
    if any(isinstance(role, int) or role == RESIDUAL for _, role in roles):
        return "all blocks at once in every iteration"
    swept = [explanation.chains[number] for number, role in roles if role == SWEEP]
    if not swept:
        return "nothing is rewritten"
    are_whole = all(chain.swept == chain.blocks for chain in swept)
    return f"one kernel for {'all' if are_whole else 'many'} blocks of a chain"


def _headings(
    figure: Figure, axes: Any, report: GraphReport, pictures: tuple[_Picture, _Picture], how: str, title: str
) -> None:
    before, after = pictures
    texts = (
        ("Before", report.depth_before, before.columns, "one block after the other"),
        ("After", report.depth_after, after.columns, how),
    )
    for axis, (name, heavy, deep, how) in zip(axes, texts, strict=True):
        axis.set_title(
            f"{name}: {heavy} heavy operators in sequence, {deep} operators deep; {how}",
            loc="left", fontsize=10.5, color=INK, pad=8,
        )  # fmt: skip
    if title:
        top = 1 - 0.2 / figure.get_figheight()
        figure.text(0.02, top, title, ha="left", va="top", fontsize=14, fontweight="bold", color=INK)


def _legend(figure: Figure, pictures: tuple[_Picture, _Picture]) -> None:
    from matplotlib.patches import Patch

    entries: dict[str, Any] = {}
    for picture in pictures:
        for role in sorted(set(picture.roles.values())):
            kind, chain, _ = role
            if kind == "block":
                entries[f"chain {chain + 1}, block by block"] = _colour(
                    (kind, chain, picture.sizes[chain] // 2), picture.sizes
                )
            elif kind == "iteration":
                middle = (kind, chain, (picture.sizes[chain] + 1) // 2)
                entries[f"iterations of chain {chain + 1}"] = _colour(middle, picture.sizes)
            else:
                entries[kind] = _colour(role, picture.sizes)
    if any(picture.stacked for picture in pictures):
        entries["saved values of all blocks, stacked"] = FIXED[STACKING]
    handles = [Patch(facecolor=colour, label=label) for label, colour in entries.items()]
    handles.append(Patch(facecolor="white", edgecolor=INK, label="heavy operator"))
    figure.legend(
        handles=handles, loc="lower left", ncols=4, frameon=False, fontsize=8, labelcolor=INK,
        bbox_to_anchor=(0.012, 0.0),
    )  # fmt: skip
