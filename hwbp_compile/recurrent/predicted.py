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
from .case import Case, Line
from .cell_graph import trace_cell
from .cells import STEPS

_CALLS = 2
"""A call of a kernel or a product from generated code, in calls of a small operator."""
_NEW = 1 << 25
"""Bytes of a tensor that is in no cache, and on a CPU in memory that the process has just been given.

At the rates of smaller ones too little is predicted: all of them together fill the caches.
"""


def around(nodes: Sequence[Node], case: Case, steps: int) -> Line:
    """Predicted time of nodes of a cell's graph, compiled, for all steps at once.

    Args:
        nodes: some of the graph's. What has no row of the batch, as the sum over all rows that a weight's
            gradient is, is not counted for each step.
        case: the recurrence.
        steps: for so many of them rates are measured.
    """
    work = work_of([n for n in nodes if _has_rows(n, case)])
    total = _products_seconds(nodes, case, steps)
    if moved := work.bytes.value * steps:
        total += moved / bandwidth(case.device, case.threads, _NEW)
    calls = _CALLS * (work.kernels + len(work_of(nodes).products))
    return Line(calls * operator_seconds(case.device, case.threads), total / steps)


def _has_rows(node: Node, case: Case) -> bool:
    value = node.meta["val"]
    batch = case.carry[0][0][:1]
    return isinstance(value, Tensor) and (tuple(value.shape[:1]) == batch or not batch)


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
    results = [node for node, (_, wanted) in found if wanted and node is not None]
    backward = cell.depending_on(cell.block.entry)
    following = backward & cell.needed_for(results)
    if again:
        following |= cell.needed_for([*results, *externals_of(cell.block)]) - backward
    swept = max(1, min(settings.group_size, steps))
    iterations = min(settings.iterations, math.ceil(steps / swept))
    product = functools.partial(_products_seconds, case=case)
    state = sum(x.numel() for x in carry)
    read = sum(_numel(n) for n in externals_of(cell.block) if n in cell.differing)
    speed = bandwidth(case.device, case.threads, _power_of_two(_bytes(case, steps * state)), fresh=False)
    operators = 6 + 2 * sum(op_name(n) in MATRIX_PRODUCTS for n in cell.block.nodes)
    one = (
        product(cell.block.nodes, steps=math.ceil(steps / swept)) * swept
        + _bytes(case, steps * (read + 6 * state)) / speed
        + operators * swept * operator_seconds(case.device, case.threads)
    )
    last = (
        around([n for n in cell.nodes if n in following and n.op == "call_function"], case, steps).at(steps)
        + _bytes(case, 4 * steps * state) / speed
        + 3 * operators * operator_seconds(case.device, case.threads)
    )
    return iterations * one + last


def _numel(node: Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, Tensor) else 0


def _bytes(case: Case, elements: int) -> int:
    return elements * case.dtype.itemsize


def _power_of_two(value: int) -> int:
    """The next one, so that few things are measured."""
    return 1 << (max(value, 1) - 1).bit_length()


def _products_seconds(nodes: Sequence[Node], case: Case, steps: int) -> float:
    """Of all products among the nodes, each for all steps at once."""
    total, batch = 0.0, case.carry[0][0][:1]
    for product in work_of(nodes).products:
        flops = product.flops.value * steps
        if product.sizes:
            _, rows, inner, columns = (n.value for n in product.sizes)
            sizes = (rows * steps, inner, columns) if (rows,) == batch else (rows, inner * steps, columns)
        else:  # of a convolution, say, only this is known
            sizes = (_power_of_two(round((flops / 2) ** (1 / 3))),) * 3
        if flops:
            total += flops / product_rate(*sizes, case.dtype, case.device, case.threads)
    return total
