"""``hwbp_compile::cell_outputs``: what a cell returns besides its state, for all steps at once.

It depends on the states, and no state on it, so it is computed once they are known; it is differentiable as
any other operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _compat

torch.library.define(
    "hwbp_compile::cell_outputs",
    "(Tensor[] before, Tensor[] after, Tensor[] inputs, Tensor[] weights, str cell) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)

OUTPUTS: dict[str, Callable[..., Any]] = {}
"""By name, what a cell returns in one step, from the state before and after it, its inputs and weights."""


@torch.library.impl("hwbp_compile::cell_outputs", "CompositeImplicitAutograd")
def _cell_outputs(
    before: list[Tensor], after: list[Tensor], inputs: list[Tensor], weights: list[Tensor], cell: str
) -> list[Tensor]:
    return outputs_of(OUTPUTS[cell], [*before, *after, *inputs], weights)


def outputs_of(
    function: Callable[..., Any], over_time: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs of all steps, ``[T, ...]`` each; in no case step by step.

    Raises:
        RuntimeError: an operator cannot be batched over the steps.
    """
    dims = (0,) * len(over_time) + (None,) * len(weights)
    with _compat.vmap_fallback_is_an_error():
        return list(torch.vmap(function, in_dims=dims, randomness="error")(*over_time, *weights))
