"""A layer that is left exact, as the library trains it: its forward and its backward pass, each run once.

A library's backward pass needs more of its forward than the outputs: a workspace whose size only the
library knows, or a graph of many small operators. Compiled code hands nothing but tensors of known shapes
from one pass to the other. So the forward returns an empty tensor besides, and all that is needed lives as an
attribute of its storage, as long as that does. Where it gets lost (hooks that copy saved tensors), the
forward runs once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _compat

torch.library.define(
    "hwbp_compile::library_training",
    "(Tensor x, Tensor[] carry, Tensor[] weights, str kind) -> Tensor[]",
    tags=_compat.TAGS_OF_PYTHON_STATE,
)
torch.library.define(
    "hwbp_compile::library_backward",
    "(Tensor x, Tensor[] carry, Tensor[] weights, str kind, Tensor[] kept, Tensor?[] grads) -> Tensor[]",
    tags=_compat.TAGS_OF_PYTHON_STATE,
)

_RUN = "_hwbp_compile_run"


def library_inference(
    x: Tensor, carry: Sequence[Tensor], weights: Sequence[Tensor], kind: str
) -> list[Tensor]:
    """The forward pass alone. Arguments and results as of :func:`.layer.recurrent_layer`."""
    with torch.no_grad(), _compat.without_autocast(x.device):
        y, *last = call_library(x, carry, weights, kind, training=False)
    return _own([y, *last])


def library_training(
    x: Tensor, carry: Sequence[Tensor], weights: Sequence[Tensor], kind: str
) -> list[Tensor]:
    """The same, differentiable by the library."""
    operator = torch.ops.hwbp_compile.library_training.default
    found: list[Tensor] = operator(x, list(carry), list(weights), kind)
    return found[:-1]


def library_backward(
    x: Tensor,
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    kind: str,
    grads: Sequence[Tensor | None],
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of the input, the initial carry and the weights, by the library.

    Args:
        grads: of what the layer returned, None for zero.
        kept: what the library needs of what the operator ``library_training`` returned, its very last result
            at the end; without, the forward runs once more.
    """
    of_x, *others = torch.ops.hwbp_compile.library_backward.default(
        x, list(carry), list(weights), kind, list(kept), list(grads)
    )
    return of_x, others[: len(carry)], others[len(carry) :]


def like_results(x: Tensor, carry: Sequence[Tensor]) -> list[Tensor]:
    """Tensors for what a layer returns."""
    y = x.new_empty((x.shape[0], *carry[0].shape))
    return [y, *(torch.empty_like(c, memory_format=torch.contiguous_format) for c in carry)]


def call_library(
    x: Tensor, carry: Sequence[Tensor], weights: Sequence[Tensor], kind: str, *, training: bool
) -> list[Tensor]:
    """The library's layer as torch offers it. Arguments and results as of :func:`.layer.recurrent_layer`."""
    initial = [h.unsqueeze(0) for h in carry]
    settings = (len(weights) > 3, 1, 0.0, training, False, False)
    given: Any = initial if kind == "lstm" else initial[0]
    y, *last = getattr(torch, kind)(x, given, list(weights), *settings)
    return [y, *(t.squeeze(0) for t in last)]


def _own(results: Sequence[Tensor], given: Sequence[Tensor] = ()) -> list[Tensor]:
    """Contiguous tensors that share memory with nothing, neither each other nor what is given."""
    taken = {x.untyped_storage().data_ptr() for x in given}
    own: list[Tensor] = []
    for x in results:
        if not x.is_contiguous() or x.untyped_storage().data_ptr() in taken:
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(x.untyped_storage().data_ptr())
        own.append(x)
    return own


def _run(
    x: Tensor, carry: Sequence[Tensor], weights: Sequence[Tensor], kind: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs that require gradients, and the results that depend on them."""
    leaves = [t.detach().requires_grad_() for t in (x, *carry, *weights)]
    n = len(carry) + 1
    with _compat.autograd_inside_an_operator(), _compat.without_autocast(x.device):
        return leaves, call_library(leaves[0], leaves[1:n], leaves[n:], kind, training=True)


@torch.library.impl("hwbp_compile::library_training", "default")
def _training(x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str) -> list[Tensor]:
    run = _run(x, carry, weights, kind)
    handle = x.new_empty(0)
    setattr(handle.untyped_storage(), _RUN, run)
    y, *last = (t.detach() for t in run[1])
    # An LSTM's outputs are among what the library saves: eager torch too refuses to have them changed.
    y = y.contiguous() if kind == "lstm" else y.clone(memory_format=torch.contiguous_format)
    return [y, *(t.clone() for t in last), handle]


@torch.library.register_fake("hwbp_compile::library_training")
def _training_fake(x: Tensor, carry: list[Tensor], weights: list[Tensor], kind: str) -> list[Tensor]:
    return [*like_results(x, carry), x.new_empty(0)]


@torch.library.impl("hwbp_compile::library_backward", "default")
def _backward(
    x: Tensor,
    carry: list[Tensor],
    weights: list[Tensor],
    kind: str,
    kept: list[Tensor],
    grads: list[Tensor | None],
) -> list[Tensor]:
    done = getattr(kept[-1].untyped_storage(), _RUN, None) if kept else None
    leaves, results = done or _run(x, carry, weights, kind)
    pairs = [(o, g) for o, g in zip(results, grads, strict=True) if g is not None]
    # What was kept belongs to the tensor in which it is: a second backward pass may follow.
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        leaves,
        [g for _, g in pairs],
        allow_unused=True,
        retain_graph=done is not None,
    )
    known = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]
    return _own(known, [g for _, g in pairs])  # the two biases of a gate have one gradient


@torch.library.register_fake("hwbp_compile::library_backward")
def _backward_fake(x: Tensor, carry: list[Tensor], weights: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *carry, *weights)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, carry, weights, kind = inputs
    kept = (output[0], output[-1]) if kind == "lstm" else (output[-1],)
    ctx.save_for_backward(x, *carry, *weights, *kept)
    ctx.carries, ctx.kind, ctx.kept = len(carry), kind, len(kept)


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    tensors, n, m = ctx.saved_tensors, 1 + ctx.carries, ctx.kept
    x, carry, weights, kept = tensors[0], tensors[1:n], tensors[n:-m], tensors[-m:]
    return *library_backward(x, carry, weights, ctx.kind, grads[:-1], kept), None


torch.library.register_autograd("hwbp_compile::library_training", _gradients, setup_context=_setup)
