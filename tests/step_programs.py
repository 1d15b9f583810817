"""Steps of many cells as programs, and what running one step after the other should give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scan_cells import CELLS
from torch import Tensor
from torch.fx import Graph, GraphModule

from hwbp_compile.recurrent.cell_graph import CellGraph, trace_cell
from hwbp_compile.recurrent.cells import STEPS, Step
from hwbp_compile.recurrent.step_program import ROWS, StepProgram, backward_program, forward_program


@dataclass(frozen=True)
class StepCase:
    """A cell with the shapes it needs, for ``inputs`` inputs."""

    step: Step
    components: int
    hidden: int
    weights: tuple[tuple[int, ...], ...]
    inputs: int = 3

    def programs(
        self, dtype: torch.dtype, device: str = "cpu", *, on_the_way: bool = False
    ) -> Iterator[tuple[StepProgram, bool]]:
        """Forward and backward, each with whether it goes back in time."""

        def like(*shape: int) -> Tensor:
            return torch.empty((), dtype=dtype, device=device).expand(shape)

        carry = [like(ROWS, self.hidden)] * self.components
        cell: CellGraph = trace_cell(
            self.step, carry, [like(ROWS, self.inputs)], [like(*shape) for shape in self.weights]
        )
        yield forward_program(cell, emit=True, on_the_way=on_the_way), False
        n = 1 + len(self.weights)
        yield backward_program(cell, [True] * self.components, [True] * n, on_the_way=on_the_way), True


def _of_scan(name: str) -> StepCase:
    cell = CELLS[name]
    step: Step = lambda carry, x, weights: cell.function(lambda t: t, carry, x[0], *weights)  # noqa: E731
    return StepCase(step, cell.components, cell.hidden, cell.weights)


def of_library(kind: str, hidden: int, inputs: int = 3) -> StepCase:
    """A cell of ``torch.nn``."""
    gates = {"gru": 3, "lstm": 4}.get(kind, 1) * hidden
    shapes = ((gates, inputs), (gates, hidden), (gates,), (gates,))
    return StepCase(STEPS[kind], 2 if kind == "lstm" else 1, hidden, shapes, inputs)


STEP_CASES = {
    **{name: _of_scan(name) for name in CELLS},
    **{f"{kind} {h}": of_library(kind, h) for kind in ("gru", "lstm", "rnn_tanh") for h in (6, 16)},
    "gru 40": of_library("gru", 40),
    "gru 160": of_library("gru", 160),
}


def arguments(
    program: StepProgram, steps: int, batch: int, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Random initial states, inputs and shared values; positive, as some cells divide by their state.

    But for matrices, with which nothing is to grow.
    """

    def like(nodes: Sequence[Any], *more: int) -> list[Tensor]:
        found = []
        for value in (n.meta["val"] for n in nodes):
            shape = [*more, *(batch if n == ROWS else n for n in value.shape)]
            x = torch.rand(shape, dtype=torch.float64, device=device) / 2 + 0.25
            if value.dim() > 1 and ROWS not in value.shape:
                x = (x - 0.5) * 4 * value.shape[-2] ** -0.5
            found.append(x.to(value.dtype))
        return found

    return like(program.carry), like(program.inputs, steps), like(program.shared)


def run_steps(
    program: StepProgram,
    given: tuple[list[Tensor], list[Tensor], list[Tensor]],
    batch: int,
    *,
    reverse: bool,
) -> list[Tensor]:
    """The program's graph by torch, step after step: all states or the last, what is emitted, the sums."""

    def sized(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(map(sized, argument))
        return batch if type(argument) is int and argument == ROWS else argument

    graph = Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = sized(node.args)
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                node.target = torch.ops.aten.reshape.default
    step = GraphModule(torch.nn.Module(), graph)
    initial, inputs, shared = given
    length, n = inputs[0].shape[0], len(initial)
    state, states, emitted = list(initial), [list(initial)], []
    for t in range(length - 1, -1, -1) if reverse else range(length):
        found = step(*state, *(x[t] for x in inputs), *shared)
        state = list(found[:n])
        states.append(state)
        emitted.append(found[n:])
    order = -1 if reverse else 1
    kept = [torch.stack(x[::order]) for x in zip(*states, strict=True)] if program.keep else state
    over_time = [torch.stack(x[::order]) for x in zip(*emitted, strict=True)]
    m = len(program.emitted)
    return [*kept, *over_time[:m], *(x.sum(0) for x in over_time[m:])]
