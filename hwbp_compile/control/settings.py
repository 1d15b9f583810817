"""Settings of a model that hold instead of those it was compiled with, and may change between steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import EllipsisType
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .. import _compat
from ..errors import ModelError
from ..options import Options

NAMES = ("iterations", "gamma", "group_size", "exact_tail")
"""The options that may be changed."""


class Overrides:
    """What was set for one model, and when in comparison to others."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.order = 0

    def over(self, options: Options) -> Options:
        """``options`` with these values in them."""
        return replace(options, **self.values, given=options.given.union(self.values))


_overrides: WeakKeyDictionary[nn.Module, Overrides] = WeakKeyDictionary()
_order = itertools.count(1)
_epoch = 0


def epoch() -> int:
    """Another number after each change of any setting."""
    return _epoch


def overrides_for(parameters: Sequence[Tensor]) -> Overrides | None:
    """What was set last for a module that holds one of these parameters; None if nothing was."""
    known = {id(p) for p in parameters}
    found = [o for module, o in _overrides.items() if any(id(p) in known for p in module.parameters())]
    return max(found, key=lambda o: o.order, default=None)


def set_iterations(
    model: nn.Module,
    iterations: int | Literal["exact", "auto"] | EllipsisType | None = ...,
    *,
    gamma: float | EllipsisType | None = ...,
    group_size: int | EllipsisType | None = ...,
    exact_tail: int | EllipsisType | None = ...,
) -> None:
    """Change k, and how the residual path is split, of a model that trains.

    It holds from the next forward pass on, for everything that is compiled with ``backend="highway"`` and
    reads any of the model's parameters; what was set last counts where models share some, or a graph runs
    several. A value that was used
    before costs nothing. A new one costs one compilation, without Dynamo, when the model is called next; of
    each compiled graph the last 16 settings are kept. Where other tensors take the parameters' place
    (``torch.func.functional_call``), the model is not known, and keeps what it was compiled with.

    Args:
        model: what was compiled, or what ``torch.compile`` made of it; also before it is compiled.
        iterations: as the option of this name. None returns to what the model was compiled with; an argument
            that is not given stays as it is.
        gamma: as the option, or None.
        group_size: as the option, or None.
        exact_tail: as the option, or None.

    Raises:
        OptionError: a value has a wrong type or is out of range; nothing is changed then.
        TypeError: ``model`` is no module.
        ModelError: ``model`` has no parameters, or is compiled with another backend.
    """
    module = module_of(model, "set_iterations")
    if next(module.parameters(), None) is None:
        raise ModelError(
            "set_iterations knows a model by its parameters, and this one has none; give options to "
            "torch.compile instead, or, if it is a block whose parameters are stacked, the whole model."
        )
    given = dict(zip(NAMES, (iterations, gamma, group_size, exact_tail), strict=True))
    present = _overrides.get(module) or Overrides()
    values = present.values | {name: x for name, x in given.items() if x is not ...}
    values = {name: x for name, x in values.items() if x is not None}
    Options(**values)
    present.values, present.order = values, next(_order)
    _overrides[module] = present
    global _epoch
    _epoch += 1


@contextmanager
def settings_kept(model: nn.Module) -> Iterator[None]:
    """What is set for a module while the context lasts is forgotten."""
    global _epoch
    before = _overrides.get(model)
    state = None if before is None else (dict(before.values), before.order)
    try:
        yield
    finally:
        if before is None:
            _overrides.pop(model, None)
        else:
            assert state is not None
            before.values, before.order = state
        _epoch += 1


def module_of(model: Any, caller: str) -> nn.Module:
    """The module that ``model`` is, or that it was compiled from.

    Raises:
        TypeError: it is no module.
        ModelError: it is compiled with another backend.
    """
    compiled = _compat.compiled_parts(model)
    if not isinstance(compiled.original, nn.Module):
        raise TypeError(f"{caller} takes a module, but got {type(model).__name__}.")
    if compiled.backend not in (None, "highway"):
        raise ModelError(
            f'{caller} needs a model compiled with backend="highway", and this one is compiled '
            f'with backend="{compiled.backend}".'
        )
    return compiled.original
