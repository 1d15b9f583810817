"""Modules some of whose parameters are rows of stacks, and the model that holds the stacks.

They are of classes of their own, derived from the former ones, in which each such parameter is a property.
State dictionaries have the rows under their former names, and not the stacks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PLACES = "_places_in_stacks"
_STACKS = "_stacks"


class Place(NamedTuple):
    """Where a parameter is: row ``row`` of the parameter ``stack`` of ``model``."""

    model: nn.Module
    stack: str
    row: int

    def value(self) -> Tensor:
        """The row, a view of the stack."""
        return self.model._parameters[self.stack].select(0, self.row)  # type: ignore[union-attr]


def places_of(module: nn.Module) -> dict[str, Place]:
    """The parameters of a module that are rows of stacks, by name."""
    found: dict[str, Place] = module.__dict__.get(_PLACES, {})
    return found


def stacks_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a model's parameters that are stacks."""
    found: tuple[str, ...] = module.__dict__.get(_STACKS, ())
    return found


def place(module: nn.Module, places: dict[str, Place]) -> None:
    """Let these parameters of a module, and no others, be rows of stacks."""
    module.__dict__[_PLACES] = places
    _settle(module)


def hold(model: nn.Module, stacks: tuple[str, ...]) -> None:
    """Let these parameters of a model, and no others, be stacks."""
    model.__dict__[_STACKS] = stacks
    _settle(model)


def _settle(module: nn.Module) -> None:
    base, places = former_class(module), places_of(module)
    if places or stacks_of(module):
        module.__class__ = _member_class(base, tuple(places))
    else:
        module.__class__ = base
        for name in (_PLACES, _STACKS):
            module.__dict__.pop(name, None)


def former_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before it had parameters in stacks."""
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, _Member) else kind


class _Member(nn.Module):
    """What classes of modules with parameters in stacks add to the modules' own."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, at in places_of(self).items():
            destination[prefix + name] = at.value() if keep_vars else at.value().detach()
        for name in stacks_of(self):
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        places = {prefix + name: at for name, at in places_of(self).items()}
        others = {key: value for key, value in state_dict.items() if key not in places}
        missing: list[str] = []
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        stacks = {prefix + name for name in stacks_of(self)}
        missing_keys.extend(key for key in missing if key not in stacks)
        for key, at in places.items():
            row = at.value().detach()
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
            elif state_dict[key].shape != row.shape:
                shapes = f"{list(state_dict[key].shape)} in the checkpoint, {list(row.shape)} in the model"
                error_msgs.append(f"size mismatch for {key}: {shapes}.")
            else:
                row.copy_(state_dict[key].detach())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (former_class(self), tuple(places_of(self))), self.__dict__.copy()


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _member_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def row(name: str) -> property:
        return property(lambda self: places_of(self)[name].value())

    if (base, names) not in _CLASSES:
        rows = {name: row(name) for name in names}
        _CLASSES[base, names] = type(base.__name__, (_Member, base), {**rows, "__module__": base.__module__})
    return _CLASSES[base, names]


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made: nn.Module = torch.nn.Module.__new__(_member_class(base, names))
    return made
