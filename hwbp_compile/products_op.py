"""``hwbp_compile::products``: one product with each of many matrices, which are read where they lie.

For a few rows it takes longer to copy the weights of all blocks into a stack than to multiply with them, and
the copies take as much memory as the weights.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from . import products_cpp

_MOST_ROWS = 256
"""Rows beyond which the kernel is not used, where a program compiled for fewer is given more."""

# A table of addresses, made once for many products, would be a little faster. But a compiler that computed
# the matrices would not see when they are read, and use their memory for something else.
torch.library.define(
    "hwbp_compile::products", "(Tensor x, Tensor[] matrices) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl("hwbp_compile::products", "CPU")
def _products(x: Tensor, matrices: list[Tensor]) -> Tensor:
    kernel = products_cpp.kernel(x.dtype)
    blocks, rows, inner = x.shape
    columns = matrices[0].shape[1]
    # What does not fit raises there; a compiled program knows how many rows there were at first only.
    fits = len(matrices) == blocks and matrices[0].shape[0] == inner and rows <= _MOST_ROWS
    alike = {(each.dtype, each.numel()) for each in matrices} == {(x.dtype, inner * columns)}
    if kernel is None or not fits or not alike or not all(map(Tensor.is_contiguous, matrices)):
        return torch.bmm(x, torch.stack(matrices))
    if x.stride(2) != 1 and inner > 1:
        x = x.contiguous()
    x_jump, x_step, _ = x.stride()
    out = x.new_empty((blocks, rows, columns))
    if out.numel():
        addresses = array("q", map(Tensor.data_ptr, matrices))
        kernel(
            x, addresses.buffer_info()[0], out, blocks, rows, inner, columns, x_jump, x_step,
            torch.get_num_threads(),
        )  # fmt: skip
    return out


@torch.library.register_fake("hwbp_compile::products")
def _fake(x: Tensor, matrices: list[Tensor]) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], matrices[0].shape[1]))
