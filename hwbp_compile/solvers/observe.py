"""How far each iteration still moves the cotangents: the error estimate, as part of the backward pass.

What is computed here goes nowhere in the graph. It is marked by an operator without a result, which a pass
over the joint graph (:mod:`..passes.record`) collects and writes to memory, or drops.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from .. import _compat
from ..system import State

STEPS = 32
"""Of more iterations than these the last ones are recorded."""
HEAD = 3
"""Before its steps a row holds the largest element of ``w0``, the number of blocks, and of iterations."""
WIDTH = HEAD + STEPS

torch.library.define("hwbp_compile::observe", "(Tensor[] row, Tensor blocks) -> ()")


@torch.library.impl("hwbp_compile::observe", "CompositeExplicitAutograd")
def _observe(row: list[Tensor], blocks: Tensor) -> None:
    """Nothing: what is not collected is not wanted."""


OBSERVE = torch.ops.hwbp_compile.observe.default
# Until it is collected nobody reads it, and it must not count as dead.
has_side_effect(OBSERVE)


class Observer:
    """Marks the relative steps of an iteration in the graph that is being traced, if one is.

    Of each step

        step_j = mean over blocks of |w_j - w_(j-1)| / |w_k|,        j = 1 .. k

    is recorded in float32. With ``delta_j = step_(j+1)`` it is the change that one more iteration makes to
    ``w_j``. Blocks whose cotangent is zero do not count. Of the last step the blocks' own values are marked
    too.

    Args:
        first: ``w_0``, stacked: ``[blocks + 1, ...]`` per component.
        blocks: their number.
    """

    def __init__(self, first: State, blocks: int) -> None:
        self._last, self._blocks = first, blocks
        self._changes: deque[Tensor] = deque(maxlen=STEPS)
        self._count = 0
        self._is_on = _compat.graph_being_traced() is not None

    def see(self, w: State) -> None:
        """The next iterate. What has to be known of the step to it is computed now: no iterate is kept."""
        if self._is_on:
            self._changes.append(_square_distances(self._last, w))
            self._count += 1
            self._last = w

    def mark(self) -> None:
        """Nothing follows."""
        if not self._changes:
            return
        final = _squares(self._last)
        count = (final > 0).sum().clamp(min=1)
        steps, ratio = [], final
        for change in self._changes:
            # Where nothing changes 0 / 0 must count as nothing; what is not finite stays so.
            ratio = torch.where(change == 0, 0.0, (change / final).sqrt())
            steps.append(ratio.sum() / count)
        largest = torch.stack([c[0].abs().max().float() for c in self._last]).max()
        numbers = [final.new_full((), n) for n in (self._blocks, self._count)]
        OBSERVE([largest, *numbers, *steps], ratio)


def _squares(state: State) -> Tensor:
    """The squared norm of each block's cotangent over all components, ``[blocks]``."""
    parts = [c[1:].float().square().flatten(1).sum(1) for c in state]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _square_distances(before: State, after: State) -> Tensor:
    """The squared norm of each block's change, ``[blocks]``.

    By an operator that compilers do not fuse: fused with those of the other steps, it would keep all iterates
    until the last one is there.
    """
    parts = []
    for pair in zip(before, after, strict=True):
        a, b = (c[1:].float().flatten(1).unsqueeze(1) for c in pair)
        parts.append(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").flatten().square())
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
