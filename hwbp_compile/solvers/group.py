"""Groups of consecutive blocks as one: an exact sweep inside, the iteration between them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..residual import Coefficient, ResidualPath, add_values
from ..system import Rows, State, System

Partial = tuple[Tensor | None, ...]
"""A stacked state in which None is zero."""


class GroupedSystem:
    """``size`` consecutive blocks of ``inner`` as one block.

    The VJP of a group is ``size`` steps, each batched over the groups; its residual path is the product of
    its blocks'. Groups are counted from the loss; the last one, next to the input, may be short: what was
    computed for it then stays as it is in the steps that it lacks.
    """

    def __init__(self, inner: System, size: int) -> None:
        self.inner = inner
        # Per step, the blocks it visits: one of each group that is long enough.
        self._steps = [Rows(j, inner.blocks, size) for j in range(min(size, inner.blocks))]
        self.blocks = self._steps[0].count
        self.first = inner.first
        self.residual = self._residual()
        nothing = (None,) * len(self.first)
        # Direct gradients inside a group, carried exactly to the group's end.
        self.later: Partial = (
            nothing if all(c is None for c in inner.later) else self._sweep(nothing, self._steps)[-1]
        )

    def _residual(self) -> ResidualPath:
        product = self.inner.residual.rows(self._steps[0].index)
        like = self.first[0].new_ones((1,) * (self.first[0].dim() + 1))
        for step in self._steps[1:]:
            longer = self.inner.residual.rows(step.index).compose(product.rows(slice(0, step.count)))
            product = ResidualPath(
                tuple(
                    tuple(self._coefficients(a, b, step, like) for a, b in zip(p, q, strict=True))
                    for p, q in zip(longer.entries, product.entries, strict=True)
                )
            )
        return product

    def block_vjp(self, w: State, blocks: Rows) -> State:
        """``J w`` for all groups: the exact sweep, less what never left the residual path."""
        if blocks.start != 0 or blocks.step != 1 or blocks.stop != self.blocks:
            raise ValueError("A GroupedSystem applies all of its groups at once.")
        path: Partial = w
        rest: Partial = (None,) * len(w)
        for step in self._steps:
            residual = self.inner.residual.rows(step.index)
            before, block = _leading(path, step.count), _leading(rest, step.count)
            total = _dense(_add(before, block), self.first, step.count)
            block = _add(self.inner.block_vjp(total, step), residual.apply(block))
            rest = self._rows(block, rest, step)
            path = self._rows(residual.apply(before), path, step)
        return _dense(rest, self.first, self.blocks)

    def expand(self, w: State) -> State:
        """From the states between groups, ``[groups + 1, ...]``, to all ``[L + 1, ...]``; exact inside."""
        start = tuple(c[:-1] for c in w)
        inside = [_dense(s, self.first, self.blocks) for s in self._sweep(start, self._steps[:-1])]
        out = []
        for i, component in enumerate(w):
            rows = torch.stack([component[:-1], *(state[i] for state in inside)], 1).flatten(0, 1)
            out.append(torch.cat([rows[: self.inner.blocks], component[-1:]]))
        return tuple(out)

    def _sweep(self, start: Partial, steps: list[Rows]) -> list[Partial]:
        """Exact backpropagation from ``start`` through the steps; the states after each."""
        state, out = start, []
        for step in steps:
            before = _leading(state, step.count)
            after = tuple(None if c is None else c[step.index] for c in self.inner.later)
            if any(c is not None for c in before):
                dense = _dense(before, self.first, step.count)
                vjp = self.inner.block_vjp(dense, step)
                after = _add(_add(vjp, self.inner.residual.rows(step.index).apply(dense)), after)
            state = self._rows(after, state, step)
            out.append(state)
        return out

    def _is_of_all(self, step: Rows) -> bool:
        """Whether a step visits every group, as far as is known: nothing is asked of a symbolic length."""
        return step.start == 0 or (isinstance(step.count, int) and step.count == self.blocks)

    def _rows(self, new: Partial, old: Partial, step: Rows) -> Partial:
        """``old``, a state of all groups, with those rows that ``step`` visits from ``new``."""
        if self._is_of_all(step):
            return new
        return tuple(
            None
            if a is None and b is None
            else _with_rows(
                x.new_zeros((self.blocks, *x.shape)) if b is None else b,
                x.new_zeros((step.count, *x.shape)) if a is None else a,
            )
            for a, b, x in zip(new, old, self.first, strict=True)
        )

    def _coefficients(self, new: Coefficient, old: Coefficient, step: Rows, like: Tensor) -> Coefficient:
        """The same of coefficients; a number stays one where it is the same for all."""
        if self._is_of_all(step) or (
            not isinstance(new, Tensor) and not isinstance(old, Tensor) and new == old
        ):
            return new
        a, b = (like * (0.0 if c is None else c) for c in (new, old))
        shape = torch.broadcast_shapes(a.shape[1:], b.shape[1:])
        return _with_rows(b.expand(self.blocks, *shape), a.expand(step.count, *shape))


def _with_rows(old: Tensor, new: Tensor) -> Tensor:
    """``old`` with its first rows from ``new``."""
    dtype = torch.result_type(old, new)
    return old.to(dtype).slice_scatter(new.to(dtype), 0, 0, new.shape[0])


def _add(a: Partial, b: Partial) -> Partial:
    return tuple(add_values(x, y) for x, y in zip(a, b, strict=True))


def _leading(state: Partial, rows: int) -> Partial:
    return tuple(None if c is None else c[:rows] for c in state)


def _dense(state: Partial, like: State, rows: int) -> State:
    return tuple(x.new_zeros((rows, *x.shape)) if c is None else c for c, x in zip(state, like, strict=True))
