"""Concatenations that hold parts of each other: made once, and sliced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import stack_op as stack_op  # the operator
from .classes import value_text
from .early import dependent_on_tangents, stacked_early
from .row_gradients import call
from .views import Row, Views, concatenated, views_of


@dataclass(frozen=True, slots=True)
class _Stack:
    """A concatenation of views of ``sources``, each the same way."""

    node: Node
    sources: tuple[Node, ...]
    views: Views
    inputs: bool
    """Whether the sources are inputs of the graph."""


def shared_stacks(graph: Graph) -> dict[Node, list[Row]]:
    """For concatenations of values known before the backward pass: the rows of another tensor that they are.

    Inputs, such as the parameters of the blocks, become the rows of one new tensor; what else is concatenated
    is taken from the longest concatenation that has it all.
    """
    late = dependent_on_tangents(graph)
    stacks = [s for n in graph.nodes if (s := _stack(n, late)) is not None]
    stacks.sort(key=lambda s: -len(s.sources))
    longest: dict[tuple[Node, str], list[tuple[_Stack, dict[Node, int]]]] = {}
    bases: dict[Node, Node] = {}
    found: dict[Node, list[Row]] = {}
    for stack in stacks:
        kind = "" if stack.inputs else str(stack.views)
        holding = [
            (each, places)
            for each, places in longest.get((stack.sources[0], kind), ())
            if all(n in places for n in stack.sources)
        ]
        if not holding:
            holding = [(stack, {n: i for i, n in enumerate(stack.sources)})]
            for n in stack.sources:
                longest.setdefault((n, kind), []).append(holding[0])
            if not stack.inputs:
                continue
        whole, places = holding[0]
        if whole.node not in bases:
            bases[whole.node] = _base(graph, whole)
        views = stack.views if stack.inputs else ()
        found[stack.node] = [Row(bases[whole.node], places[n], views) for n in stack.sources]
    return found


def _stack(node: Node, late: set[Node]) -> _Stack | None:
    parts = stacked_early(node, late)
    if not parts:
        return None
    pairs = [views_of(n) for n in parts]
    views = pairs[0][1]
    alike = all(str(v) == str(views) for _, v in pairs)
    inputs = alike and all(n.op == "placeholder" for n, _ in pairs)
    sources = tuple(n for n, _ in pairs) if alike else parts
    if len({value_text(n) for n in sources}) > 1 or len(set(sources)) < len(sources):
        return None
    if not inputs and not all(isinstance(n, int) for n in parts[0].meta["val"].shape):
        return None
    return _Stack(node, sources, views if alike else (), inputs)


def _base(graph: Graph, stack: _Stack) -> Node:
    """A tensor whose rows are the parts of a concatenation; of inputs, before any view of them."""
    if stack.inputs:
        with graph.inserting_before(stack.node):
            base = call(graph, torch.ops.hwbp_compile.stack.default, (list(stack.sources),), like=stack.node)
        # Saved for the backward pass, it would need the memory meanwhile.
        base.meta["partitioner_tag"] = "must_be_in_backward"
        return base
    parts: Any = concatenated(stack.node)
    with graph.inserting_after(stack.node):
        sizes = [len(parts), *parts[0].meta["val"].shape]
        return call(graph, torch.ops.aten.view.default, (stack.node, sizes), like=stack.node)
