"""One step of a recurrence as a graph of its own: what has to be done one step after the other, and no more.

What is needed of the steps afterwards is returned by the kernel along with the states, as far as it has to
be: what a few additions and multiplications give is computed again where it is used, since reading memory
takes longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..errors import CannotRewrite
from ..passes.linear_ops import op_name
from ..passes.program import canonical_order, externals_of
from ..passes.replay import COMMUTE
from .cell_graph import CellGraph
from .step_operators import aten

ROWS = 7919
"""Stands for the size of the batch while a step is traced; a prime that no layer has as its width."""

_CHEAP = aten(
    "add sub rsub mul neg where square relu abs maximum minimum eq ne lt le gt ge logical_and logical_or "
    "logical_not bitwise_and bitwise_or bitwise_not clamp clamp_min clamp_max addcmul "
    "alias clone detach view _unsafe_view reshape unsqueeze squeeze "
    "permute transpose t expand"
) | {"prims::fma", "prims::view_of"}
_PARTS = aten("split split_with_sizes slice select unbind")


@dataclass(frozen=True, slots=True)
class StepProgram:
    """Its placeholders are the state, then what differs between the steps, then what they share."""

    graph: Graph
    """Returns the next state, then what is emitted, then what is summed."""
    carry: tuple[Node, ...]
    inputs: tuple[Node, ...]
    shared: tuple[Node, ...]
    read: tuple[int, ...]
    """Where in the cell's graph the nodes are that ``inputs``, without the added ones, stand for."""
    read_shared: tuple[int, ...]
    emitted: tuple[int, ...]
    """Where in the cell's graph the nodes are whose values are returned for each step."""
    sums: tuple[int, ...] = ()
    """Where the nodes are whose sum over all rows and steps is returned."""
    keep: bool = True
    """Whether all states are returned, or the last ones only."""

    @property
    def results(self) -> tuple[tuple[Node, ...], tuple[Node, ...], tuple[Node, ...]]:
        """Of the graph: the next state, what is emitted, and what is summed."""
        (outputs,) = next(n for n in self.graph.nodes if n.op == "output").args
        n, m = len(self.carry), len(self.carry) + len(self.emitted)
        return tuple(outputs[:n]), tuple(outputs[n:m]), tuple(outputs[m:])

    @staticmethod
    def shape(node: Node) -> tuple[int, ...]:
        """The shape of a value in the graph."""
        return tuple(node.meta["val"].shape)


LARGEST_MATRIX = 1 << 18
"""Elements of a matrix up to which a kernel multiplies with it: it is to stay in the second-level cache."""
MOST_SUMMED = 1 << 16
"""Elements of all sums together: a thread has them in its second-level cache."""


NARROWEST = 32
"""Columns of an input up to which its products are made with the steps."""


def forward_program(
    cell: CellGraph, *, emit: bool, rows: bool = True, on_the_way: bool = False
) -> StepProgram:
    """The step from one state of a cell to the next. With ``emit``, the backward pass needs no more of it.

    Args:
        cell: one step.
        emit: see above.
        rows: whether the cell was traced with :data:`ROWS` rows, which are independent.
        on_the_way: multiply inputs of few columns with the steps, so that the wide result of all of them is
            never in memory. Otherwise one product is made for all steps.
    """
    block = cell.forward
    order = canonical_order(block)
    needed = [n for n in (*cell.block.exit, *cell.of_inputs, *cell.of_weights) if n is not None]
    emitted = _anchors(_used_by(needed, set(order)), set(order), rows) if emit else []
    before, read = _with_what_is_cheap(cell, externals_of(block), {*cell.inputs}, on_the_way)
    return _program(cell, block.entry, [*before, *order], read, block.exit, emitted)


def backward_program(
    cell: CellGraph,
    added: Sequence[bool],
    wanted: Sequence[bool],
    *,
    rows: bool = True,
    on_the_way: bool = True,
) -> StepProgram:
    """The step from one cotangent of a cell's state to the one before: exact backpropagation through time.

    Args:
        cell: one step.
        added: per component of the state, whether a cotangent joins from outside; the last of the inputs.
        wanted: per input and weight, whether its gradient is.
        rows: see :func:`forward_program`.
        on_the_way: compute as many gradients as possible with the steps, so that no cotangent has to be kept.
            Otherwise all of them are left for later, when a product is one for all steps. And see
            :func:`forward_program`.
    """
    n = len(cell.inputs)
    dependent = cell.depending_on(cell.block.entry)
    sums: dict[Node, None] = {}
    emitted: dict[Node, None] = {}
    rest: list[Node] = []
    size = 0
    for i, (gradient, use) in enumerate(zip((*cell.of_inputs, *cell.of_weights), wanted, strict=True)):
        if not use or gradient is None:
            continue
        if not on_the_way:
            rest.append(gradient)
            continue
        terms = None if i < n else _summed(gradient, dependent)
        extra = sum(t.meta["val"].numel() for t in terms or () if t not in sums)
        if i < n and gradient in dependent and _can_be_returned(gradient, rows) and not _is_large(gradient):
            emitted.setdefault(gradient)
        elif terms is not None and size + extra <= MOST_SUMMED:
            size += extra
            sums.update(dict.fromkeys(terms))
        else:
            rest.append(gradient)
    roots = [*cell.block.exit, *emitted, *(o for s in sums for o in s.all_input_nodes)]
    order = _needed_for(roots, dependent)
    emitted.update(dict.fromkeys(_anchors(_used_by(rest, set(order)), set(order), rows)))
    outside = [o for node in (*order, *sums) for o in node.all_input_nodes if o not in dependent]
    known = {cell.nodes[i] for i in forward_program(cell, emit=True, rows=rows).emitted} | {
        *cell.carry,
        *cell.inputs,
    }
    before, read = _with_what_is_cheap(cell, list(dict.fromkeys(outside)), known, on_the_way)
    entry = cell.block.entry
    body = [*before, *(x for x in order if x not in entry)]
    return _program(cell, entry, body, read, cell.block.exit, [*emitted], added, [*sums], bool(rest))


def _is_large(gradient: Node) -> bool:
    """Whether an input's gradient is a product with a matrix that is too large for a kernel."""
    node = gradient
    while node.op == "call_function" and op_name(node) in COMMUTE:
        (node,) = node.all_input_nodes
    return any(_size(n) > LARGEST_MATRIX for n in node.all_input_nodes)


def _size(node: Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, Tensor) and ROWS not in value.shape else 0


def _needed_for(roots: Sequence[Node], inside: Set[Node]) -> list[Node]:
    """All nodes of ``inside`` that the roots are computed from, operands first."""
    order: dict[Node, None] = {}
    stack = [(n, False) for n in reversed(roots) if n in inside]
    while stack:
        node, done = stack.pop()
        if done:
            order.setdefault(node)
        elif node not in order:
            stack.append((node, True))
            stack.extend((n, False) for n in reversed(node.all_input_nodes) if n in inside and n not in order)
    return list(order)


def _summed(gradient: Node, dependent: Set[Node]) -> list[Node] | None:
    """What a weight's gradient is the sum over rows of; None if it is nothing of that kind."""
    node = gradient
    while node.op == "call_function" and op_name(node) in COMMUTE and node in dependent:
        (node,) = node.all_input_nodes
    if node not in dependent or node.op != "call_function":
        return None
    name, shapes = op_name(node), [tuple(n.meta["val"].shape) for n in node.all_input_nodes]
    if name == "aten::add" and len(shapes) == 2 and not node.kwargs:
        terms = [_summed(n, dependent) for n in node.all_input_nodes]
        return None if None in terms else [t for each in terms for t in each or ()]
    if name in ("aten::mm", "aten::bmm") and len(shapes) == 2:
        return [node] if shapes[0][-1] == shapes[1][-2] == ROWS else None
    if name == "aten::sum" and len(node.args) > 1 and node.args[1] == [0]:
        return [node] if shapes[0][0] == ROWS else None
    return None


def _with_what_is_cheap(
    cell: CellGraph, outside: Sequence[Node], known: set[Node], on_the_way: bool
) -> tuple[list[Node], list[Node]]:
    """Of what a step reads, the part that it computes by itself, in order, and what it reads for that."""
    inside: dict[Node, None] = {}
    read: dict[Node, None] = {}
    stack = list(reversed(outside))
    while stack:
        node = stack[-1]
        own = node in cell.differing and node not in known
        own = own and (_is_cheap(node) or _is_part(node) or (on_the_way and _is_narrow(node, cell)))
        waiting = [n for n in node.all_input_nodes if n not in inside and n not in read] if own else []
        if waiting:
            stack.extend(reversed(waiting))
            continue
        stack.pop()
        (inside if own else read).setdefault(node)
    return list(inside), list(read)


def _used_by(wanted: Sequence[Node], inside: set[Node]) -> list[Node]:
    """What is needed of the nodes ``inside`` to compute those wanted."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in inside:
            found.setdefault(node)
        elif node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return list(found)


def _anchors(needed: Iterable[Node], inside: set[Node], rows: bool) -> list[Node]:
    """What has to be returned for ``needed`` to be computed from it without any effort."""
    found: dict[Node, None] = {}
    stack = list(needed)
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or node not in inside:
            continue
        seen.add(node)
        if _is_cheap(node) or not _can_be_returned(node, rows):
            stack.extend(node.all_input_nodes)
        else:
            found.setdefault(node)
    return list(found)


def _is_cheap(node: Node) -> bool:
    """Whether to compute it again is cheaper than to read it; no view of a part."""
    return node.op == "call_function" and op_name(node) in _CHEAP


def _is_narrow(node: Node, cell: CellGraph) -> bool:
    """Whether it is the product of rows of few columns with a matrix that all steps share."""
    if node.op != "call_function" or op_name(node) not in ("aten::mm", "aten::addmm") or node.kwargs:
        return False
    x, matrix = node.all_input_nodes[-2:]
    rows, columns = x.meta["val"].shape
    return rows == ROWS and columns <= NARROWEST and matrix not in cell.differing


def _is_part(node: Node) -> bool:
    """Whether it is a view of a part of something; several results of one operator are not."""
    if op_name(node) == "getitem":
        (node,) = node.all_input_nodes
    return node.op == "call_function" and op_name(node) in _PARTS


def _can_be_returned(node: Node, rows: bool) -> bool:
    value = node.meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
        return False
    return value.shape[0] == ROWS or not rows


def check_rows(node: Node, value: Tensor) -> None:
    """Refuse a value of a node in which the dimension of rows is merged with another, or there twice."""
    merged = any(size != ROWS and size % ROWS == 0 and size for size in value.shape)
    if merged or sum(size == ROWS for size in value.shape) > 1:
        raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)


def _program(
    cell: CellGraph,
    entry: Sequence[Node],
    order: Sequence[Node],
    outside: Sequence[Node],
    exit_: Sequence[Node],
    emitted: Sequence[Node],
    added: Sequence[bool] | None = None,
    sums: Sequence[Node] = (),
    keep: bool = True,
) -> StepProgram:
    graph = Graph()
    copies: dict[Node, Node] = {}

    def placeholder(node: Node, name: str) -> Node:
        copy = graph.placeholder(name)
        copy.meta["val"] = node.meta["val"]
        return copy

    carry = tuple(placeholder(n, f"state_{i}") for i, n in enumerate(entry))
    copies.update(zip(entry, carry, strict=True))
    # Without anything to read, nothing would tell the number of steps.
    read = [n for n in outside if n in cell.differing] or list(cell.inputs[:1])
    shared = [n for n in outside if n not in cell.differing]
    copies.update((n, placeholder(n, f"input_{i}")) for i, n in enumerate(read))
    wanted = added or [False] * len(carry)
    more = [
        placeholder(n, f"added_{i}") if w else None
        for i, (n, w) in enumerate(zip(exit_, wanted, strict=True))
    ]
    copies.update((n, placeholder(n, f"shared_{i}")) for i, n in enumerate(shared))
    for node in (*order, *sums):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    results = []
    for node, plus in zip(exit_, more, strict=True):
        result = copies[node]
        if plus is not None:
            result = graph.call_function(torch.ops.aten.add.Tensor, (result, plus))
            result.meta["val"] = node.meta["val"]
        results.append(result)
    graph.output((*results, *(copies[n] for n in (*emitted, *sums))))
    index = {node: i for i, node in enumerate(cell.graph.nodes)}
    return StepProgram(
        graph=graph,
        carry=carry,
        inputs=(*(copies[n] for n in read), *(n for n in more if n is not None)),
        shared=tuple(copies[n] for n in shared),
        read=tuple(index[n] for n in read),
        read_shared=tuple(index[n] for n in shared),
        emitted=tuple(index[n] for n in emitted),
        sums=tuple(index[n] for n in sums),
        keep=keep,
    )
