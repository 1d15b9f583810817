"""What exists of a recurrence is measured: our kernels and the library run some steps of the shapes at hand.

Of our kernels' training step only the kernels are as they will be. What is around them will be compiled with
the model, and runs one operator at a time here. Around the layers of torch.nn that is next to nothing but
products, and measured it compares with the library. Around a cell of one's own each operator reads and writes
all steps; on a GPU, for layers too, each is launched by itself. So where less is predicted for them, as it is
for the iteration, that counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .. import _compat, remembered
from ..errors import CannotRewrite
from ..rates import now
from .backward import gradients_after, replay_of, run
from .case import SMALL, Case, Line
from .cell_graph import CellGraph
from .function import emitted_by, replay_after, understand
from .library import call_library
from .predicted import around
from .recurrence import kernel_name, kernel_program
from .time_system import CellReplay

_PATIENCE, _LONGEST = 0.1, 0.2
"""Seconds after which a measurement is not repeated once more, and that it may take."""
_FEWEST, _MOST, _RUNS = 2, 2048, 5
"""Steps of the first measurement and, at most, of the last; how often each is repeated."""

Stages = Callable[[int], Iterator[None]]
"""Runs a training step of a recurrence over so many time steps; stops where it begins and after each part."""


@dataclass(frozen=True, slots=True)
class Exact:
    """Exact training of a layer: by whom, and what the two passes take."""

    by: str
    """``"kernels"`` or ``"library"``."""
    forward: Line
    backward: Line


def measure_kernels(case: Case, steps: int) -> Exact | None:
    """Our kernels, for about so many steps; None if there are none that can be the faster."""
    return _kernels(case, _rounded(steps))


def measure_library(case: Case, steps: int) -> Exact | None:
    """The library, for about so many steps; None if it has no such layer."""
    return _library(case, _rounded(steps))


def forget() -> None:
    """Measure recurrences, and rates that no file holds, anew from here on."""
    remembered.forget()
    _kernels.cache_clear()
    _library.cache_clear()


def _rounded(steps: int) -> int:
    """The end of a range of steps for which one measurement is made."""
    return min(1 << (max(steps, 2) - 1).bit_length(), _MOST)


@functools.lru_cache(maxsize=256)
def _kernels(case: Case, most: int) -> Exact | None:
    inputs, carry, weights = (case.like(g) for g in (case.inputs, case.carry, case.weights))
    try:
        cell, only_loops = understand(case.key, inputs, carry, weights)
    except CannotRewrite:
        return None
    if only_loops and case.in_library:
        return None  # the library's are no slower
    wanted = case.wanted
    name = functools.partial(kernel_name, case.key, cell, carry, inputs, weights)
    first, then = name(emit=True), name(backward=[True] * len(carry), wanted=wanted)

    def stages(steps: int) -> Iterator[None]:
        x = [t.detach() for t in case.like(case.inputs, steps)]
        h, w = ([t.detach() for t in group] for group in (carry, weights))
        yield
        replay = replay_of(cell, x, w)
        _read(cell, replay, first)
        yield
        states = run(cell, replay, first, h, reverse=False)
        yield
        replay = replay_after(cell, x, states, w, emitted_by(cell, replay, first))
        _read(cell, replay, then)
        yield
        last, more = [s[-1] for s in states], [s[:-1] for s in states]
        found = run(cell, replay, then, last, more, reverse=True)
        yield
        gradients_after(cell, replay, then, found, wanted)
        yield

    with torch.no_grad():
        lengths, parts = _time(case, stages, most)
    before, forward, between, backward, after = (_line(lengths, seconds) for seconds in parts)
    sides = [before, between + after]
    if case.device.type != "cpu" or not case.in_library:
        predicted = [around(cell, nodes, case, most) for nodes in _around(cell, first, then, wanted)]
        sides = [min(pair, key=lambda line: line.at(most)) for pair in zip(sides, predicted, strict=True)]
    return Exact("kernels", forward + sides[0], backward + sides[1])


def _read(cell: CellGraph, replay: CellReplay, kernel: str) -> None:
    """Compute what a kernel is given."""
    program = kernel_program(kernel)
    for i in (*program.read, *program.read_shared):
        replay.value(cell.nodes[i])


def _around(cell: CellGraph, first: str, then: str, wanted: Sequence[bool]) -> tuple[list[Node], list[Node]]:
    """What no kernel computes, of the forward pass, and of the backward pass, which knows the former."""
    at = cell.nodes.__getitem__
    forward, backward = kernel_program(first), kernel_program(then)

    def computed(needed: Sequence[Node], known: set[Node]) -> list[Node]:
        return cell.operators(cell.needed_for(needed, known) - known)

    before = computed([*map(at, forward.read)], set())
    known = {*before, *cell.carry, *cell.block.entry}
    known.update(map(at, (*forward.emitted, *backward.emitted, *backward.sums)))
    return before, computed([*map(at, backward.read), *cell.gradients(wanted)], known)


@functools.lru_cache(maxsize=256)
def _library(case: Case, most: int) -> Exact | None:
    if not case.in_library:
        return None

    def stages(steps: int) -> Iterator[None]:
        x, h, w = case.like(case.inputs, steps), case.like(case.carry), weights_of_module(case)
        yield
        y = call_library(x[0], h, w, case.key, training=True)[0]
        yield
        wanted = [t for t in (*x, *h, *w) if t.requires_grad]
        if wanted:
            torch.autograd.grad(y, wanted, y.detach(), allow_unused=True)
        yield

    with torch.enable_grad(), _compat.autograd_inside_an_operator():
        lengths, parts = _time(case, stages, most)
    return Exact("library", *(_line(lengths, seconds) for seconds in parts))


def weights_of_module(case: Case) -> list[Tensor]:
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
        weight.detach().fill_(SMALL)
        weight.requires_grad_(needed)
    return weights


def _time(case: Case, stages: Stages, most: int) -> tuple[tuple[int, int], list[tuple[float, float]]]:
    """Two numbers of steps, the larger one ``most`` if that does not take too long; each part's seconds."""
    _once(case, stages, 1)  # what a library does once, such as loading its kernels
    length = min(_FEWEST, most)
    while True:
        # The first run may get its memory from the system.
        runs = [_once(case, stages, length)]
        if sum(runs[0]) < _LONGEST:
            runs.append(_once(case, stages, length))
        if length == most or 4 * min(map(sum, runs)) > _LONGEST:
            break
        length = min(4 * length, most)
    lengths = max(length // 4, 1), length
    best = _best(case, stages, lengths[0], []), _best(case, stages, lengths[1], runs)
    return lengths, list(zip(*best, strict=True))


def _best(case: Case, stages: Stages, steps: int, runs: Sequence[list[float]]) -> list[float]:
    """Seconds of each part, the least of some runs, of which there may be some already."""
    runs, spent = [*runs], sum(map(sum, runs))
    while not runs or (len(runs) < _RUNS and spent < _PATIENCE):
        runs.append(_once(case, stages, steps))
        spent += sum(runs[-1])
    return [min(column) for column in zip(*runs, strict=True)]


def _once(case: Case, stages: Stages, steps: int) -> list[float]:
    clock = [now(case.device) for _ in stages(steps)]
    return [b - a for a, b in pairwise(clock)]


def _line(lengths: tuple[int, int], seconds: Sequence[float]) -> Line:
    """Through two points."""
    short, long = seconds
    # Something else may have run meanwhile: steps take at least half of the longer run.
    slope = max((long - short) / (lengths[1] - lengths[0]), 0.5 * long / lengths[1])
    return Line(max(short - slope * lengths[0], 0.0), slope)
