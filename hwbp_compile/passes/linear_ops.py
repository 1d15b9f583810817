"""Which operators are linear, and in which of their arguments.

A backward graph is linear in its tangents, but a custom ``autograd.Function`` may do anything. A block is
rewritten only if every operator in it is listed here and is used linearly; others leave the chain exact.

Kinds of linearity:

* ``joint``: linear in all listed arguments together (``add``, ``cat``). An argument that does not depend
  on the cotangent is an affine term.
* ``one_of``: a product (``mul``, ``mm``), linear when exactly one of its factors depends on the cotangent.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..errors import CannotRewrite


@dataclass(frozen=True, slots=True)
class Linearity:
    """Argument positions (of the schema) in which an operator is linear, and how; see the module's text."""

    kind: str
    positions: tuple[int, ...]


def _joint(*positions: int) -> Linearity:
    return Linearity("joint", positions)


def _one_of(*positions: int) -> Linearity:
    return Linearity("one_of", positions)


LINEARITY: dict[str, Linearity] = {}
"""Schema name, such as ``"aten::add"``, to its linearity."""


def register_linear(names: str, linearity: Linearity) -> None:
    """Declare the operators of a space-separated list of schema names to be linear."""
    for name in names.split():
        LINEARITY[name if "::" in name else f"aten::{name}"] = linearity


FIRST = _joint(0)
register_linear("add sub", _joint(0, 1))
register_linear("mul", _one_of(0, 1))
register_linear("mm bmm matmul mv dot outer", _one_of(0, 1))
register_linear("div true_divide", FIRST)
register_linear(
    "neg clone alias detach view _unsafe_view reshape permute transpose t expand squeeze unsqueeze slice "
    "select "
    "split split_with_sizes unbind sum mean flip roll constant_pad_nd _to_copy to diagonal tril triu repeat "
    "slice_backward select_backward diagonal_backward cumsum index gather unfold lift_fresh_copy contiguous "
    "movedim view_as_real view_as_complex real _conj conj_physical _fft_c2c _fft_r2c _fft_c2r",
    FIRST,
)
register_linear("prims::convert_element_type prims::view_of prims::rev", FIRST)
register_linear("cat stack", FIRST)
register_linear("where", _joint(1, 2))
register_linear("slice_scatter select_scatter diagonal_scatter copy", _joint(0, 1))
register_linear("masked_fill", FIRST)
register_linear("scatter scatter_add index_add index_copy _unsafe_masked_index_put_accumulate", _joint(0, 3))
register_linear("index_put _unsafe_index_put", _joint(0, 2))
register_linear("_unsafe_masked_index", FIRST)
register_linear("linalg_lu_solve", _joint(2))
register_linear("linalg_solve_triangular", _joint(1))
register_linear("cholesky_solve", FIRST)
register_linear(
    "convolution_backward max_pool2d_with_indices_backward avg_pool2d_backward avg_pool3d_backward "
    "max_pool3d_with_indices_backward adaptive_max_pool2d_backward adaptive_max_pool3d_backward "
    "_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward grid_sampler_2d_backward "
    "grid_sampler_3d_backward _cdist_backward reflection_pad1d_backward reflection_pad2d_backward "
    "reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward "
    "replication_pad3d_backward upsample_nearest1d_backward upsample_nearest2d_backward "
    "upsample_nearest3d_backward upsample_linear1d_backward upsample_bilinear2d_backward "
    "upsample_bicubic2d_backward upsample_trilinear3d_backward "
    "native_dropout_backward _softmax_backward_data _log_softmax_backward_data gelu_backward silu_backward "
    "threshold_backward tanh_backward sigmoid_backward elu_backward hardtanh_backward leaky_relu_backward "
    "hardswish_backward hardsigmoid_backward softplus_backward native_layer_norm_backward "
    "native_group_norm_backward native_batch_norm_backward _fused_rms_norm_backward embedding_dense_backward "
    "_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward "
    "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward "
    "col2im im2col",
    FIRST,
)
register_linear("convolution", FIRST)

_FILLS = {"aten::masked_fill": 2, "aten::_unsafe_masked_index": 3}
"""Which argument takes the place of what is masked."""

MATRIX_PRODUCTS = frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"})
"""Products of matrices, alone or in batches, which are their last two operands."""

PRODUCTS = {
    "prims::fma": (0, 1, 2),
    "aten::addcmul": (1, 2, 0),
    "aten::addmm": (1, 2, 0),
    "aten::baddbmm": (1, 2, 0),
}
"""``a * b + c`` in one operator: the positions of a, b, c."""

HEAVY = {
    *(f"aten::{name}" for name in ("mm", "bmm", "matmul", "addmm", "baddbmm", "mv", "outer")),
    "aten::convolution",
    "aten::convolution_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_cudnn_attention_backward",
}
"""Operators that make a block worth doing in parallel with others."""


def op_name(node: Node) -> str:
    """The schema name of a node's operator, such as ``"aten::add"``; ``"getitem"`` for tuple access."""
    return target_name(node.target)


def target_name(target: Any) -> str:
    """The schema name of an operator."""
    if target is operator.getitem:
        return "getitem"
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None else str(target)


def is_heavy(node: Node) -> bool:
    """Whether the operator is one that parallel execution pays for."""
    return node.op == "call_function" and op_name(node) in HEAVY


def nodes_in(argument: Any) -> Iterator[Node]:
    """The nodes inside one (possibly nested) argument."""
    for leaf in pytree.tree_leaves(argument):
        if isinstance(leaf, Node):
            yield leaf


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes are provably equal; symbolic sizes are compared as written, which adds no guard."""
    return tuple(map(str, a.shape)) == tuple(map(str, b.shape))


def is_zero_constant(node: Node) -> bool:
    """Whether a node is provably filled with zeros."""
    while op_name(node) in ("aten::expand", "aten::view", "aten::alias", "aten::clone") and isinstance(
        node.args[0], Node
    ):
        node = node.args[0]
    name = op_name(node)
    if name in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
        return True
    position = {"aten::full": 1, "aten::full_like": 1, "aten::new_full": 2, "aten::scalar_tensor": 0}.get(
        name
    )
    return position is not None and len(node.args) > position and _is_zero(node.args[position])


def _is_continuous(value: Any) -> bool:
    """Whether a value consists of floating-point or complex tensors: rounding to integers is not linear."""
    if isinstance(value, (tuple, list)):
        return all(v is None or _is_continuous(v) for v in value)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


def check_linear(node: Node, dependent: set[Node]) -> None:
    """Raise :class:`CannotRewrite` unless ``node`` is linear in its operands in ``dependent``.

    Constant affine terms (``add(x, saved)``) are allowed: they join the direct gradients.
    """
    name = op_name(node)
    if not _is_continuous(node.meta.get("val")):
        raise CannotRewrite(
            f"{node.target} turns a gradient into something that is no floating-point tensor", node
        )
    if name == "getitem":
        return
    if node.target is torch.ops.aten.view.dtype:
        raise CannotRewrite(f"{node.target} reads a gradient's bits as another dtype", node)
    if node.kwargs.get("rounding_mode") is not None:
        raise CannotRewrite(f"{node.target} rounds the gradient", node)
    uses = [i for i, argument in enumerate(node.args) if any(n in dependent for n in nodes_in(argument))]
    if any(n in dependent for n in nodes_in(node.kwargs)):
        raise CannotRewrite(
            f"unsupported operator {node.target} (a gradient is passed to it by keyword)", node
        )
    if name in PRODUCTS:
        a, b, _ = PRODUCTS[name]
        if a in uses and b in uses:
            raise CannotRewrite(f"{node.target} multiplies two gradients, so the block is not linear", node)
        if node.kwargs:
            raise CannotRewrite(f"unsupported operator {node.target} with scaling keywords", node)
        return
    linearity = LINEARITY.get(name)
    if linearity is None:
        raise CannotRewrite(
            f"unsupported operator {node.target} (not known to be linear in the gradient)", node
        )
    if any(i not in linearity.positions for i in uses):
        raise CannotRewrite(
            f"{node.target} is not linear in one of its arguments that carry a gradient", node
        )
    if linearity.kind == "one_of" and len(uses) != 1:
        raise CannotRewrite(f"{node.target} multiplies two gradients, so the block is not linear", node)
    if name in _FILLS:
        fill = node.args[_FILLS[name]]
        if not (_is_zero(fill) or (isinstance(fill, Node) and is_zero_constant(fill))):
            raise CannotRewrite(f"{node.target} with a fill value other than zero", node)
    if name == "aten::constant_pad_nd" and len(node.args) > 2 and not _is_zero(node.args[2]):
        raise CannotRewrite(f"{node.target} with a fill value other than zero", node)
    if name == "aten::convolution" and node.args[2] is not None:
        raise CannotRewrite(f"{node.target} adds a bias to the gradient", node)
    for position in linearity.positions if linearity.kind == "joint" else ():
        argument = node.args[position] if position < len(node.args) else None
        if isinstance(argument, (int, float)) and not _is_zero(argument):
            raise CannotRewrite(f"{node.target} adds a constant to the gradient", node)
