"""Batching rules for the operators that ``vmap`` would loop over, refuse or pay for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import CannotRewrite
from .batch import Stacked, align, batching_rule, pointwise, stacked, vmap_rule

aten = torch.ops.aten


@batching_rule("view _unsafe_view reshape")
def _reshape(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    # Stacking gives other strides than the single value had, so a view may have to copy.
    return Stacked(aten.reshape.default(args[0].value, [blocks, *args[1]]))


@batching_rule(
    "sum mean amax split split_with_sizes unbind select slice transpose unsqueeze squeeze flip cumsum "
    "prims::rev"
)
def _along_dimensions(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """Operators that name dimensions: each moves by one.

    ``vmap`` does the same, but takes the number of blocks for a constant even where it is symbolic.
    """
    names = [argument.name for argument in target._schema.arguments]
    given = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    given |= dict(zip(names, args, strict=False)) | kwargs
    dimensions = [name for name in names if name in ("dim", "dims", "dim0", "dim1")]
    if not dimensions or any(given[name] is None for name in dimensions):
        return vmap_rule(target, args, kwargs, blocks)
    for name in dimensions:
        where = given[name]
        given[name] = [_moved(d) for d in where] if isinstance(where, (list, tuple)) else _moved(where)
    positional = [given.pop(name) for name in names[: len(args)]]
    positional[0] = positional[0].value
    out = target(*positional, **{k: v for k, v in given.items() if k in kwargs or k in dimensions})
    return pytree.tree_map_only(Tensor, Stacked, out)


def _moved(dimension: int) -> int:
    """A dimension of one block's tensor in a stack of them; counted from the end it stays."""
    return dimension + 1 if dimension >= 0 else dimension


@batching_rule("permute")
def _permute(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    value, order = args
    rank = value.value.dim() - 1
    return Stacked(target(value.value, [0, *(d % rank + 1 for d in order)]))


@batching_rule("expand")
def _expand(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    value, size = args
    return Stacked(target(align(value.value, len(size)), [blocks, *size], **kwargs))


@batching_rule("cat stack")
def _join(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    values, *rest = args
    dimension = rest[0] if rest else kwargs.get("dim", 0)
    return Stacked(target([stacked(v, blocks) for v in values], _moved(dimension)))


@batching_rule("clone _to_copy alias detach contiguous lift_fresh_copy")
def _copy(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    # A memory format such as channels-last says nothing about a tensor with one more dimension.
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return Stacked(target(args[0].value, **kwargs))


@batching_rule("copy")
def _overwritten(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """``copy(memory, source)``: the source, which may have to be broadcast; nothing of what was there."""
    memory, source = (stacked(x, blocks) for x in args[:2])
    rows = align(source, memory.dim() - 1).to(memory.device, memory.dtype).expand(memory.shape)
    # Not expanded: something may be written to it.
    return Stacked(rows.clone(memory_format=torch.contiguous_format))


@batching_rule("prims::convert_element_type prims::view_of")
def _convert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    return Stacked(target(args[0].value, *args[1:], **kwargs))


@batching_rule("prims::fma")
def _fma(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    return pointwise(target, args, kwargs, blocks)


@batching_rule("select_scatter slice_scatter")
def _scatter(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    value, source, *rest = args
    dim = rest[0] if rest else 0
    rank = value.value.dim() - 1 if isinstance(value, Stacked) else value.dim()
    dim = dim + 1 if dim >= 0 else dim + rank + 1
    return Stacked(target(stacked(value, blocks), stacked(source, blocks), dim, *rest[1:], **kwargs))


@batching_rule("index_put _unsafe_index_put index_add index_copy scatter scatter_add")
def _write(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """Each block has memory of its own to write to.

    ``vmap`` would expand what the blocks share, and Inductor (2.13) then writes the rows over each other.
    """
    memory, *rest = args
    if not isinstance(memory, Stacked):
        memory = Stacked(stacked(memory, blocks).clone(memory_format=torch.contiguous_format))
    return vmap_rule(target, (memory, *rest), kwargs, blocks)


@batching_rule("convolution_backward")
def _convolution_backward(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """Blocks join the groups of the convolution if their weights differ, the batch if not."""
    grad, value, weight, _, *settings, groups, (to_value, to_weight, to_bias) = args
    grad, value = stacked(grad, blocks), stacked(value, blocks)
    bias = Stacked(grad.sum([1, *range(3, grad.dim())])) if to_bias else None
    if not to_value and not to_weight:
        return None, None, bias
    if not isinstance(weight, Stacked) and not to_weight:
        mask = [True, False, False]
        out = target(grad.flatten(0, 1), value.flatten(0, 1), weight, None, *settings, groups, mask)[0]
        return Stacked(out.reshape(value.shape)), None, bias
    # [n, B, C, ...] -> [B, n * C, ...]
    merged = [x.movedim(0, 1).flatten(1, 2) for x in (grad, value)]
    weights = stacked(weight, blocks)
    mask = [to_value, to_weight, False]
    out = target(*merged, weights.flatten(0, 1), None, *settings, groups * blocks, mask)
    batch, channels = value.shape[1], value.shape[2]
    return (
        Stacked(out[0].reshape(batch, blocks, channels, *value.shape[3:]).movedim(1, 0))
        if to_value
        else None,
        Stacked(out[1].reshape(weights.shape)) if to_weight else None,
        bias,
    )


_ATTENTION_FOLDED = {"grad_out", "grad_out_", "query", "key", "value", "out", "logsumexp"}
_ATTENTION_BIAS = {"attn_mask", "attn_bias"}


@batching_rule(
    "_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward "
    "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward"
)
def _attention_backward(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """Fold the blocks into the batch; ``vmap`` would loop over them."""
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("dropout_p", 0.0):
        raise CannotRewrite(
            f"unsupported operator {target} with dropout (its random state differs between blocks)"
        )
    batch = stacked(given["query"], blocks).shape[1]

    def fold(name: str, value: Any) -> Any:
        if name in _ATTENTION_FOLDED:
            return stacked(value, blocks).flatten(0, 1)
        if name in _ATTENTION_BIAS and value is not None:
            if not isinstance(value, Stacked) and value.dim() < 4:
                return value
            rows = align(stacked(value, blocks), 4)
            return rows.expand(blocks, batch, *rows.shape[2:]).flatten(0, 1)
        # What is left differs only in random state that is unused without dropout.
        return value.value[0] if isinstance(value, Stacked) else value

    folded = {name: fold(name, value) for name, value in given.items()}
    positional = [folded.pop(name) for name in names[: len(args)]]
    outputs = target(*positional, **folded)
    return tuple(
        Stacked(o.reshape(blocks, batch, *o.shape[1:])) if isinstance(o, Tensor) and o.dim() == 4 else o
        for o in outputs
    )


@batching_rule("mm")
def _mm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """One large product where a factor is shared, a batch of small ones where not."""
    a, b = args
    if isinstance(a, Stacked) and isinstance(b, Stacked):
        return Stacked(aten.bmm.default(a.value, b.value))
    if isinstance(a, Stacked):
        rows = a.value.shape[1]
        return Stacked(aten.mm.default(a.value.flatten(0, 1), b).reshape(blocks, rows, b.shape[1]))
    return vmap_rule(target, args, kwargs, blocks)


@batching_rule("addmm")
def _addmm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """One large product where only the left factor differs between the blocks."""
    bias, a, b = args
    if isinstance(a, Stacked) and not isinstance(b, Stacked) and isinstance(bias, Tensor) and bias.dim() == 1:
        rows = a.value.shape[1]
        out = target(bias, a.value.flatten(0, 1), b, **kwargs)
        return Stacked(out.reshape(blocks, rows, b.shape[1]))
    return vmap_rule(target, args, kwargs, blocks)
