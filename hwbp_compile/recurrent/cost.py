"""What a recurrence costs on this machine, exact and iterated: the choice of ``apply="auto"``.

What exists is measured: our kernels and the library run a few steps of the shapes at hand, which takes some
milliseconds. What does not exist yet, the iteration, is predicted from the products, bytes and operators that
it takes and from their measured rates.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .. import _compat
from ..errors import CannotRewrite
from ..passes.linear_ops import MATRIX_PRODUCTS, op_name
from ..passes.program import externals_of
from ..ranges import Sizes
from ..rates import bandwidth, budget, now, operator_seconds, product_rate
from .backward import EXACT, Cotangent, Settings
from .cell_graph import trace_cell
from .cells import STEPS
from .function import backward_pass, forward_pass, understand
from .library import call_library
from .recurrence import kernel_name

log = logging.getLogger(__name__)

_AS_TRACED: Sizes = {}
_SMALL = 0.01
"""What all tensors are filled with while something is measured."""
_PATIENCE = 0.1
"""Seconds after which a measurement is not repeated once more."""


def _enough(threads: int) -> float:
    """The share of the exact pass's time that an approximation may take at most.

    On several threads what is predicted is less certain, and in the mean too little.
    """
    return 0.95 if threads == 1 else 0.85


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds as a function of the number of steps."""

    fixed: float
    per_step: float

    def at(self, steps: int) -> float:
        """Seconds for so many steps."""
        return self.fixed + self.per_step * steps


@dataclass(frozen=True, slots=True)
class Exact:
    """Exact training of a layer: by whom, and what the two passes take."""

    by: str
    """``"kernels"`` or ``"library"``."""
    forward: Line
    backward: Line


@dataclass(frozen=True, slots=True)
class Case:
    """A recurrence: all that its cost depends on but the number of steps."""

    key: str
    """The cell's, in :data:`.cells.STEPS`."""
    inputs: tuple[tuple[tuple[int, ...], bool], ...]
    """Shape of one step, and whether a gradient is wanted."""
    carry: tuple[tuple[tuple[int, ...], bool], ...]
    weights: tuple[tuple[tuple[int, ...], bool], ...]
    dtype: torch.dtype
    device: torch.device
    threads: int

    @property
    def trains(self) -> bool:
        """Whether any gradient is wanted."""
        return any(wanted for group in (self.inputs, self.carry, self.weights) for _, wanted in group)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute, such as no sample."""
        return any(0 in shape for shape, _ in self.carry)

    def like(self, group: Sequence[tuple[tuple[int, ...], bool]], *more: int) -> list[Tensor]:
        """Small numbers, so that nothing overflows and nothing is denormal."""
        made = []
        for shape, wanted in group:
            x = torch.full((*more, *shape), _SMALL, dtype=self.dtype, device=self.device)
            made.append(x.requires_grad_(wanted))
        return made


def case_of(
    key: str,
    inputs: Sequence[Tensor],
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    sizes: Sizes = _AS_TRACED,
) -> tuple[Case, int]:
    """The case of these tensors, which may be fake and have symbolic sizes, and the number of steps.

    Args:
        key: the cell's.
        inputs: ``[T, ...]`` each; they, the initial ``carry`` and the ``weights`` may require gradients.
        sizes: values of symbols; by default those that were traced.
    """

    def described(x: Tensor, first: int = 0) -> tuple[tuple[int, ...], bool]:
        return tuple(_compat.size_at(n, sizes) for n in x.shape[first:]), x.requires_grad

    case = Case(
        key,
        tuple(described(x, 1) for x in inputs),
        tuple(map(described, carry)),
        tuple(map(described, weights)),
        carry[0].dtype,
        carry[0].device,
        torch.get_num_threads(),
    )
    return case, _compat.size_at(inputs[0].shape[0], sizes)


def why_exact_is_faster(
    inputs: Sequence[Tensor],
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    key: str,
    settings: Settings,
    sizes: Sizes = _AS_TRACED,
) -> str:
    """Why the exact backward pass is chosen, for these tensors of all steps; empty if the iteration is.

    The forward passes are counted too: the library's and ours differ. Arguments as of :func:`case_of`.
    """
    case, steps = case_of(key, inputs, carry, weights, sizes)
    if not case.trains:
        return ""
    if case.empty:
        return "nothing to iterate over: the batch is empty"
    try:
        with _compat.outside_of_tracing():
            exact = fastest_exact(case, steps)
            if exact is None:
                return ""
            approximate = _forward_of_iteration(case, steps).at(steps) + iteration_seconds(
                case, settings, steps
            )
    except Exception as error:  # such as a lack of memory
        log.warning("A recurrence is left exact as its cost cannot be measured.", exc_info=True)
        return f"its cost cannot be measured ({type(error).__name__}: {error})"
    taken = exact.forward.at(steps) + exact.backward.at(steps)
    log.info(
        "%s, %s steps: exact %.2f ms (%s), iterated about %.2f ms",
        key, steps, taken * 1e3, exact.by, approximate * 1e3,
    )  # fmt: skip
    if approximate < _enough(case.threads) * taken:
        return ""
    times = f"{taken * 1e3:.3g} ms against about {approximate * 1e3:.3g} ms"
    return f'exact backpropagation is faster here: {times}; apply="always" iterates all the same'


def kernels_are_faster(
    inputs: Sequence[Tensor], carry: Sequence[Tensor], weights: Sequence[Tensor], key: str, *, backward: bool
) -> bool:
    """Whether our kernels, which exist, take no longer than the library.

    Args:
        backward: whether they are to do exact backpropagation as well, not the forward pass only.
    """
    case, steps = case_of(key, inputs, carry, weights)
    if case.empty:
        return True
    try:
        with _compat.outside_of_tracing():
            if not backward:
                return case.device.type == "cpu" or _kernels_go_forward(case, steps)
            exact = fastest_exact(case, steps)
    except Exception:
        log.warning("A recurrent layer is run by our kernels as its cost cannot be measured.", exc_info=True)
        return True
    return exact is not None and exact.by == "kernels"


def _kernels_go_forward(case: Case, steps: int) -> bool:
    """Whether the forward pass of an iterated layer is our kernels'.

    On a CPU they are never slower than the library where only the backward pass is iterated, as they also
    return what the backward pass needs.
    """
    kernels = _measure_kernels(case)
    if kernels is None or case.device.type == "cpu":
        return kernels is not None
    library = _measure_library(case)
    return library is None or kernels.forward.at(steps) <= library.forward.at(steps)


def fastest_exact(case: Case, steps: int) -> Exact | None:
    """The faster of our kernels and the library for so many steps, measured; None if there is neither."""
    choices = [_measure_kernels(case), _measure_library(case)]
    found = [c for c in choices if c is not None]
    return min(found, key=lambda c: c.forward.at(steps) + c.backward.at(steps), default=None)


def _forward_of_iteration(case: Case, steps: int) -> Line:
    found = _measure_kernels(case) if _kernels_go_forward(case, steps) else _measure_library(case)
    assert found is not None
    return found.forward


def forget() -> None:
    """Measure recurrences anew from here on."""
    _measure_kernels.cache_clear()
    _measure_library.cache_clear()


@functools.lru_cache(maxsize=256)
def _measure_kernels(case: Case) -> Exact | None:
    inputs, carry, weights = (case.like(g) for g in (case.inputs, case.carry, case.weights))
    try:
        cell, only_loops = understand(case.key, inputs, carry, weights)
    except CannotRewrite:
        return None
    if only_loops and hasattr(torch, case.key):
        return None  # the library's are no slower
    wanted = [needed for _, needed in (*case.inputs, *case.weights)]
    name = functools.partial(kernel_name, case.key, cell, carry, inputs, weights)
    first, then = name(emit=True), name(backward=[True] * len(carry), wanted=wanted)

    def forward(steps: int) -> Callable[[], object]:
        x = [t.detach() for t in case.like(case.inputs, steps)]
        h, w = ([t.detach() for t in group] for group in (carry, weights))
        states, emitted = forward_pass(cell, first, x, h, w)
        cotangents = [Cotangent(s[-1], s[:-1]) for s in states]
        return lambda: backward_pass(
            cell, x, states, w, emitted, cotangents, Settings(EXACT), wanted, lambda _: then
        )

    with torch.no_grad():
        lines = _time(case, forward, longest=2048)
    # Not compiled, it takes the more time apart from the steps. Compiled, it packs the weights.
    size = sum(math.prod(shape) for shape, _ in case.weights) * case.dtype.itemsize
    packing = 4 * size / bandwidth(case.device, case.threads, size)
    return Exact("kernels", *(Line(min(line.fixed, packing), line.per_step) for line in lines))


@functools.lru_cache(maxsize=256)
def _measure_library(case: Case) -> Exact | None:
    if not hasattr(torch, case.key):
        return None

    def forward(steps: int) -> Callable[[], object]:
        x, h, w = case.like(case.inputs, steps), case.like(case.carry), _weights_of_module(case)
        y = call_library(x[0], h, w, case.key, training=True)[0]
        wanted = [t for t in (*x, *h, *w) if t.requires_grad]
        cotangent = y.detach()
        if not wanted:
            return lambda: None
        return lambda: torch.autograd.grad(y, wanted, cotangent, allow_unused=True)

    with torch.enable_grad(), _compat.autograd_inside_an_operator():
        # On a CPU a step takes so long that fewer will do.
        longest = 256 if case.device.type == "cpu" else 2048
        return Exact("library", *_time(case, forward, longest))


def _weights_of_module(case: Case) -> list[Tensor]:
    """Weights in one piece of memory, as modules hold them: otherwise cuDNN copies them in each call."""
    (gates, inputs), wanted = case.weights[0][0], [w for _, w in case.weights]
    biased, projected = len(case.weights) > 3, len(case.weights) in (3, 5)
    more: dict[str, Any] = {"proj_size": case.weights[-1][0][0]} if projected else {}
    if case.key.startswith("rnn"):
        more["nonlinearity"] = case.key.removeprefix("rnn_")
    kind, number = {"gru": (nn.GRU, 3), "lstm": (nn.LSTM, 4)}.get(case.key, (nn.RNN, 1))
    # Not initialised, which would draw random numbers.
    module = kind(inputs, gates // number, bias=biased, device="meta", dtype=case.dtype, **more)
    module.to_empty(device=case.device)
    weights: list[Tensor] = list(module.parameters())
    for weight, needed in zip(weights, wanted, strict=True):
        weight.detach().fill_(_SMALL)
        weight.requires_grad_(needed)
    return weights


def _time(case: Case, forward: Callable[[int], Callable[[], object]], longest: int) -> tuple[Line, Line]:
    """Of a forward pass over so many steps, and of the backward pass that it returns."""
    rows = case.carry[0][0][0] if case.carry[0][0] else 1
    flops = 6 * rows * sum(math.prod(shape) for shape, _ in case.weights)
    longer = int(min(max(budget(case.device) / max(flops, 1), 2), longest))
    lengths = max(longer // 4, 1), longer
    seconds = []
    forward(lengths[0])()  # what a library does once, such as loading its kernels
    for steps in lengths:
        best = [math.inf, math.inf]
        begun = now(case.device)
        for _ in range(5):
            start = now(case.device)
            if start - begun > _PATIENCE:
                break
            backward = forward(steps)
            middle = now(case.device)
            backward()
            best = [min(best[0], middle - start), min(best[1], now(case.device) - middle)]
        seconds.append(best)
    lines = []
    for short, long in zip(*seconds, strict=True):
        # Something else may have run meanwhile: steps take at least half of the longer run.
        slope = max((long - short) / (lengths[1] - lengths[0]), 0.5 * long / lengths[1])
        lines.append(Line(max(short - slope * lengths[0], 0.0), slope))
    return lines[0], lines[1]


def iteration_seconds(case: Case, settings: Settings, steps: int) -> float:
    """Predicted time of an iterated backward pass.

    Each iteration multiplies all rows of all steps by the block's matrices, reads what the block reads and
    the state, and scans; in groups it does so one step of the groups after the other. The gradients of inputs
    and weights take one more such pass, and the products for the weights.
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
    # Without kernels, the gates are computed again from the library's outputs.
    again = not _kernels_go_forward(case, steps)
    besides = [n for n in cell.nodes if n not in block and (again or n in gradients)]
    last = (
        product(besides, steps=steps)
        + product(cell.block.nodes, steps=steps)
        + _bytes(case, steps * (2 * read + 2 * state)) / speed
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
