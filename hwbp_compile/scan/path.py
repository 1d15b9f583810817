"""Accumulate cotangents along a residual path: the paper's ``S``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..residual import Coefficient, ResidualPath, add_values, apply
from .op import linear_scan

State = tuple[Tensor, ...]


def scan_path(
    path: ResidualPath, order: tuple[int, ...], first: State, later: tuple[Tensor | None, ...], blocks: int
) -> State:
    """Return ``u[0] = first``, ``u[p + 1] = later[p] + K_p u[p]``, stacked: ``[blocks + 1, ...]``.

    Args:
        path: ``K``, scannable in ``order`` (see :meth:`ResidualPath.split_triangular`).
        order: the order in which components are resolved.
        first: one state.
        later: stacked rows per component, None for zero.
        blocks: the number of rows of ``later``.
    """
    done: dict[int, Tensor] = {}
    for i in order:
        terms = later[i]
        for j, entry in enumerate(path.entries[i]):
            if j != i and entry is not None:
                terms = add_values(terms, apply(entry, done[j][:-1]))
        done[i] = _scan_one(path.from_first[i], first[i], terms, blocks)
    return tuple(done[i] for i in range(path.size))


def _scan_one(coefficient: Coefficient, first: Tensor, terms: Tensor | None, blocks: int) -> Tensor:
    """One component's recurrence, all rows; a tensor has a coefficient more, see :attr:`.from_first`.

    The first row is made where the others are, by a term of zero before them: a concatenation would copy all,
    and compilers write the parts that they know into it long before the others, which takes its memory.
    """
    if terms is None and isinstance(coefficient, float) and coefficient == 1.0:
        return first.unsqueeze(0).expand((blocks + 1, *first.shape)).contiguous()
    if terms is None:
        terms = first.new_zeros((blocks, *first.shape))
    if coefficient is None:
        return torch.cat([first.unsqueeze(0), terms])
    # As torch.constant_pad_nd, which fixes symbolic sizes.
    terms = torch.slice_scatter(terms.new_zeros((blocks + 1, *first.shape)), terms, start=1)
    if isinstance(coefficient, float):
        if coefficient == 1.0:
            # A half-precision running sum would lose what a sum of autograd's `add`s in float32 keeps.
            wide = torch.float32 if terms.dtype in (torch.float16, torch.bfloat16) else terms.dtype
            return (first.unsqueeze(0).to(wide) + torch.cumsum(terms, 0, dtype=wide)).to(terms.dtype)
        one = (1,) * (terms.dim() - 1)
        coefficient = torch.cat([terms.new_ones((1, *one)), terms.new_full((blocks, *one), coefficient)])
    return linear_scan(terms, coefficient.to(terms.dtype), first)
