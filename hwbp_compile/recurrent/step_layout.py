"""Where the values of a step are in memory, while a kernel takes a few rows of the batch through it.

A row's values are located by a tensor without data (device ``meta``), in which the dimension of rows has the
stride :data:`ROWS_STRIDE`: torch's own view operators say where a view's elements are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .step_program import ROWS

ROWS_STRIDE = 1 << 40


@dataclass(frozen=True, slots=True)
class Value:
    """Where a value's elements are: ``base`` is a C++ expression in ``r``, the number of the row."""

    base: str
    where: Tensor

    @property
    def dims(self) -> list[tuple[int, int]]:
        """Size and stride of each dimension that does not run over rows."""
        pairs = zip(self.where.shape, self.where.stride(), strict=True)
        return [(size, stride) for size, stride in pairs if size != ROWS]

    def transposed(self) -> Value:
        """With its last two dimensions exchanged."""
        return Value(self.base, self.where.transpose(-1, -2))

    def of_product(self, number: str) -> str:
        """The address of the first row's elements in one of several products."""
        step = self.where.stride(0) if self.where.dim() == 3 else 0
        return f"{self.at_row(0)} + {self.where.storage_offset()} + {number} * {step}"

    @property
    def variable(self) -> str:
        """What the address begins with."""
        return self.base.removeprefix("(").partition(" ")[0]

    def at_row(self, row: int) -> str:
        """The address of a row's first element."""
        return self.base.replace("+ r *", f"+ {row} *")

    @property
    def row_step(self) -> str:
        """From one row to the next."""
        return f"(({self.at_row(1)}) - ({self.at_row(0)}))"

    def is_at(self, other: Value) -> bool:
        """Whether the elements of another value are these."""
        x, y = self.where, other.where
        same = (x.storage_offset(), x.shape, x.stride()) == (y.storage_offset(), y.shape, y.stride())
        return same and self.base == other.base

    @property
    def has_rows(self) -> bool:
        """Whether it differs between the rows of the batch."""
        return ROWS in self.where.shape


def compact(shape: Sequence[int]) -> Tensor:
    """A layout without gaps for what belongs to one row."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(ROWS_STRIDE if size == ROWS else step)
        step *= 1 if size == ROWS else size
    return torch.empty_strided(tuple(shape), tuple(reversed(strides)), device="meta")


def row_size(shape: Sequence[int]) -> int:
    """How many elements belong to one row."""
    return math.prod(size for size in shape if size != ROWS)


def align(where: Tensor, shape: Sequence[int]) -> Tensor:
    """Aligned with ``shape`` from the right."""
    return where[(None,) * (len(shape) - where.dim())]


def collapse(layouts: Sequence[list[tuple[int, int]]]) -> tuple[list[int], list[list[int]]]:
    """Sizes, and the strides of each, with neighbouring dimensions merged where that is possible for all."""
    rank = len(layouts[0])
    kept: list[tuple[int, list[int]]] = []
    for d in range(rank):
        size = max(layout[d][0] for layout in layouts)
        strides = [layout[d][1] for layout in layouts]
        if size == 1:
            continue
        if kept:
            before_size, before = kept[-1]
            if all(b == s * size for b, s in zip(before, strides, strict=True)):
                kept[-1] = (before_size * size, strides)
                continue
        kept.append((size, strides))
    return [size for size, _ in kept], [[s[i] for _, s in kept] for i in range(len(layouts))]


def placed_rows(at: str, shape: Sequence[int]) -> Value:
    """A value without gaps whose first row begins where the variable ``at`` points to."""
    return Value(f"({at} + r * {row_size(shape)})" if ROWS in shape else at, compact(shape))
