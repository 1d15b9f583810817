"""Run somebody's model and leave no trace: buffers, gradients, attributes and random states are put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Kept:
    """Tensors whose values and gradients are put back at the end."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def keep(self, tensors: Iterator[Any]) -> None:
        """Remember what a run could change: the values of buffers and inputs, the gradients of leaves.

        Parameters are not copied: a forward pass does not write to them.
        """
        for x in tensors:
            if not isinstance(x, Tensor):
                continue
            if x.is_leaf and x.requires_grad:
                if id(x) not in self._gradients:
                    self._gradients[id(x)] = (x, x.grad)
                    x.grad = None
            elif id(x) not in self._values and not isinstance(x, nn.Parameter) and _is_writable(x):
                self._values[id(x)] = (x, x.detach().clone())

    def put_back(self) -> None:
        """Undo all changes since."""
        for x, value in self._values.values():
            # Through .data, so that autograd does not see a change: there is none.
            x.data.copy_(value)
        for x, gradient in self._gradients.values():
            x.grad = gradient


def _is_writable(x: Tensor) -> bool:
    """Whether every element has memory of its own; other tensors cannot be written in place anyway."""
    return x.layout == torch.strided and all(
        s != 0 or n <= 1 for s, n in zip(x.stride(), x.shape, strict=True)
    )


@contextmanager
def unchanged(function: Any, arguments: Any) -> Iterator[Kept]:
    """Keep a module (or function), its arguments and the random states as they are."""
    kept = Kept()
    modules = [m for m in (function, *pytree.tree_leaves(arguments)) if isinstance(m, nn.Module)]
    attributes = [(m, _attributes(m), dict(m._buffers)) for top in modules for m in top.modules()]
    states = random_states()
    try:
        for top in modules:
            kept.keep(iter(top.buffers()))
            kept.keep(iter(top.parameters()))
        kept.keep(iter(pytree.tree_leaves(arguments)))
        yield kept
    finally:
        for module, before, buffers in attributes:
            for name in _attributes(module).keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
            module._buffers.clear()
            module._buffers.update(buffers)
        kept.put_back()
        set_random_states(states)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a forward pass may set on a module; torch's own bookkeeping starts with an underscore."""
    return {k: v for k, v in module.__dict__.items() if not k.startswith("_")}


def random_states() -> dict[str, Any]:
    """The states of all random number generators that torch code commonly uses."""
    states: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Continue with random numbers from where :func:`random_states` was called."""
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
