"""A recurrence as its cost depends on it, shapes and what wants a gradient; what it costs for any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _compat
from ..ranges import Sizes

AS_TRACED: Sizes = {}
"""Where sizes have no other values than those with which a graph was traced."""
SMALL = 0.01
"""What all tensors are filled with while something is measured."""


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds as a function of the number of steps."""

    fixed: float
    per_step: float

    def at(self, steps: int) -> float:
        """Seconds for so many steps."""
        return self.fixed + self.per_step * steps

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.per_step + other.per_step)


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
    def wanted(self) -> list[bool]:
        """Whether a gradient is, per input and weight."""
        return [wanted for _, wanted in (*self.inputs, *self.weights)]

    @property
    def in_library(self) -> bool:
        """Whether it is a layer of torch's, not a cell of one's own."""
        return hasattr(torch, self.key)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute, such as no sample."""
        return any(0 in shape for shape, _ in self.carry)

    def like(self, group: Sequence[tuple[tuple[int, ...], bool]], *more: int) -> list[Tensor]:
        """Small numbers, so that nothing overflows and nothing is denormal."""
        made = []
        for shape, wanted in group:
            x = torch.full((*more, *shape), SMALL, dtype=self.dtype, device=self.device)
            made.append(x.requires_grad_(wanted))
        return made


def case_of(
    key: str,
    inputs: Sequence[Tensor],
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    sizes: Sizes = AS_TRACED,
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
