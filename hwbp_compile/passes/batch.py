"""Fifth pass: one operator for several blocks at once.

Values that differ between the blocks carry the block as their first dimension (:class:`Stacked`); shared
ones, such as the weights of an unrolled RNN, do not. An operator is batched by its rule if it has one, else
by ``vmap`` of that single operator. Never by ``vmap`` of a whole block: some operators would silently fall
back to a loop over the blocks there. Here such a fallback is an error, and the chain is left exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from .._compat import vmap_fallback_is_an_error
from ..errors import CannotRewrite
from .linear_ops import target_name


@dataclass(frozen=True, slots=True)
class Stacked:
    """A tensor ``[blocks, ...]`` with one row per block."""

    value: Tensor


Rule = Callable[[Any, tuple[Any, ...], dict[str, Any], int], Any]
RULES: dict[str, Rule] = {}
"""Schema name to batching rule."""


def batching_rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for a space-separated list of operators (``"aten::"`` may be left out).

    A rule gets ``(target, args, kwargs, blocks)``, with some arguments :class:`Stacked`, and returns what the
    operator would, its tensors ``Stacked``. It must not loop over the blocks; if it cannot do otherwise it
    raises :class:`CannotRewrite`.
    """

    def register(rule: Rule) -> Rule:
        for name in names.split():
            RULES[name if "::" in name else f"aten::{name}"] = rule
        return rule

    return register


def batched_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int, node: Node) -> Any:
    """Evaluate ``target`` for all blocks. ``node`` is named if that is not possible."""
    name = target_name(target)
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, Stacked) for leaf in leaves):
        if name in ("aten::view", "aten::_unsafe_view"):
            return torch.ops.aten.reshape.default(*args)
        return target(*args, **kwargs)
    rule = RULES.get(name)
    if rule is None:
        rule = pointwise if torch.Tag.pointwise in getattr(target, "tags", ()) else vmap_rule
    try:
        return rule(target, args, kwargs, blocks)
    except CannotRewrite as refusal:
        raise CannotRewrite(refusal.reason, node) from refusal


def vmap_rule(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """``torch.vmap`` of the one operator; refused where it would loop over the blocks."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Stacked)]

    def call(*values: Tensor) -> Any:
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        a, k = pytree.tree_unflatten(filled, spec)
        # Of several gradients those that nobody wants are None, which vmap does not take.
        return pytree.tree_map(lambda result: () if result is None else result, target(*a, **k))

    try:
        with vmap_fallback_is_an_error():
            out = torch.vmap(call, randomness="error")(*(leaves[i].value for i in where))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise CannotRewrite(
            f"unsupported operator {target} (it cannot be batched over the blocks)"
        ) from error
    return pytree.tree_map_only(Tensor, Stacked, out)


def pointwise(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """Elementwise operators: line the trailing dimensions up and broadcast."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    rank = max(
        leaf.value.dim() - 1 if isinstance(leaf, Stacked) else leaf.dim()
        for leaf in leaves
        if isinstance(leaf, (Stacked, Tensor))
    )
    tensors = [leaf for leaf in leaves if isinstance(leaf, (Stacked, Tensor))]
    aligned = [align(_as_one(leaf, tensors), rank) if isinstance(leaf, Stacked) else leaf for leaf in leaves]
    a, k = pytree.tree_unflatten(aligned, spec)
    return pytree.tree_map_only(Tensor, Stacked, target(*a, **k))


def _as_one(scalars: Stacked, operands: Sequence[Stacked | Tensor]) -> Tensor:
    """A stack in the type in which it takes part: scalars take that of tensors of the same kind beside them.

    Stacked they have a dimension, and would make the result as wide as they are.
    """
    others = [x.value.dtype if isinstance(x, Stacked) else x.dtype for x in operands if _has_dimensions(x)]
    value = scalars.value
    if _has_dimensions(scalars) or not others:
        return value
    wide = functools.reduce(torch.promote_types, others)
    alike = (wide.is_complex, wide.is_floating_point) == (value.is_complex(), value.is_floating_point())
    return value.to(wide) if alike and torch.bool not in (wide, value.dtype) else value


def _has_dimensions(x: Stacked | Tensor) -> bool:
    return x.value.dim() > 1 if isinstance(x, Stacked) else x.dim() > 0


def align(value: Tensor, rank: int) -> Tensor:
    """Give a stacked tensor ``rank`` dimensions after the first."""
    missing = rank - (value.dim() - 1)
    return value if missing == 0 else value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:])


def stacked(value: Any, blocks: int) -> Tensor:
    """The rows of a value; one that all blocks share is expanded."""
    return value.value if isinstance(value, Stacked) else value.unsqueeze(0).expand(blocks, *value.shape)


def rows_of(value: Any, like: Tensor, blocks: int) -> Tensor:
    """The rows of a cotangent or a coefficient, where None is zero; ``like`` is one row."""
    return like.new_zeros((blocks, *like.shape)) if value is None else stacked(value, blocks)
