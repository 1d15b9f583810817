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
    its blocks'. Groups are counted from the loss; the last one, next to the input, may be short.
    """

    def __init__(self, inner: System, size: int) -> None:
        self.inner = inner
        self.blocks = -(-inner.blocks // size)
        self.first = inner.first
        # Per step, the blocks it visits: one of each group that is long enough.
        self._steps = [Rows(j, inner.blocks, size) for j in range(min(size, inner.blocks))]
        self._full = self._steps[-1].count
        self.residual = self._residual()
        self.later = self._later()

    def _residual(self) -> ResidualPath:
        product = self.inner.residual.rows(self._steps[0].index)
        short: ResidualPath | None = None
        for blocks in self._steps[1:]:
            if blocks.count < self.blocks and short is None:
                short = product.rows(slice(self.blocks - 1, self.blocks))
            product = self.inner.residual.rows(blocks.index).compose(product.rows(slice(0, blocks.count)))
        if short is None:
            return product
        like = self.first[0].new_ones((1,) * (self.first[0].dim() + 1))
        return ResidualPath(
            tuple(
                tuple(_append_coefficient(e, s, like, self._full) for e, s in zip(p, q, strict=True))
                for p, q in zip(product.entries, short.entries, strict=True)
            )
        )

    def _later(self) -> Partial:
        """Direct gradients inside a group, carried exactly to the group's end."""
        nothing = (None,) * len(self.first)
        if all(c is None for c in self.inner.later):
            return nothing
        ends = self._sweep(nothing, self._steps)
        if self._full == self.blocks:
            return ends[-1]
        short = next(
            e
            for e, blocks in zip(reversed(ends), reversed(self._steps), strict=True)
            if blocks.count > self._full
        )
        return _append_rows(
            ends[-1], tuple(None if c is None else c[-1:] for c in short), self.first, self._full
        )

    def block_vjp(self, w: State, blocks: Rows) -> State:
        """``J w`` for all groups: the exact sweep, less what never left the residual path."""
        if blocks.start != 0 or blocks.step != 1 or blocks.stop != self.blocks:
            raise ValueError("A GroupedSystem applies all of its groups at once.")
        path: Partial = w
        rest: Partial = (None,) * len(w)
        short: Partial | None = None
        for step in self._steps:
            if step.count < self.blocks and short is None:
                short = tuple(None if c is None else c[-1:] for c in rest)
            path, rest = _leading(path, step.count), _leading(rest, step.count)
            residual = self.inner.residual.rows(step.index)
            total = _dense(_add(path, rest), self.first, step.count)
            rest = _add(self.inner.block_vjp(total, step), residual.apply(rest))
            path = residual.apply(path)
        if short is not None:
            rest = _append_rows(rest, short, self.first, self._full)
        return _dense(rest, self.first, self.blocks)

    def expand(self, w: State) -> State:
        """From the states between groups, ``[groups + 1, ...]``, to all ``[L + 1, ...]``; exact inside."""
        inside = self._sweep(tuple(c[:-1] for c in w), self._steps[:-1])
        columns = [tuple(c[:-1] for c in w)] + [
            _dense(_leading(state, blocks.count), self.first, blocks.count)
            for state, blocks in zip(inside, self._steps[1:], strict=True)
        ]
        out = []
        for i, component in enumerate(w):
            rows = [column[i] for column in columns]
            full = torch.stack([r[: self._full] for r in rows], 1).flatten(0, 1)
            out.append(torch.cat([full, *(r[self._full :] for r in rows), component[-1:]]))
        return tuple(out)

    def _sweep(self, start: Partial, steps: list[Rows]) -> list[Partial]:
        """Exact backpropagation from ``start`` through the steps; the states after each."""
        state, out = start, []
        for step in steps:
            state = _leading(state, step.count)
            direct = tuple(None if c is None else c[step.index] for c in self.inner.later)
            if any(c is not None for c in state):
                dense = _dense(state, self.first, step.count)
                vjp = self.inner.block_vjp(dense, step)
                state = _add(_add(vjp, self.inner.residual.rows(step.index).apply(dense)), direct)
            else:
                state = direct
            out.append(state)
        return out


def _add(a: Partial, b: Partial) -> Partial:
    return tuple(add_values(x, y) for x, y in zip(a, b, strict=True))


def _leading(state: Partial, rows: int) -> Partial:
    return tuple(None if c is None else c[:rows] for c in state)


def _dense(state: Partial, like: State, rows: int) -> State:
    return tuple(x.new_zeros((rows, *x.shape)) if c is None else c for c, x in zip(state, like, strict=True))


def _append_rows(state: Partial, last: Partial, like: State, rows: int) -> Partial:
    """Rows of ``state`` and of ``last``, one after the other; None stays None where both are."""
    return tuple(
        None
        if a is None and b is None
        else torch.cat(
            [
                x.new_zeros((rows, *x.shape)) if a is None else a,
                x.new_zeros((1, *x.shape)) if b is None else b,
            ]
        )
        for a, b, x in zip(state, last, like, strict=True)
    )


def _append_coefficient(a: Coefficient, b: Coefficient, like: Tensor, rows: int) -> Coefficient:
    """Coefficients of ``rows`` blocks and of one more; a number stays one where it is the same for all."""
    if a is None and b is None:
        return None
    if isinstance(a, float) and isinstance(b, float) and a == b:
        return a
    x, y = (like * (0.0 if c is None else c) for c in (a, b))
    shape = torch.broadcast_shapes(x.shape[1:], y.shape[1:])
    return torch.cat([x.expand(rows, *shape), y.expand(1, *shape)])
