"""What does not exist yet of a recurrence is predicted: products, bytes and operators, at measured rates."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node

from ..passes.linear_ops import MATRIX_PRODUCTS, op_name
from ..passes.program import externals_of
from ..passes.work import work_of
from ..rates import bandwidth, operator_seconds, product_rate
from .backward import Settings
from .case import Case
from .cell_graph import trace_cell
from .cells import STEPS


def around_seconds(nodes: Sequence[Node], case: Case, steps: int) -> float:
    """Predicted time of nodes of a cell's graph, compiled, for all steps at once."""
    work = work_of(nodes)
    moved = work.bytes.value * steps
    calls = 2 * (work.kernels + len(work.products)) * operator_seconds(case.device, case.threads)
    return (
        _products_seconds(nodes, case, steps)
        + (moved / bandwidth(case.device, case.threads, _bytes(case, _widest(nodes) * steps)) if moved else 0)
        + calls
    )


def _widest(nodes: Sequence[Node]) -> int:
    """Elements of the largest value."""
    return max(map(_numel, nodes), default=0)


def iteration_seconds(case: Case, settings: Settings, steps: int, *, again: bool) -> float:
    """Predicted time of an iterated backward pass.

    Each iteration multiplies all rows of all steps by the block's matrices, reads what the block reads and
    the state, and scans; in groups it does so one step of the groups after the other. The first iterate is a
    scan, and all that the gradients of inputs and weights need follows the last one.

    Args:
        case: the recurrence.
        settings: the solver's.
        steps: how many there are.
        again: whether the gates are computed again, from the library's outputs; our kernels return them.
    """
    inputs, carry, weights = (case.like(g) for g in (case.inputs, case.carry, case.weights))
    cell = trace_cell(STEPS[case.key], carry, inputs, weights)
    found = zip((*cell.of_inputs, *cell.of_weights), (*case.inputs, *case.weights), strict=True)
    block = set(cell.block.nodes)
    gradients = cell.depending_on(cell.block.entry) & cell.needed_for(
        [node for node, (_, wanted) in found if wanted and node is not None]
    )
    swept = max(1, min(settings.group_size, steps))
    iterations = min(settings.iterations, math.ceil(steps / swept))
    product = functools.partial(_products_seconds, case=case)
    state = sum(x.numel() for x in carry)
    read = sum(_numel(n) for n in externals_of(cell.block) if n in cell.differing)
    speed = bandwidth(case.device, case.threads, _bytes(case, steps * state))
    operators = 6 + 2 * sum(op_name(n) in MATRIX_PRODUCTS for n in cell.block.nodes)
    one = (
        product(cell.block.nodes, steps=math.ceil(steps / swept)) * swept
        + _bytes(case, steps * (read + 6 * state)) / speed
        + operators * swept * operator_seconds(case.device, case.threads)
    )
    at_last = [
        n for n in cell.nodes if n.op == "call_function" and (n in gradients or (again and n not in block))
    ]
    last = (
        around_seconds(at_last, case, steps)
        + _bytes(case, 4 * steps * state) / speed
        + 3 * operators * operator_seconds(case.device, case.threads)
    )
    return iterations * one + last


def _numel(node: Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, Tensor) else 0


def _bytes(case: Case, elements: int) -> int:
    return elements * case.dtype.itemsize


def _products_seconds(nodes: Sequence[Node], case: Case, steps: int) -> float:
    """Of all products among the nodes, each for all steps at once."""
    total = 0.0
    for node in nodes:
        if node.op == "call_function" and op_name(node) in MATRIX_PRODUCTS:
            a, b = (n for n in node.all_input_nodes[-2:])
            many = math.prod(a.meta["val"].shape[:-2])
            (rows, inner), columns = a.meta["val"].shape[-2:], b.meta["val"].shape[-1]
            flops = 2 * many * rows * inner * columns * steps
            batch = case.carry[0][0][0]
            sizes = (rows * steps, inner, columns) if rows == batch else (rows, inner * steps, columns)
            total += flops / product_rate(*sizes, case.dtype, case.device, case.threads)
    return total
