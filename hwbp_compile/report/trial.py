"""Gradients of a model under one setting of the backend after the other, without a trace left on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import _compat
from ..control.runs import ChainRecord, Runs, apart
from ..control.settings import module_of, set_iterations, settings_kept
from ..errors import ModelError
from ..recurrent.capture import install
from .fresh import copy_function, fresh_code
from .keep import random_states, set_random_states, unchanged

LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(model, batch)``: calls the model, and returns a scalar."""


class Trial:
    """One model, whose gradients for one batch are asked for again and again.

    It is compiled op by op, or by Inductor. All gradients are of the same random numbers. See :func:`trial`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, runs: list[Runs]) -> None:
        self._model, self._loss_fn, self._runs = model, loss_fn, runs
        self._compiled = {codegen: _compiled(codegen) for codegen in ("eager", "inductor")}
        self._states = random_states()

    def gradients(
        self, batch: Any, settings: dict[str, Any], codegen: str = "eager"
    ) -> tuple[dict[str, Tensor], tuple[ChainRecord, ...]]:
        """Gradients by the parameters' names, and what was recorded of each chain.

        Raises:
            ModelError: the loss is no scalar, or reaches no parameter.
        """
        set_iterations(self._model, **({"gamma": None, "group_size": None, "exact_tail": None} | settings))
        before = {runs: runs.steps for runs in self._runs}
        # What a forward pass changes, such as running means, is undone: every call starts from the same.
        with unchanged(self._model, batch), self._called(codegen) as calls:
            set_random_states(self._states)
            named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
            loss = self._loss_fn(self._model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ModelError("loss_fn(model, batch) must return the loss, a tensor of one element.")
            if not loss.requires_grad:
                raise ModelError("The loss depends on no parameter that requires a gradient.")
            if not calls:
                raise ModelError("loss_fn(model, batch) must call the model that it is given: model(...).")
            # Not backward(): hooks behind a parameter's gradient may change the parameter.
            each = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        found = {name: g for (name, _), g in zip(named, each, strict=True) if g is not None}
        last = [(runs.history[-1], before.get(runs, 0)) for runs in self._runs if runs.history]
        chains = [c for entry, begun in last if entry.number >= begun for c in entry.chains()]
        return found, tuple(chains)

    @contextmanager
    def _called(self, codegen: str) -> Iterator[list[None]]:
        """Have what is compiled run when the model is called; the list has an item for each call."""
        calls: list[None] = []

        def call(plain: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
            calls.append(None)
            return self._compiled[codegen](plain, args, kwargs)

        with _compat.calls_redirected(self._model, call):
            yield calls


def _compiled(codegen: str) -> Callable[..., Any]:
    options: dict[str, Any] = {
        "iterations": "exact",
        "apply": "always",
        "codegen": codegen,
        "fallback_random": True,  # the same random numbers in generated code
    }
    return torch.compile(copy_function(_call, __name__), backend="highway", options=options)


def _call(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


@contextmanager
def trial(model: Any, loss_fn: LossFunction, batch: Any, caller: str) -> Iterator[Trial]:
    """A model to be tried out; afterwards it, its gradients, the batch and the random states are as before.

    Raises:
        TypeError: ``model`` is no module.
        ModelError: ``model`` is compiled with another backend.
    """
    module = module_of(model, caller)
    install()
    modules = [module, *(m for m in pytree.tree_leaves(batch) if isinstance(m, nn.Module))]
    with (
        settings_kept(module),
        fresh_code((*modules, loss_fn)),
        _compat.compiling_freely(),
        apart() as runs,
    ):
        yield Trial(module, loss_fn, runs)
