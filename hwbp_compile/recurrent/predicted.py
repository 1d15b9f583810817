"""What does not exist yet of a recurrence is predicted: products, bytes and operators, at measured rates."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from ..passes.linear_ops import MATRIX_PRODUCTS, op_name
from ..passes.program import externals_of
from ..passes.replay import COMMUTE
from ..passes.work import work_of
from ..rates import bandwidth, operator_seconds, product_rate
from .backward import Settings
from .case import Case, Line
from .cell_graph import CellGraph, trace_cell
from .cells import STEPS


@dataclass(frozen=True, slots=True)
class _Calls:
    """What it takes to call something from generated code, in calls of a small operator, of many in a row.

    In a CUDA graph it takes next to nothing, which is not known here.
    """

    kernel: int
    """A generated kernel, or a product among them."""
    sweep: int
    """All but the products of a step of an iteration."""
    product: int
    """A product in it."""
    iteration: int
    """What an iteration needs once: its scan, and a record of how far it went."""
    once: int
    """What an iterated step takes beside an exact one."""


_ON_CPU = _Calls(kernel=2, sweep=6, product=2, iteration=0, once=0)
# In profiles of steps launched by Python (an H100, torch 2.11) it took 28 us from one generated kernel to the
# next, 65 from a product, 170 and more from a scan, 180 for a record, where a small operator takes about 10;
# the GPU waited for each. The last two are fitted to eleven steps that were measured.
_ON_GPU = _Calls(kernel=3, sweep=9, product=6, iteration=30, once=40)
_NEW = 1 << 25
"""Bytes of a tensor that is in no cache, and on a CPU in memory that the process has just been given.

Its rate is taken for all that moves. At rates of as many bytes as do move, more choices were wrong, by more:
what other tensors of a step leave of the caches and of malloc's memory is not known.
"""


def around(cell: CellGraph, nodes: Sequence[Node], case: Case, steps: int) -> Line:
    """Predicted time of nodes of a cell's graph, compiled, for all steps at once.

    Args:
        cell: whose they are.
        nodes: some of its nodes.
        case: the recurrence.
        steps: for so many of them rates are measured.
    """
    once = _summed_over_steps(cell)
    work = work_of([n for n in nodes if n not in once])
    total, products = _products_seconds(nodes, once, case, steps)
    if moved := work.bytes.value * steps:
        total += moved / bandwidth(case.device, case.threads, _NEW)
    calls = _calls(case).kernel * (len(work.kernels) + products)
    return Line(calls * operator_seconds(case.device, case.threads), total / steps)


def _calls(case: Case) -> _Calls:
    return _ON_CPU if case.device.type == "cpu" else _ON_GPU


def _summed_over_steps(cell: CellGraph) -> set[Node]:
    """The gradients of weights, back to the product or sum that each is made by: one for all steps."""
    found: set[Node] = set()
    stack = [n for n in cell.of_weights if n is not None]
    while stack:
        node = stack.pop()
        if node not in found and node.op == "call_function":
            found.add(node)
            if op_name(node) in COMMUTE or op_name(node) == "aten::add":
                stack.extend(node.all_input_nodes)
    return found


def iteration_seconds(case: Case, settings: Settings, steps: int, *, again: bool) -> float:
    """Predicted time of an iterated backward pass.

    Each iteration multiplies all rows of all steps by the block's matrices, reads what the block reads and
    the state, and scans; in groups it does so one step of the groups after the other. The first iterate is a
    scan, and all that the gradients of inputs and weights need follows the last one.

    Args:
        case: the recurrence.
        settings: the solver's.
        steps: how many there are.
        again: whether the gates are computed again, from the library's outputs, and the rest of the state by
            a scan; our kernels return both.
    """
    inputs, carry, weights = (case.like(g) for g in (case.inputs, case.carry, case.weights))
    cell = trace_cell(STEPS[case.key], carry, inputs, weights)
    results = cell.gradients(case.wanted)
    backward = cell.depending_on(cell.block.entry)
    following = backward & cell.needed_for(results)
    if again:
        following |= cell.needed_for([*results, *externals_of(cell.block)]) - backward
    swept = max(1, min(settings.group_size, steps))
    in_parallel = math.ceil(steps / swept)
    iterations = min(settings.iterations, in_parallel)
    state = sum(x.numel() for x in carry)
    read = sum(_numel(n) for n in externals_of(cell.block) if n in cell.differing)
    speed = bandwidth(
        case.device, case.threads, min(_power_of_two(_bytes(case, steps * state)), _NEW), fresh=False
    )
    calls, operator = _calls(case), operator_seconds(case.device, case.threads)
    in_sweep = calls.sweep + calls.product * sum(op_name(n) in MATRIX_PRODUCTS for n in cell.block.nodes)
    one = (
        _products_seconds(cell.block.nodes, frozenset(), case, in_parallel)[0] * swept
        + _bytes(case, steps * (read + 6 * state)) / speed
        + (in_sweep * swept + calls.iteration) * operator
    )
    last = (
        around(cell, cell.operators(following), case, steps).at(steps)
        + _bytes(case, 4 * steps * state) / speed
        + (3 * in_sweep + calls.once + calls.iteration * (again and len(carry) > 1)) * operator
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


def _products_seconds(nodes: Sequence[Node], once: Set[Node], case: Case, steps: int) -> tuple[float, int]:
    """Of all products among the nodes, each for all steps at once, and how many there are.

    Those in ``once`` sum over the steps; the others have so many times the rows.
    """
    total, count = 0.0, 0
    for node in nodes:
        for product in work_of([node]).products:
            flops, count = product.flops.value * steps, count + 1
            if product.sizes:
                _, rows, inner, columns = (n.value for n in product.sizes)
                sizes = (rows, inner * steps, columns) if node in once else (rows * steps, inner, columns)
            else:  # of a convolution, say, only this is known
                sizes = (_power_of_two(round((flops / 2) ** (1 / 3))),) * 3
            if flops:
                total += flops / product_rate(*sizes, case.dtype, case.device, case.threads)
    return total, count
