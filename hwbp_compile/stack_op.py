"""``hwbp_compile::stack``: tensors put into one, by torch's own kernel.

A compiler that fuses the copies of hundreds of parameters generates a function with as many arguments, which
takes long to compile and several times as long to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("hwbp_compile::stack", "(Tensor[] rows) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hwbp_compile::stack")
def _fake(rows: list[Tensor]) -> Tensor:
    return rows[0].new_empty((len(rows), *rows[0].shape))


@torch.library.impl("hwbp_compile::stack", "CompositeExplicitAutograd")
def _stack(rows: list[Tensor]) -> Tensor:
    # Contiguous, however the rows are.
    return torch.stack(rows, out=_fake(rows))
