"""The linear system that a chain's cotangents solve, and a plain reference of it.

For a chain of ``L`` blocks number the states from the loss towards the input: ``w[0]`` is the cotangent
of the last hidden state, which is known, and ``w[p + 1]`` is the cotangent of the input of block ``p``:

    w[p + 1] = K_p w[p] + J_p w[p] + b[p + 1],        p = 0 .. L - 1

``K_p`` is the residual path of block ``p`` (diagonal), ``J_p`` the VJP of the rest of it, and ``b`` holds
the gradients that reach a hidden state directly (an auxiliary head, a loss per step). A state is a tuple
of tensors: one for most models, the pair (cell, hidden) for an LSTM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .residual import ResidualPath


@dataclass(frozen=True, slots=True)
class Rows:
    """Every ``step``-th block from ``start`` to before ``stop``: a ``range`` whose ends may be symbolic."""

    start: int
    stop: int
    step: int = 1

    @property
    def count(self) -> int:
        """How many there are."""
        return (self.stop - self.start + self.step - 1) // self.step

    @property
    def index(self) -> slice:
        """To take them from a stack of all blocks."""
        return slice(self.start, self.stop, self.step)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop, self.step))


State = tuple[Tensor, ...]
"""One tensor per component. *Stacked* states have the block as their first dimension."""


class System(Protocol):
    """What a solver needs to know of a chain. All rows run from the loss towards the input."""

    @property
    def blocks(self) -> int:
        """The number of blocks, L."""
        ...

    @property
    def first(self) -> State:
        """``w[0]``: the cotangent of the chain's last hidden state."""
        ...

    @property
    def later(self) -> tuple[Tensor | None, ...]:
        """``b[1:]``, stacked, per component; None for a component that receives no direct gradient."""
        ...

    @property
    def residual(self) -> ResidualPath:
        """``K``: coefficients stacked over the ``L`` blocks."""
        ...

    def block_vjp(self, w: State, blocks: Rows) -> State:
        """``J_p w[p]`` for each ``p`` in ``blocks``, all at once: the paper's ``v``.

        ``w`` holds the rows of ``blocks`` only.
        """
        ...


class ReferenceSystem:
    """A system given by one function per block; eager, without batching, for tests and small studies.

    Args:
        first: ``w[0]``.
        vjps: ``vjps[p](w_p)`` returns ``J_p w_p`` (the block's VJP without its residual path).
        residual: ``K`` stacked over the blocks.
        later: ``b[1:]`` stacked, or None.
    """

    def __init__(
        self,
        first: State,
        vjps: Sequence[Callable[[State], State]],
        residual: ResidualPath,
        later: tuple[Tensor | None, ...] | None = None,
    ) -> None:
        self.first = first
        self.residual = residual
        self.later = later if later is not None else (None,) * len(first)
        self._vjps = list(vjps)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self._vjps)

    def block_vjp(self, w: State, blocks: Rows) -> State:
        """``J_p w[p]`` for each block, one after the other."""
        rows = [self._vjps[p](tuple(c[i] for c in w)) for i, p in enumerate(blocks)]
        return tuple(torch.stack(component) for component in zip(*rows, strict=True))
