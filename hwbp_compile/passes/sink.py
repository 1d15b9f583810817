"""Stacks of values that are known before the backward pass: as few as possible, of as little as possible.

A schedule stacks what the blocks read. Many of these values are elementwise functions of others: of a GELU's
argument the backward pass needs the function and its derivative. Stacked block by block they are as many
copies, in kernels with hundreds of arguments; so the functions are applied to stacks instead, of values that
are chosen for the fewest bytes. Only these stacks are kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from ..errors import CannotRewrite
from .batch import Stacked, stacked
from .classes import form, value_text
from .early import Column, dependent_on_tangents, stacked_early
from .emit import in_place_of
from .equal_values import first_of_equals
from .graft import graft
from .linear_ops import nodes_in, op_name
from .order import sort_topologically
from .replay import COMMUTE, Replay
from .rows import gather
from .views import views_of

_A_STACK, _AN_INPUT = 1 << 16, 1 << 13
"""What it takes to make a stack beside moving it, and to hand an input of the graph to the backward pass, in
bytes moved meanwhile."""
_SPLITS = {"aten::split", "aten::split_with_sizes", "aten::unbind"}
_VIEWS = {"aten::expand", "aten::squeeze", "aten::unsqueeze", *COMMUTE, *_SPLITS}
_CASTS = {"prims::convert_element_type"}


def sink_stacks(graph: Graph) -> int:
    """Have elementwise functions and views applied to stacks instead of stacking their results; how many."""
    late = dependent_on_tangents(graph)
    first = first_of_equals(graph)
    targets = {
        n: tuple(map(first.__getitem__, column)) for n in graph.nodes if (column := stacked_early(n, late))
    }
    columns = _Columns(targets.values(), first)
    cut = columns.cut()
    if all(column in cut for column in targets.values()):
        return 0
    return _replace(graph, targets, columns, cut)


class _Columns:
    """The columns that some are computed from, as a graph: each can be stacked, or computed of its operands.

    Args:
        targets: what is to be there in the end.
        first: of nodes with equal values the one to take.
    """

    def __init__(self, targets: Collection[Column], first: Mapping[Node, Node]) -> None:
        self._targets = list(dict.fromkeys(targets))
        self._first = first
        self.operands: dict[Column, list[Column]] = {}
        self.wholes: dict[Column, Column] = {}
        """Of columns that are rows of longer ones: these, which are their operands."""
        holding: dict[Node, Column] = {}
        # Longest first: what others are rows of.
        waiting = {column: len(column) for column in self._targets}
        while waiting:
            column = max(waiting, key=waiting.__getitem__)
            del waiting[column]
            if column in self.operands:
                continue
            others = {holding[n] for n in column if n in holding}
            whole = next(iter(others), ())
            operands: list[Column] = []
            if whole and set(column) <= set(whole) and len(set(column)) == len(column):
                self.wholes[column] = whole
                operands = [whole]
            elif not others:  # with some rows of another one, it is the same values of other blocks
                operands = self._operands_of(column)
                holding.update(dict.fromkeys(column, column))
            self.operands[column] = operands
            waiting.update((c, len(c)) for c in operands)

    def cut(self) -> set[Column]:
        """The columns to stack, for the least cost of all together."""
        if not self._targets:
            return set()
        flow: Any = nx.DiGraph()
        for column, operands in self.operands.items():
            flow.add_edge(("in", column), ("out", column), capacity=_cost(column))
            for each in operands:
                flow.add_edge(("out", each), ("in", column))
            if not operands:
                flow.add_edge("source", ("in", column))
        for column in self._targets:
            flow.add_edge(("out", column), "sink")
        # Of equal cuts, the one next to the sink: nothing is computed again that need not be.
        _, (before, after) = nx.minimum_cut(flow, "source", "sink")
        return {c for c in self.operands if ("in", c) in before and ("out", c) in after}

    def _operands_of(self, column: Column) -> list[Column]:
        """Column by column, if it is one elementwise function or view of other columns."""
        template = column[0]
        if not _is_applied_to_stacks(template) or len(set(map(form, column))) > 1:
            return []
        rows = ([self._first[operand] for operand in nodes_in((n.args, n.kwargs))] for n in column)
        operands = list(zip(*rows, strict=True))
        return operands if all(map(_is_alike, operands)) else []


def _is_applied_to_stacks(node: Node) -> bool:
    """Whether an operator does the same to each row of a stack."""
    name, tags = op_name(node), getattr(node.target, "tags", ())
    if node.op != "call_function":
        return False
    if name == "getitem":
        return op_name(node.all_input_nodes[0]) in _SPLITS
    elementwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    view = name in _VIEWS and node.target is not torch.ops.aten.view.dtype
    return elementwise or view or name in _CASTS


def _is_alike(column: Column) -> bool:
    """Whether values can be stacked, are one for all, or have parts that can be stacked."""
    tensors = all(isinstance(n.meta.get("val"), Tensor) for n in column)
    parts = all(n.op == "call_function" and op_name(n) in _SPLITS for n in column)
    return len({value_text(n) for n in column}) == 1 and (tensors or parts or len(set(column)) == 1)


def _cost(column: Column) -> float:
    value = column[0].meta.get("val")
    if len(set(column)) == 1:
        return 0
    if not isinstance(value, Tensor):
        return math.inf  # several tensors: each of them can be stacked
    sources = [views_of(n)[0] for n in column]
    if all(n.op == "placeholder" for n in sources):  # they are there anyway; views of them are no better
        return _A_STACK + len(column) * _AN_INPUT + (sources != list(column))
    return _A_STACK + len(column) * _compat.size_hint(value.numel()) * value.element_size()


class _Sunk(Replay[Column]):
    """Evaluates columns: those in ``cut`` by stacking the values of their nodes."""

    def __init__(self, columns: _Columns, cut: Collection[Column], value: Callable[[Node], Any]) -> None:
        super().__init__()
        self._columns, self._cut, self._outer = columns, cut, value

    def node(self, key: Column) -> Node:
        return key[0]

    def operands(self, key: Column) -> list[Column]:
        return self._columns.operands[key]

    def members(self, key: Column) -> int:
        return len(key)

    def is_leaf(self, key: Column) -> bool:
        return key in self._cut or key in self._columns.wholes

    def leaf(self, key: Column) -> Any:
        if key not in self._cut:
            whole = self._columns.wholes[key]
            place = {n: i for i, n in enumerate(whole)}
            return Stacked(gather(stacked(self.value(whole), len(whole)), [place[n] for n in key]))
        if len(set(key)) == 1:
            return self._outer(key[0])
        return Stacked(torch.stack([self._outer(n) for n in key]))


def _replace(graph: Graph, targets: dict[Node, Column], columns: _Columns, cut: Collection[Column]) -> int:
    inputs = list(dict.fromkeys(n for column in cut for n in column))

    done: list[Node] = []

    def evaluate(*values: Any) -> list[Tensor]:
        replay = _Sunk(columns, cut, dict(zip(inputs, values, strict=True)).__getitem__)
        found = []
        for node, column in targets.items():
            with suppress(CannotRewrite):  # this one stays as it is
                found.append(in_place_of(node, stacked(replay.value(column), len(column)).flatten(0, 1)))
                done.append(node)
        return found

    traced = _compat.trace(evaluate, [n.meta["val"] for n in inputs])
    traced.graph.eliminate_dead_code()
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        _, results = graft(graph, traced, inputs)
    for node, result in zip(done, results, strict=True):
        node.replace_all_uses_with(result)
    sort_topologically(graph)
    graph.eliminate_dead_code()
    return len(done)
