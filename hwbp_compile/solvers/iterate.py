"""Highway-BP: alternate all blocks' VJPs with one scan along the residual path.

The chain's cotangents solve ``(I - K') w = b + J' w`` for every way to write the blocks' Jacobians as
``K' + J'``. The iteration

    w <- (I - K')^-1 (b + J' w)

starts from ``J' = 0``: the paper's ``w0``. It is exact after as many iterations as there are blocks, since
both operators are strictly triangular. ``gamma`` and ``group_size`` only choose the split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..residual import ResidualPath, add, add_values
from ..scan.path import scan_path
from ..stage import INSIDE, RESIDUAL, stage
from ..system import Rows, State, System
from .group import GroupedSystem
from .observe import Observer


def solve(
    system: System,
    *,
    iterations: int,
    gamma: float = 0.0,
    group_size: int = 1,
    exact_tail: int = 0,
) -> State:
    """Return the cotangents of every state of the chain, stacked: ``[blocks + 1, ...]`` per component.

    Args:
        system: the chain.
        iterations: the paper's k. More than the number of (groups of) blocks changes nothing.
        gamma: the share of the residual path counted as part of the block; 1 is fixed-point iteration.
        group_size: so many consecutive blocks count as one. Groups are counted from the loss, so the group
            next to the input is the short one when the number of blocks is no multiple.
        exact_tail: so many blocks next to the input are swept exactly, one by one, after the iteration.

    Row ``p + 1`` is the cotangent of block ``p``'s input; row 0 is ``system.first``.
    """
    if exact_tail >= system.blocks:
        return sweep(system, system.first, 0, system.blocks)
    head = system.blocks - exact_tail
    if exact_tail:
        w = solve(HeadSystem(system, head), iterations=iterations, gamma=gamma, group_size=group_size)
        tail = sweep(system, tuple(c[-1] for c in w), head, exact_tail)
        return tuple(torch.cat([a, b[1:]]) for a, b in zip(w, tail, strict=True))
    if group_size > 1:
        grouped = GroupedSystem(system, group_size)
        w = iterate(grouped, iterations, gamma)
        with stage(INSIDE):
            return grouped.expand(w)
    return iterate(system, iterations, gamma)


def iterate(system: System, iterations: int, gamma: float) -> State:
    """The plain iteration over a system's blocks; arguments and result as in :func:`solve`."""
    blocks = system.blocks
    kept, moved, order = split_path(system.residual, gamma)
    with stage(RESIDUAL):
        w = scan_path(kept, order, system.first, system.later, blocks)
    observer = Observer(w, blocks)
    for number in range(1, min(iterations, blocks) + 1):
        with stage(number):
            rows = tuple(c[:-1] for c in w)
            v = system.block_vjp(rows, Rows(0, blocks))
            terms = tuple(
                add_values(add_values(block, path), direct)
                for block, path, direct in zip(v, moved.apply(rows), system.later, strict=True)
            )
            w = scan_path(kept, order, system.first, terms, blocks)
        observer.see(w)
    observer.mark()
    return w


def sweep(system: System, first: State, start: int, count: int) -> State:
    """Exact backpropagation through ``count`` blocks from ``start``, one by one: ``[count + 1, ...]``."""
    rows: list[State] = [first]
    for p in (start + i for i in range(count)):
        here = Rows(p, p + 1)
        w = tuple(c.unsqueeze(0) for c in rows[-1])
        parts = (system.block_vjp(w, here), system.residual.rows(here.index).apply(w))
        direct = tuple(None if c is None else c[p : p + 1] for c in system.later)
        total = [add_values(add_values(j, k), b) for j, k, b in zip(*parts, direct, strict=True)]
        rows.append(tuple(_not_none(c).squeeze(0) for c in total))
    return tuple(torch.stack(component) for component in zip(*rows, strict=True))


class HeadSystem:
    """The first blocks of another system, those next to the loss."""

    def __init__(self, system: System, blocks: int) -> None:
        self.blocks = blocks
        self.first = system.first
        self.later = tuple(None if c is None else c[:blocks] for c in system.later)
        self.residual = system.residual.rows(slice(0, blocks))
        self.block_vjp = system.block_vjp


def split_path(residual: ResidualPath, gamma: float) -> tuple[ResidualPath, ResidualPath, tuple[int, ...]]:
    """What of ``K`` is scanned, what counts as part of the blocks, and the order of the components."""
    kept, dropped, order = residual.split_triangular()
    return kept.scaled(1.0 - gamma), _sum_paths(kept.scaled(gamma), dropped), order


def _sum_paths(a: ResidualPath, b: ResidualPath) -> ResidualPath:
    return ResidualPath(
        tuple(tuple(map(add, p, q)) for p, q in zip(a.entries, b.entries, strict=True)),
    )


def _not_none(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
