"""``hwbp_compile::rows``: a tensor taken apart into its rows, each a tensor of its own.

Rows that are views lie at addresses that generated code has as constants: of equal layers whose parameters
are rows of stacks, every one would get kernels of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _compat

# What differs in `again` is not taken for the same: it is for what is to be copied twice.
torch.library.define(
    "hwbp_compile::rows", "(Tensor stack, bool again=False) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.register_fake("hwbp_compile::rows")
def _fake(stack: Tensor, again: bool = False) -> list[Tensor]:
    return [stack.new_empty(stack.shape[1:]) for _ in range(stack.shape[0])]


@torch.library.impl("hwbp_compile::rows", "CompositeExplicitAutograd")
def _rows(stack: Tensor, again: bool = False) -> list[Tensor]:
    return _compat.copies_of(stack.contiguous().unbind(0))
