"""The backward pass of one step of a cell as a block, with its residual path found as in any other block."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import _compat
from ..chain import Block
from ..errors import CannotRewrite
from ..passes.chains import check_block
from ..passes.linear_ops import nodes_in
from ..passes.split import Split, split
from .cells import Step


@dataclass(frozen=True)
class CellGraph:
    """One step, forward and backward, as a graph, and the block that its backward is.

    ``following`` is the next carry, ``of_inputs`` and ``of_weights`` the gradients, None where there is none.
    """

    graph: Graph
    carry: tuple[Node, ...]
    inputs: tuple[Node, ...]
    weights: tuple[Node, ...]
    following: tuple[Node, ...]
    block: Block
    split: Split
    of_inputs: tuple[Node | None, ...]
    of_weights: tuple[Node | None, ...]

    @property
    def forward(self) -> Block:
        """The step forward, as a block from one carry to the next."""
        return Block(self.carry, self.following, _between(self.graph, self.carry, self.following))

    @functools.cached_property
    def signature(self) -> str:
        """Equal for graphs of the same operators in the same arrangement, whatever the sizes."""
        index = {node: i for i, node in enumerate(self.graph.nodes)}
        lines = [
            (str(n.target), [index[x] for x in n.all_input_nodes]) for n in index if n.op != "placeholder"
        ]
        return hashlib.sha256(str(lines).encode()).hexdigest()[:16]

    @functools.cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All of them, in order."""
        return tuple(self.graph.nodes)

    @functools.cached_property
    def differing(self) -> frozenset[Node]:
        """The nodes whose values differ between the steps, apart from what depends on a cotangent."""
        return self.depending_on((*self.carry, *self.inputs))

    def operators(self, among: Set[Node]) -> list[Node]:
        """Those of these nodes that compute something, in order."""
        return [n for n in self.nodes if n in among and n.op == "call_function"]

    def gradients(self, wanted: Sequence[bool]) -> list[Node]:
        """Of the inputs and weights for which one is wanted, and of which there is one."""
        found = zip((*self.of_inputs, *self.of_weights), wanted, strict=True)
        return [node for node, use in found if use and node is not None]

    def depending_on(self, sources: Sequence[Node]) -> frozenset[Node]:
        """These nodes and all that are computed from them."""
        reached = set(sources)
        for node in self.nodes:
            if any(n in reached for n in node.all_input_nodes):
                reached.add(node)
        return frozenset(reached)

    def needed_for(self, results: Sequence[Node], known: Set[Node] = frozenset()) -> frozenset[Node]:
        """These nodes and all that they are computed from, back to what is known."""
        needed = set(results)
        for node in reversed(self.nodes):
            if node in needed and node not in known:
                needed.update(node.all_input_nodes)
        return frozenset(needed)


def trace_cell(
    step: Step, carry: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> CellGraph:
    """Trace one step on tensors that are only looked at for their shapes, dtypes and devices.

    Raises:
        CannotRewrite: the backward pass of the step is not understood.
    """
    n, m, k = len(carry), len(inputs), len(weights)

    def joint(*values: Tensor) -> list[Tensor | None]:
        # Not detach(), which would leave an operator in the graph that hides what is a carry and what is not.
        arguments, cotangents = values[: n + m + k], values[n + m + k :]
        with torch.enable_grad():
            after = step(arguments[:n], arguments[n : n + m], arguments[n + m :])
            gradients = torch.autograd.grad(after, arguments, cotangents, allow_unused=True)
        return [*(x.detach() for x in after), *gradients]

    traced = _compat.trace_shapes(joint, [*carry, *inputs, *weights], [*carry])
    graph = traced.graph
    if any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in graph.nodes):
        raise CannotRewrite("a step draws random numbers")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    following, gradients = results[:n], results[n:]
    entry, exit_ = tuple(placeholders[n + m + k :]), tuple(gradients[:n])
    if not all(isinstance(node, Node) for node in exit_):
        raise CannotRewrite("a component of the next state does not depend on the state")
    block = Block(entry, exit_, _between(graph, entry, exit_))
    check_block(block)
    return CellGraph(
        graph=graph,
        carry=tuple(placeholders[:n]),
        inputs=tuple(placeholders[n : n + m]),
        weights=tuple(placeholders[n + m : n + m + k]),
        following=tuple(following),
        block=block,
        split=split(block),
        of_inputs=tuple(gradients[n : n + m]),
        of_weights=tuple(gradients[n + m :]),
    )


def _between(graph: Graph, entry: Sequence[Node], exit_: Sequence[Node]) -> tuple[Node, ...]:
    """All nodes on the way from the entry to the exit, without the entry, in graph order."""
    reached = set(entry)
    for node in graph.nodes:
        if node.op == "call_function" and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    needed: set[Node] = set()
    stack = list(exit_)
    while stack:
        node = stack.pop()
        if node in reached and node not in needed:
            needed.add(node)
            stack.extend(nodes_in((node.args, node.kwargs)))
    return tuple(node for node in graph.nodes if node in needed and node not in entry)


def linear_in(cell: CellGraph, component: int) -> tuple[Block, Split] | None:
    """The forward step of one component as a block, if it is elementwise linear in itself and in no other's.

    Such a state, like an LSTM's cell, is known from one scan once the other components are.
    """
    entry, exit_ = (cell.carry[component],), (cell.following[component],)
    block = Block(entry, exit_, _between(cell.graph, entry, exit_))
    try:
        check_block(block)
    except CannotRewrite:
        return None
    found = split(block)
    if not set(block.nodes) <= found.path:
        return None
    return block, found
