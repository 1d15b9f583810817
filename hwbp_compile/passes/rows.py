"""Take rows of a stack and put rows of several stacks together, in few nodes however many there are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def gather(stack: Tensor, rows: Sequence[int]) -> Tensor:
    """``stack[rows]``: a slice if they are evenly spaced."""
    if len(rows) == 1:
        return stack[rows[0] : rows[0] + 1]
    step = rows[1] - rows[0]
    if step > 0 and all(b - a == step for a, b in pairwise(rows)):
        whole = rows[0] == 0 and step == 1 and len(rows) == stack.shape[0]
        return stack if whole else stack[rows[0] : rows[-1] + 1 : step]
    return torch.cat([stack[a:b] for a, b in _stretches(rows)])


def _stretches(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive rows as half-open intervals."""
    out: list[tuple[int, int]] = []
    for row in rows:
        if out and out[-1][1] == row:
            out[-1] = (out[-1][0], row + 1)
        else:
            out.append((row, row + 1))
    return out


def interleave(parts: Sequence[tuple[Sequence[int], Tensor]], count: int) -> Tensor:
    """The inverse of gathering: row ``at[i]`` of the result is row ``i`` of the part it belongs to.

    Args:
        parts: pairs ``(at, rows)``; all ``at`` together are ``range(count)``.
        count: the number of rows of the result.
    """
    if len(parts) == 1:
        return parts[0][1]
    owner = [0] * count
    place = [0] * count
    for number, (at, _) in enumerate(parts):
        for i, row in enumerate(at):
            owner[row], place[row] = number, i
    pieces = []
    start = 0
    while start < count:
        period, length = _longest_pattern(owner, start)
        repeats = length // period
        columns = []
        for j in range(period):
            row = start + j
            stack, step = parts[owner[row]][1], _step(owner, start, period)[j]
            first = place[row]
            columns.append(stack[first : first + (repeats - 1) * step + 1 : step])
        pieces.append(columns[0] if period == 1 else torch.stack(columns, 1).flatten(0, 1))
        start += length
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _step(owner: Sequence[int], start: int, period: int) -> list[int]:
    """How far apart the rows of each column lie in their stack: its owner's share of one period."""
    pattern = owner[start : start + period]
    return [pattern.count(o) for o in pattern]


def _longest_pattern(owner: Sequence[int], start: int) -> tuple[int, int]:
    """The repeated pattern from ``start`` that covers most rows: its period and the rows covered."""
    best = (1, 1)
    for period in range(1, 9):
        end = start + period
        while end < len(owner) and owner[end] == owner[end - period]:
            end += 1
        length = (end - start) // period * period
        if length > best[1] and (period == 1 or length >= 2 * period):
            best = (period, length)
    return best
