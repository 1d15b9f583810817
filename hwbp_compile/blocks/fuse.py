"""Pass: the forward pass of equal blocks that are rewritten backward becomes one operator.

It writes what the backward pass reads of all blocks right into the stacks that are kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..errors import CannotRewrite
from ..passes.order import sort_topologically
from ..passes.restack import is_returned
from ..passes.row_gradients import call
from ..passes.views import is_view
from ..recurrent import own as own  # the operator
from .find import STACK, ForwardBlocks, find_forward_blocks
from .limits import check_bytes, check_kept, is_for_cpus, rows_within_limit
from .op import blocks_text, compile_blocks
from .program import Source, is_real, source_of, step_of


@dataclass(frozen=True)
class Fused:
    """What became of the forward pass of some equal blocks: ``reason`` is empty if it is one operator."""

    blocks: int
    reason: str


def fuse_forward(graph: Graph, *, compiles: bool) -> list[Fused]:
    """Have one kernel compute the forward pass of equal blocks that are rewritten backward.

    Args:
        graph: changed in place.
        compiles: whether the kernels are compiled, so that what cannot be is left as it is.
    """
    if not is_for_cpus(graph):
        return []
    done: list[Fused] = []
    refused: set[Node] = set()
    while (blocks := _fuse_next(graph, done, refused, compiles)) is not None:
        done.append(Fused(len(blocks.blocks), ""))
    return done


def _fuse_next(graph: Graph, done: list[Fused], refused: set[Node], compiles: bool) -> ForwardBlocks | None:
    """Fuse one run of blocks, so that others have to be found anew; what cannot be is ``refused``."""
    graph.eliminate_dead_code()  # or it would still read what comes before
    for blocks in find_forward_blocks(graph):
        if blocks.states[0] in refused:
            continue
        try:
            _fuse(graph, blocks, compiles)
        except CannotRewrite as refusal:
            refused.add(blocks.states[0])
            done.append(Fused(len(blocks.blocks), refusal.reason))
        else:
            return blocks
    return None


def _fuse(graph: Graph, blocks: ForwardBlocks, compiles: bool) -> None:
    rows = rows_within_limit(blocks.entry)
    if not all(n.meta["val"].is_contiguous() for n in blocks.states):
        raise CannotRewrite("the states are not contiguous", blocks.entry)
    check_kept(blocks.inside)
    escaping = _escaping(blocks)
    needed = _needed_for(escaping, blocks)
    emitted = [n for n in needed if n is not blocks.entry and n is not blocks.exit]
    keep = len(emitted) < len(needed) or any(
        user not in blocks.inside for n in blocks.states[1:-1] for user in n.users
    )
    sources = [source_of(blocks.column(leaf)) for leaf in blocks.leaves]
    check_bytes(rows, sources)
    step = step_of(blocks, sources, emitted, keep=keep)
    places = [s.rows for s in sources]
    text = blocks_text(step, blocks.entry.meta["val"].dtype, len(blocks.blocks), places)
    if compiles:
        compile_blocks(text)
    _Replacement(graph, blocks, emitted, keep).insert(sources, text, escaping)


def _escaping(blocks: ForwardBlocks) -> list[Node]:
    """The nodes of the template whose values are used outside of the blocks, besides the states."""

    def is_used(node: Node | None) -> bool:
        return node is not None and any(user not in blocks.inside for user in node.users)

    return [t for t in blocks.template if t is not blocks.exit and any(map(is_used, blocks.column(t)))]


def _needed_for(escaping: Sequence[Node], blocks: ForwardBlocks) -> list[Node]:
    """What the kernel has to return for these: of what is true or false, what it is computed from."""
    found: dict[Node, None] = {}
    waiting = list(escaping)
    while waiting:
        node = waiting.pop(0)
        if node is blocks.entry or is_real(node, blocks.entry):
            found.setdefault(node)
        elif _is_pointwise(node, blocks):
            waiting.extend(node.all_input_nodes)
        else:
            raise CannotRewrite(
                f"the backward pass reads {node.name}, which has no row for each of the batch", node
            )
    return list(found)


def _is_pointwise(node: Node, blocks: ForwardBlocks) -> bool:
    """Whether an operator can be applied to the stacks of its operands, which the blocks compute."""
    tags = getattr(node.target, "tags", ())
    values = [n.meta["val"] for n in (node, *node.all_input_nodes)]
    own = {*blocks.template, blocks.entry}.issuperset(node.all_input_nodes)
    shapes = {tuple(v.shape) if isinstance(v, Tensor) else None for v in values}
    return torch.Tag.pointwise in tags and own and len(shapes) == 1


class _Replacement:
    """Puts one operator, and parts of its results, in the place of the blocks."""

    def __init__(self, graph: Graph, blocks: ForwardBlocks, emitted: Sequence[Node], keep: bool) -> None:
        self._graph, self._blocks = graph, blocks
        self._emitted, self._keep = emitted, keep
        self._stacks: dict[Node, Node] = {}
        """For nodes of the template, the values of all blocks."""

    def insert(self, sources: Sequence[Source], text: str, escaping: Sequence[Node]) -> None:
        """Insert it, and have all others read its results."""
        blocks = self._blocks
        first, last = blocks.states[-1], blocks.states[0]
        (output,) = self._graph.find_nodes(op="output")
        with self._graph.inserting_before(output):
            values = [self._as_numbers(n) for s in sources for n in s.tensors]
            made = self._call(torch.ops.hwbp_compile.blocks.default, first, values, text)
            result, *others = (self._call(operator.getitem, made, i) for i in range(len(made.meta["val"])))
            self._stacks.update(zip(self._emitted, others, strict=False))
            if self._keep:
                self._keep_states(others[-1])
            for template in escaping:
                self._replace(blocks.column(template), partial(self._stack, template))
            for user in list(last.users):
                is_kept = self._keep and user.target is STACK
                if not is_kept and user not in blocks.inside:
                    user.replace_input_with(last, result)
            if self._keep:
                self._replace(blocks.states, lambda: others[-1])
        sort_topologically(self._graph)

    def _keep_states(self, states: Node) -> None:
        """Of a block the one after it, and the one before."""
        for node, start in ((self._blocks.exit, 0), (self._blocks.entry, 1)):
            end = start + len(self._blocks.blocks)
            self._stacks[node] = self._call(torch.ops.aten.slice.Tensor, states, 0, start, end)

    def _call(self, target: Any, *args: Any) -> Node:
        return call(self._graph, target, args, like=self._blocks.states[0])

    def _as_numbers(self, node: Node) -> Node:
        """With 1 and 0 for what is true or false."""
        dtype = self._blocks.entry.meta["val"].dtype
        if node.meta["val"].dtype == dtype:
            return node
        return self._call(torch.ops.prims.convert_element_type.default, node, dtype)

    def _stack(self, node: Node) -> Node:
        """Of the values of all blocks."""
        if node not in self._stacks:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), self._stack)
            self._stacks[node] = call(self._graph, node.target, args, like=node, **kwargs)
        return self._stacks[node]

    def _replace(self, column: Sequence[Node | None], stack: Callable[[], Node]) -> None:
        """Have what reads values of the blocks read these rows of a stack."""
        row = {n: i for i, n in enumerate(column) if n is not None}
        for node, i in row.items():
            for user in [u for u in node.users if u not in self._blocks.inside]:
                stacked: Any = user.args[0] if user.target is STACK else ()
                rows = [row.get(n, -1) for n in stacked]
                if rows and rows[0] >= 0 and rows == list(range(rows[0], rows[0] + len(rows))):
                    part = stack()
                    if len(rows) < len(column):
                        part = self._call(torch.ops.aten.slice.Tensor, part, 0, rows[0], rows[-1] + 1)
                    if part.meta["val"].shape != user.meta["val"].shape:
                        raise AssertionError(f"{part} cannot take the place of {user}.")
                    user.replace_all_uses_with(part)
                    self._graph.erase_node(user)
                elif node is not self._blocks.states[-1]:
                    value = self._call(torch.ops.aten.select.int, stack(), 0, i)
                    if user.op == "output" or (is_view(user) and is_returned(user)):
                        # The user may write to it, and the backward pass reads the stack.
                        value = self._call(torch.ops.hwbp_compile.own.default, value)
                    user.replace_input_with(node, value)
