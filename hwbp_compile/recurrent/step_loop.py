"""A recurrence as a loop of torch's operators: on any device, for any cell, where there is no kernel.

Only what has to be done step after step is in the loop, and no graph for autograd is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from .. import _compat
from .step_program import StepProgram


class LoopRecurrence:
    """Runs a program without sums; the size of the batch is that of the trace."""

    def __init__(self, program: StepProgram, *, reverse: bool) -> None:
        self.program = program
        self._reverse = reverse
        for node in program.graph.nodes:
            # The trace knew nothing of how tensors lie in memory.
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                node.target = torch.ops.aten.reshape.default
        self._step = GraphModule(torch.nn.Module(), program.graph)

    def results(self, initial: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Tensors for what is returned: states, ``[T + 1, ...]`` or the last ones, and what is emitted."""
        _, emitted, _ = self.program.results
        states = [x.new_empty((steps + 1, *x.shape) if self.program.keep else x.shape) for x in initial]
        values = [n.meta["val"] for n in emitted]
        return [*states, *(initial[0].new_empty((steps, *v.shape), dtype=v.dtype) for v in values)]

    def __call__(
        self, initial: Sequence[Tensor], inputs: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> list[Tensor]:
        """Run all steps; returns what :meth:`results` says."""
        steps, n = inputs[0].shape[0], len(initial)
        state = list(initial)
        states: list[list[Tensor]] = [[x] for x in state]
        emitted: list[list[Tensor]] = [[] for _ in self.program.emitted]
        with torch.no_grad(), _compat.without_autocast(initial[0].device):
            for t in range(steps - 1, -1, -1) if self._reverse else range(steps):
                found = self._step(*state, *(x[t] for x in inputs), *shared)
                state = list(found[:n])
                if self.program.keep:
                    for all_, x in zip(states, state, strict=True):
                        all_.append(x)
                for all_, x in zip(emitted, found[n:], strict=True):
                    all_.append(x)
            kept = [self._over_time(x) for x in states] if self.program.keep else [x.clone() for x in state]
            return [*kept, *map(self._over_time, emitted)]

    def _over_time(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values[::-1] if self._reverse else values)
