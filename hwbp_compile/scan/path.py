"""Accumulate cotangents along a residual path: the paper's ``S``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _compat
from ..residual import Coefficient, ResidualPath, add_values, apply
from .op import linear_scan
from .rows import same_for_all
from .states import states

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
        done[i] = _scan_one(path.diagonal[i], first[i], terms, blocks)
    return tuple(done[i] for i in range(path.size))


def _scan_one(coefficient: Coefficient, first: Tensor, terms: Tensor | None, blocks: int) -> Tensor:
    """One component's recurrence, all rows.

    In a graph it is one operator that makes the first row too. Nothing is fused into it or into what reads
    it, so that all iterations have the same kernels, compiled once.
    """
    if terms is None and isinstance(coefficient, float) and coefficient == 1.0:
        return first.unsqueeze(0).expand((blocks + 1, *first.shape)).contiguous()
    if terms is None:
        terms = first.new_zeros((1, *first.shape)).expand((blocks, *first.shape))
    if coefficient is None:
        return torch.cat([first.unsqueeze(0), terms])
    in_a_graph = _compat.graph_being_traced() is not None
    if isinstance(coefficient, float) and coefficient == 1.0:
        ours = in_a_graph and first.device.type == "cpu" and first.is_floating_point()
        return states(first, terms, 1.0) if ours else _running_sum(first, terms, blocks)
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(terms.dtype)
    if in_a_graph:
        return states(first, terms, coefficient)
    if isinstance(coefficient, float):
        coefficient = same_for_all(terms, coefficient)
    return torch.cat([first.unsqueeze(0), linear_scan(terms, coefficient, first)])


def _running_sum(first: Tensor, terms: Tensor, blocks: int) -> Tensor:
    """The recurrence with coefficients of one, by operators that compilers know: GPUs scan in generated code.

    The first row is made where the others are, by a term of zero before them: a concatenation would copy all,
    and compilers write the parts that they know into it long before the others, which takes its memory.
    """
    # As torch.constant_pad_nd, which fixes symbolic sizes.
    terms = torch.slice_scatter(terms.new_zeros((blocks + 1, *first.shape)), terms, start=1)
    # A half-precision running sum would lose what a sum of autograd's `add`s in float32 keeps.
    wide = torch.float32 if terms.dtype in (torch.float16, torch.bfloat16) else terms.dtype
    return (first.unsqueeze(0).to(wide) + torch.cumsum(terms, 0, dtype=wide)).to(terms.dtype)
