"""``hwbp_compile::products``: one product with each of many matrices, which are read where they lie.

For a few rows it takes longer to copy the weights of all blocks into a stack than to multiply with them, and
the copies take as much memory as the weights. ``hwbp_compile::addresses`` makes a table of where they are,
once for all products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import products_cpp

torch.library.define(
    "hwbp_compile::addresses", "(Tensor[] matrices) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define(
    "hwbp_compile::products",
    "(Tensor x, Tensor addresses, SymInt columns, int first=0, int step=1) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("hwbp_compile::addresses", "CPU")
def _addresses(matrices: list[Tensor]) -> Tensor:
    matrices = [each.contiguous() for each in matrices]
    # Without a device it would be on the default one.
    table = torch.tensor([each.data_ptr() for each in matrices], device="cpu")
    # They live as long as the table does: a tensor keeps its attributes.
    table.matrices = matrices  # type: ignore[attr-defined]
    return table


@torch.library.register_fake("hwbp_compile::addresses")
def _fake_addresses(matrices: list[Tensor]) -> Tensor:
    return matrices[0].new_empty((len(matrices),), dtype=torch.int64)


def _stacked(addresses: Any) -> Tensor:
    """The matrices of a table in one tensor, copied once."""
    if not hasattr(addresses, "stacked"):
        addresses.stacked = torch.stack(addresses.matrices)
    stacked: Tensor = addresses.stacked
    return stacked


@torch.library.impl("hwbp_compile::products", "CPU")
def _products(x: Tensor, addresses: Any, columns: int, first: int = 0, step: int = 1) -> Tensor:
    kernel = products_cpp.kernel(x.dtype)
    if kernel is None:
        return torch.bmm(x, _stacked(addresses)[first::step][: x.shape[0]])
    blocks, rows, inner = x.shape
    if x.stride(2) != 1 and inner > 1:
        x = x.contiguous()
    x_jump, x_step, _ = x.stride()
    out = x.new_empty((blocks, rows, columns))
    if out.numel():
        threads = torch.get_num_threads()
        kernel(
            x, addresses, out, blocks, rows, inner, columns, x_jump, x_step, first, step, threads
        )  # fmt: skip
    return out


@torch.library.register_fake("hwbp_compile::products")
def _fake_products(x: Tensor, addresses: Tensor, columns: int, first: int = 0, step: int = 1) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], columns))
