"""torch's ``scan`` with a cell of the user's, in a graph that Dynamo made.

The steps are run by our kernels, forward and backward, or backward in parallel; what the cell returns besides
its state is computed for all steps at once. A scan that is not understood stays what it is, and exact.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .. import _compat
from ..errors import CannotRewrite
from .backward import Settings
from .cells import FOR_ANY_BATCH, STEPS, Step
from .function import understand, why_not_parallel
from .outputs import OUTPUTS, outputs_of
from .step_program import ROWS

log = logging.getLogger(__name__)

_COPIES = {"clone", "detach", "contiguous", "alias"}


def scans_in(graph: Graph) -> list[Node]:
    """The scans of a graph."""
    target = torch.ops.higher_order.scan
    return [n for n in graph.nodes if n.op == "call_function" and n.target is target]


def trained_scans(owner: GraphModule) -> list[Node]:
    """The scans in a graph that Dynamo made, and in its subgraphs, that a backward pass may go through."""
    if not torch.is_grad_enabled():
        return []
    graphs = [m.graph for m in owner.modules() if isinstance(m, GraphModule)]
    found = [node for graph in graphs for node in scans_in(graph)]
    return [node for node in found if any(_requires_grad(n) for n in node.all_input_nodes)]


def _requires_grad(node: Node) -> bool:
    value = _value(node)
    return isinstance(value, Tensor) and value.requires_grad


def make_ready(owner: GraphModule, node: Node) -> None:
    """See to what torch refuses in a scan without need, before it gets one that stays what it is.

    The states that it starts from and those that the cell returns are copied, as they may share memory.
    """
    _compat.let_scans_compile()
    init: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    trained = [x for x in node.all_input_nodes if _requires_grad(x)] if torch.is_grad_enabled() else []
    with node.graph.inserting_before(node):
        if trained and _compat.SCANS_NEED_TRAINED_STATES:
            # The sum of no elements: zero, whatever they are, and yet computed from them.
            smallest = min(trained, key=lambda x: _compat.size_hint(_value(x).numel()))
            flat = node.graph.call_method("flatten", (smallest,))
            zero = node.graph.call_method("sum", (_item(node.graph, flat, slice(0)),))
        for i, x in enumerate(init):
            if not isinstance(x, Node):
                continue
            init[i] = node.graph.call_method("clone", (x,))
            init[i].meta.update(x.meta)
            if trained and _compat.SCANS_NEED_TRAINED_STATES and not _requires_grad(x):
                init[i] = node.graph.call_method("add", (init[i], node.graph.call_method("to", (zero, x))))
    node.update_arg(1, init)
    body = _body(owner, node)
    output = next(n for n in body.graph.nodes if n.op == "output")
    (results,) = output.args
    n = len(init)
    with body.graph.inserting_before(output):
        copies = [body.graph.call_method("clone", (x,)) if isinstance(x, Node) else x for x in results[:n]]
    output.args = ([*copies, *results[n:]],)
    body.recompile()


def _body(owner: GraphModule, node: Node) -> GraphModule:
    """The cell of a scan."""
    name = node.args[0]
    assert isinstance(name, Node)
    found = owner.get_submodule(str(name.target))
    assert isinstance(found, GraphModule)
    return found


class Scan:
    """One scan: its cell, and what it runs on.

    Raises:
        CannotRewrite: it is nothing that can be run as a recurrence.
    """

    def __init__(self, owner: GraphModule, node: Node) -> None:
        _, init, inputs, more = node.args
        if any(node.kwargs.values()):
            raise CannotRewrite("the cell writes to one of its inputs")
        self.node = node
        self.init, self.inputs, given = (list(x) for x in (init, inputs, more))  # type: ignore[arg-type]
        carry, over_time = (list(map(_value, x)) for x in (self.init, self.inputs))
        if any(not isinstance(x, Tensor) for x in (*carry, *over_time)):
            raise CannotRewrite("the cell runs over a number that is no tensor")
        shared = [_value(x) if isinstance(x, Node) else x for x in given]
        of_a_step = [*carry, *(x.select(0, 0) for x in over_time), *shared]
        self._body = _without_numbers(_body(owner, node), of_a_step)
        self.weights = [n for n, x in zip(given, shared, strict=True) if isinstance(x, Tensor)]
        weights = [x for x in shared if isinstance(x, Tensor)]
        if len({x.dtype for x in carry}) > 1 or not carry[0].is_floating_point():
            raise CannotRewrite("the components of the state are not all of one floating-point dtype")
        if _compat.autocasts(carry[0].device) or _has_autocast(node.graph):
            raise CannotRewrite("automatic mixed precision is in force")
        self._split_outputs()
        self.cell = self._register([*carry, *over_time, *weights])
        with _compat.fake_mode_of([*carry, *over_time, *weights]):
            first = [x.select(0, 0) for x in over_time]
            cell, self.why_no_kernel = understand(self.cell, first, carry, weights)
            if self.why_no_kernel:
                log.info("The steps of a scan run in a loop of torch's operators: %s", self.why_no_kernel)
            self.residual = cell.split.kind
            self._understood = cell, first, carry, weights
            if self._computed:
                states = [x.unsqueeze(0).expand(over_time[0].shape[0], *x.shape) for x in carry]
                try:
                    outputs_of(OUTPUTS[self.cell], [*states, *states, *over_time], weights)
                except RuntimeError as error:
                    reason = (
                        "what the cell returns besides its state cannot be computed for all steps at once"
                    )
                    raise CannotRewrite(reason) from error

    def why_not_parallel(self) -> str:
        """Why its backward pass cannot be done in parallel; empty if it can."""
        cell, first, carry, weights = self._understood
        with _compat.fake_mode_of([*carry, *first, *weights]):
            return why_not_parallel(self.cell, cell, first, carry, weights)

    def _split_outputs(self) -> None:
        """Tell outputs that are a state from such as have to be computed."""
        body = self._body.graph
        n = len(self.init)
        (results,) = next(x for x in body.nodes if x.op == "output").args
        flat: Sequence[Any] = results if isinstance(results, (list, tuple)) else [results]
        if any(not isinstance(x, Node) for x in flat):
            raise CannotRewrite("the cell returns something that is no tensor")
        placeholders = [x for x in body.nodes if x.op == "placeholder"]
        before, self._after = placeholders[:n], list(flat[:n])
        sources: dict[Node, tuple[str, int]] = {_source(x): ("before", i) for i, x in enumerate(before)}
        sources.update((_source(x), ("after", i)) for i, x in enumerate(self._after))
        self._outputs: list[tuple[str, int]] = []
        self._computed: list[Node] = []
        for x in flat[n:]:
            known = sources.get(_source(x))
            self._outputs.append(known or ("computed", len(self._computed)))
            if known is None:
                self._computed.append(x)

    def _register(self, values: Sequence[Tensor]) -> str:
        """Name the cell by what it does."""
        n, body = len(self.init), self._body
        shapes = [f"{x.dtype}{x.dim()}" for x in values]
        text = f"{_code(body)}{shapes}{[x.name for x in self._computed]}{n}"
        key = f"scan_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
        if key not in STEPS:
            outputs = _outputs_module(body, self._after, self._computed, n)

            STEPS[key], OUTPUTS[key] = _step(body, n), outputs
            FOR_ANY_BATCH[key] = lambda batch: [
                _step(_with_batch(body, batch, first_only=first), n) for first in (True, False)
            ]
        return key

    def replace(self, settings: Settings) -> Node:
        """Put a recurrence in the place of the scan."""
        graph, node, n = self.node.graph, self.node, len(self.init)
        ops = torch.ops.hwbp_compile
        fields = astuple(settings)
        with graph.inserting_before(node):
            arguments = (self.inputs, self.init, self.weights, self.cell, *fields)
            new = graph.call_function(ops.recurrent_cell.default, arguments)
            states = [_item(graph, new, i) for i in range(2 * n)]
            before = [_item(graph, x, slice(None, -1)) for x in states[:n]]
            after = [_item(graph, x, slice(1, None)) for x in states[:n]]
            computed: list[Node] = []
            if self._computed:
                rest = (before, after, self.inputs, self.weights, self.cell)
                several = graph.call_function(ops.cell_outputs.default, rest)
                computed = [_item(graph, several, i) for i in range(len(self._computed))]
            taken = {"before": before, "after": after, "computed": computed}
            # The scan returned tensors of their own: what is written to one must not show in another.
            outputs = [graph.call_function(ops.own.default, (taken[kind][i],)) for kind, i in self._outputs]
            results = [*states[n:], *outputs]
        new.meta.update(node.meta)
        for user in list(node.users):
            index = user.args[1]
            assert isinstance(index, int)
            user.replace_all_uses_with(results[index])
            graph.erase_node(user)
        _erase_unused(
            [*reversed(results), *reversed(computed), *reversed([*before, *after]), *reversed(states)]
        )
        graph.erase_node(node)
        return new


def _code(body: GraphModule) -> str:
    """What a cell does, in words. Graphs inside of it, of checkpoints and custom functions, are named alike
    in every cell, so what they do has to be said, too.

    Raises:
        CannotRewrite: it reads something that is neither a graph nor an argument.
    """
    graphs = {name: m for name, m in body.named_modules(remove_duplicate=False) if isinstance(m, GraphModule)}
    for prefix, module in graphs.items():
        for node in module.graph.nodes:
            if node.op == "get_attr" and f"{prefix}.{node.target}".lstrip(".") not in graphs:
                raise CannotRewrite(f"the cell reads {node.target}, which is not one of its arguments")
    return "\n".join(f"{name}: {module.code}" for name, module in graphs.items())


def _erase_unused(nodes: Iterable[Node]) -> None:
    """Erase those of these nodes that nothing reads.

    Not ``Graph.eliminate_dead_code``: in Dynamo's graphs a node that nothing reads may write in place.
    """
    for node in dict.fromkeys(nodes):
        if not node.users:
            node.graph.erase_node(node)


def _step(body: GraphModule, components: int) -> Step:
    def step(carry: Any, inputs: Any, weights: Any) -> Any:
        return tuple(body(*carry, *inputs, *weights)[:components])

    return step


_SHAPED = {"view", "reshape", "expand", "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full"}


def _without_numbers(body: GraphModule, values: Sequence[Any]) -> GraphModule:
    """A cell that is given tensors only: sizes, which Dynamo hands over too, are those of the tensors.

    Args:
        body: the cell.
        values: its arguments.

    Raises:
        CannotRewrite: it reads a number that is neither known nor such a size.
    """
    if all(isinstance(x, Tensor) for x in values):
        return body
    copy = _compat.copy_graph_module(body)
    arguments = [n for n in copy.graph.nodes if n.op == "placeholder"]
    sizes = {
        _compat.size_expression(size): (node, dim)
        for node, x in zip(reversed(arguments), reversed(values), strict=True)
        if isinstance(x, Tensor)
        for dim, size in enumerate(x.shape)
    }
    numbers: dict[Node, Any] = {}
    with copy.graph.inserting_after(arguments[-1]):
        for node, x in zip(arguments, values, strict=True):
            if not isinstance(x, Tensor) and node.users:
                known = _known(x, sizes)
                numbers[node] = known if isinstance(known, int) else copy.graph.call_method("size", known)
    for node in copy.graph.nodes:
        node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: numbers.get(n, n))
    for node, x in zip(arguments, values, strict=True):
        if not isinstance(x, Tensor):
            copy.graph.erase_node(node)
    copy.recompile()
    return copy


def _known(number: Any, sizes: Mapping[Any, tuple[Node, int]]) -> int | tuple[Node, int]:
    """What a number is, or of which argument it is which size."""
    if not isinstance(number, (int, torch.SymInt)) or isinstance(number, bool):
        raise CannotRewrite("the cell reads a number that is no tensor")
    expression = _compat.size_expression(number)
    if expression.is_number:
        return int(expression)
    if expression not in sizes:
        raise CannotRewrite("the cell reads a number that is no tensor, and no size of one")
    return sizes[expression]


def _with_batch(body: GraphModule, batch: int, *, first_only: bool) -> GraphModule:
    """The cell with another size for the batch where its shapes are constants (or only their first ones)."""
    copy = _compat.copy_graph_module(body)
    for node in copy.graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op not in ("call_method", "call_function") or name not in _SHAPED:
            continue
        seen = False

        def replaced(x: Any) -> Any:
            nonlocal seen
            if type(x) is not int or (seen and first_only):
                return x
            seen = True
            return ROWS if x == batch else x

        node.args = pytree.tree_map(replaced, node.args)
    copy.recompile()
    return copy


def _item(graph: Graph, node: Node, index: Any) -> Node:
    return graph.call_function(operator.getitem, (node, index))


def _value(node: Any) -> Any:
    return node.meta.get("example_value")


def _source(node: Node) -> Node:
    """The node of which this one is a copy."""
    while True:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op not in ("call_method", "call_function") or name not in _COPIES:
            return node
        if not isinstance(node.args[0], Node):
            return node
        node = node.args[0]


def _has_autocast(graph: Graph) -> bool:
    return any("autocast" in getattr(n.target, "__name__", "") for n in graph.nodes)


def _outputs_module(
    body: GraphModule, after: Sequence[Node], computed: Sequence[Node], components: int
) -> GraphModule:
    """Computes ``computed`` from the states before and after the step, the inputs and the weights."""
    graph = Graph()
    given = [n for n in body.graph.nodes if n.op == "placeholder"]
    copies: dict[Node, Node] = {n: graph.placeholder(f"before_{i}") for i, n in enumerate(given[:components])}
    states = [graph.placeholder(f"after_{i}") for i in range(components)]
    copies.update((n, graph.placeholder(n.name)) for n in given[components:])
    for node, state in zip(after, states, strict=True):
        if _source(node).op != "placeholder":
            copies[_source(node)] = state
    stack = list(computed)
    while stack:
        node = stack[-1]
        waiting = [n for n in node.all_input_nodes if n not in copies] if node not in copies else []
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[n] for n in computed])
    return GraphModule(body, graph)
