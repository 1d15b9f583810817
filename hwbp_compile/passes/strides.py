"""How tensors lie in memory whose sizes may be symbols: comparisons that leave no guard and no trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _compat


def dense_order(size: Sequence[Any], stride: Sequence[Any], elements: Any) -> list[int] | None:
    """The dimensions from the outermost to the innermost, if each of so many elements is there once.

    None if that cannot be told. Dimensions of size 1 come first, whatever their strides.
    """
    sizes, strides = ([_compat.size_expression(x) for x in values] for values in (size, stride))
    if 0 in sizes:
        return list(range(len(sizes))) if _compat.size_expression(elements) == 0 else None
    step = _compat.size_expression(1)
    left = [i for i in range(len(sizes)) if sizes[i] != 1]
    inner: list[int] = []
    while left:
        found = next((i for i in left if strides[i] == step), None)
        if found is None:
            return None
        left.remove(found)
        inner.append(found)
        step = step * sizes[found]
    if step != _compat.size_expression(elements):
        return None
    return [i for i in range(len(sizes)) if i not in inner] + inner[::-1]


def order_of(value: torch.Tensor) -> list[int] | None:
    """The :func:`dense_order` of a tensor."""
    return dense_order(value.shape, value.stride(), value.numel())


def is_contiguous(value: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor with this order is contiguous."""
    matter = [i for i in order if _compat.size_expression(value.shape[i]) != 1]
    return matter == sorted(matter)


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors provably have equal strides; symbolic ones are compared as written."""
    return str(tuple(a.stride())) == str(tuple(b.stride()))


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes another."""
    return [list(order).index(i) for i in range(len(order))]
