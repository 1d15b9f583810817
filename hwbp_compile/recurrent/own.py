"""``hwbp_compile::own``: a copy that no compiler takes away.

A result that shares memory with what is saved for the backward pass must not reach the user: compiled code
does not notice where it is written to. Compilers know a plain clone and drop it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define("hwbp_compile::own", "(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def own(x: Tensor) -> Tensor:
    """A contiguous copy, differentiable."""
    result: Tensor = torch.ops.hwbp_compile.own.default(x)
    return result


@torch.library.impl("hwbp_compile::own", "default")
def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("hwbp_compile::own")
def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


torch.library.register_autograd("hwbp_compile::own", _backward)
