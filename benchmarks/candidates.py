"""Other ways to iterate, which the package does not have: to be measured beside the one it has.

Each takes the place of :func:`hwbp_compile.solvers.iterate.iterate` and, like it, evaluates the VJPs of all
blocks k times; but for Krylov's they are exact at k = L as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor

import hwbp_compile.solvers.iterate as plain
from hwbp_compile.residual import ResidualPath, add, add_values
from hwbp_compile.scan.path import scan_path
from hwbp_compile.system import Rows, State, System

Iterate = Callable[[System, int, float], State]
CLAMP = 0.9
TINY = 1e-30
RIDGE = 1e-6


def _terms(system: System, rest: ResidualPath, w: State) -> tuple[Tensor | None, ...]:
    """What all blocks but for the scanned path make of the cotangents."""
    rows = tuple(c[:-1] for c in w)
    blocks = system.block_vjp(rows, Rows(0, system.blocks))
    return tuple(add_values(b, p) for b, p in zip(blocks, rest.apply(rows), strict=True))


def _with_direct(system: System, terms: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(add_values(t, d) for t, d in zip(terms, system.later, strict=True))


def _plus_diagonal(path: ResidualPath, diagonal: list[Tensor | None]) -> ResidualPath:
    return ResidualPath(
        tuple(
            tuple(add(e, diagonal[i]) if i == j else e for j, e in enumerate(row))
            for i, row in enumerate(path.entries)
        )
    )


def fitted(each_block: bool) -> Iterate:
    """Besides K, scan along ``a I``: a is the least-squares fit of the blocks' VJPs of the last iterate."""

    def iterate(system: System, iterations: int, gamma: float) -> State:
        kept, rest, order = plain.split_path(system.residual, gamma)
        w = scan_path(kept, order, system.first, system.later, system.blocks)
        for _ in range(min(iterations, system.blocks)):
            terms = _terms(system, rest, w)
            scalars: list[Tensor | None] = []
            moved: list[Tensor | None] = []
            for term, rows in zip(terms, (c[:-1] for c in w), strict=True):
                if term is None:
                    scalars.append(None)
                    moved.append(None)
                    continue
                over = tuple(range(1 if each_block else 0, rows.dim()))
                dot, square = ((x * rows).sum(over, keepdim=True) for x in (term, rows))
                scalar = (dot / square.clamp(min=TINY)).clamp(-CLAMP, CLAMP)
                scalars.append(scalar.expand(rows.shape[0], *scalar.shape[1:]))
                moved.append(term - scalar * rows)
            path = _plus_diagonal(kept, scalars)
            w = scan_path(path, order, system.first, _with_direct(system, tuple(moved)), system.blocks)
        return w

    return iterate


def diagonal(system: System, iterations: int, gamma: float) -> State:
    """Scan along the whole diagonal of the blocks' Jacobians, found by a VJP of each unit vector.

    Only where the last dimension is all that a block mixes, as over time; the diagonal's VJPs, of which an
    analytic formula would need none, are not counted.
    """
    kept, rest, order = plain.split_path(system.residual, gamma)
    like = tuple(c.expand(system.blocks, *c.shape) for c in system.first)
    found: list[Tensor | None] = []
    for i, component in enumerate(like):
        columns = []
        for unit in range(component.shape[-1]):
            vector = [torch.zeros_like(c) for c in like]
            vector[i] = vector[i].index_fill(-1, torch.tensor(unit, device=component.device), 1.0)
            image = system.block_vjp(tuple(vector), Rows(0, system.blocks))[i]
            columns.append(image[..., unit])
        found.append(torch.stack(columns, -1))
    path = _plus_diagonal(kept, found)
    w = scan_path(path, order, system.first, system.later, system.blocks)
    for _ in range(min(iterations, system.blocks)):
        rows = tuple(c[:-1] for c in w)
        terms = tuple(
            None if t is None or d is None else t - d * r
            for t, d, r in zip(_terms(system, rest, w), found, rows, strict=True)
        )
        w = scan_path(path, order, system.first, _with_direct(system, terms), system.blocks)
    return w


def krylov(system: System, iterations: int, gamma: float) -> State:
    """The combination of the iterates with the smallest residual, each block's relative to its cotangent."""
    kept, rest, order = plain.split_path(system.residual, gamma)
    iterates = [scan_path(kept, order, system.first, system.later, system.blocks)]
    for _ in range(min(iterations, system.blocks)):
        terms = _with_direct(system, _terms(system, rest, iterates[-1]))
        iterates.append(scan_path(kept, order, system.first, terms, system.blocks))
    if len(iterates) < 3:
        return iterates[-1]
    flat = [torch.cat([c[1:].float().flatten(1) for c in w], 1) for w in iterates]
    scale = 1 / flat[-1].norm(dim=1, keepdim=True).clamp(min=TINY)
    steps = [b - a for a, b in pairwise(flat)]  # the residuals of all iterates but the last
    columns = torch.stack([((a - b) * scale).flatten() for a, b in pairwise(steps)], 1)
    gram = columns.T @ columns
    gram = gram + RIDGE * torch.diag(gram.diagonal()) + TINY * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, columns.T @ (steps[0] * scale).flatten())
    # Of the iterates one further, so that the last VJP counts as well.
    combined = list(iterates[1])
    for weight, (a, b) in zip(weights, pairwise(iterates[1:]), strict=True):
        combined = [c + weight * (y - x) for c, x, y in zip(combined, a, b, strict=True)]
    return tuple(combined)


@contextmanager
def instead(candidate: Iterate | None) -> Iterator[None]:
    """Let a candidate take the place of the package's iteration."""
    if candidate is None:
        yield
        return
    with mock.patch.object(plain, "iterate", candidate):
        yield


CANDIDATES: dict[str, Iterate] = {
    "a scalar for each block, fitted": fitted(True),
    "one scalar, fitted": fitted(False),
    "Krylov": krylov,
}
OVER_TIME: dict[str, Iterate] = {"whole diagonal": diagonal}
