"""Modules some of whose parameters are rows of stacks, and the model that holds the stacks.

They are of classes of their own, derived from the former ones, in which each such parameter is a property.
State dictionaries have the rows under their former names, and not the stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

_HOLDER, _ROW, _STACKS, _ORDER = "_stack_holder", "_stack_row_", "_stack_names", "_stack_order"


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
    kind = type(module)
    if not issubclass(kind, _Member) or not kind._hwbp_rows:
        return {}
    (model,) = module.__dict__[_HOLDER]
    return {name: Place(model, stack, module.__dict__[_ROW + name]) for name, stack in kind._hwbp_rows}


def stacks_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a model's parameters that are stacks."""
    found: tuple[str, ...] = module.__dict__.get(_STACKS, ())
    return found


def place(module: nn.Module, places: dict[str, Place]) -> None:
    """Let these parameters of a module, by name, be there, all of them in the same model."""
    (model,) = {at.model for at in places.values()}
    module.__dict__[_ORDER] = tuple(module._parameters)
    for name in places:
        del module._parameters[name]
    module.__dict__ |= {_HOLDER: (model,)} | {_ROW + name: at.row for name, at in places.items()}
    rows = tuple((name, at.stack) for name, at in places.items())
    module.__class__ = _member_class(former_class(module), rows)


def hold(model: nn.Module, stacks: Sequence[str]) -> None:
    """Let these parameters of a model, and no others, be stacks."""
    model.__dict__[_STACKS] = tuple(stacks)
    kind = type(model)
    rows = kind._hwbp_rows if issubclass(kind, _Member) else ()
    model.__class__ = _member_class(former_class(model), rows)


def release(module: nn.Module) -> tuple[str, ...]:
    """Give a module its former class back, and return the names of its parameters in their former order."""
    order: tuple[str, ...] = module.__dict__.pop(_ORDER, ())
    rows = [_ROW + name for name in places_of(module)]
    module.__class__ = former_class(module)
    for name in (_HOLDER, _STACKS, *rows):
        module.__dict__.pop(name, None)
    return order


def former_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before it had anything to do with stacks."""
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, _Member) else kind


class _Member(nn.Module):
    """What the classes of these modules add to the modules' own."""

    _hwbp_rows: tuple[tuple[str, str], ...] = ()
    """Names of the parameters that are rows, each with its stack's."""

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
        missing: list[str] = []
        unexpected: list[str] = []
        # The dictionary itself: what is inherited, or a hook, may rename its keys.
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs
        )
        unexpected_keys.extend(key for key in unexpected if key not in places)
        stacks = {prefix + name for name in stacks_of(self)}
        missing_keys.extend(key for key in missing if key not in stacks)
        for key, at in places.items():
            row = at.value().detach()
            if local_metadata.get("assign_to_params_buffers", False):
                error_msgs.append(
                    f"{key} is a row of a stack and cannot be assigned: unstack_parameters first."
                )
            elif key not in state_dict:
                if strict:
                    missing_keys.append(key)
            elif state_dict[key].shape != row.shape:
                shapes = f"{list(state_dict[key].shape)} in the checkpoint, {list(row.shape)} in the model"
                error_msgs.append(f"size mismatch for {key}: {shapes}.")
            else:
                row.copy_(state_dict[key].detach())

    def requires_grad_(self, requires_grad: bool = True) -> _Member:
        """Of the whole model only.

        Raises:
            RuntimeError: parameters of this module are rows of stacks, which can only be frozen as a whole.
        """
        if places_of(self):
            raise RuntimeError(
                f"Parameters of this {former_class(self).__name__} are rows of stacks and cannot be frozen "
                "by themselves: call unstack_parameters on the model, freeze, and stack the rest."
            )
        return super().requires_grad_(requires_grad)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Of names that are no rows of stacks."""
        if name in places_of(self):
            _refuse_assignment(self, param)
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (former_class(self), type(self)._hwbp_rows), self.__dict__.copy()


_Rows = tuple[tuple[str, str], ...]
_CLASSES: dict[tuple[type[nn.Module], _Rows], type[nn.Module]] = {}


def _member_class(base: type[nn.Module], rows: _Rows) -> type[nn.Module]:
    if (base, rows) not in _CLASSES:
        own: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__, "_hwbp_rows": rows}
        own |= {name: _row_property(name, stack) for name, stack in rows}
        _CLASSES[base, rows] = type(base.__name__, (_Member, base), own)
    return _CLASSES[base, rows]


def _row_property(name: str, stack: str) -> property:
    """The row of a stack. Written out for this stack: each variable would be one more guard for Dynamo."""
    source = f"lambda self: self.{_HOLDER}[0]._parameters[{stack!r}].select(0, self.{_ROW}{name})"
    return property(eval(source, {}), _refuse_assignment)


def _refuse_assignment(module: nn.Module, value: Any) -> None:
    raise AttributeError(
        f"This parameter of a {former_class(module).__name__} is a row of a stack and cannot be replaced: "
        "write to it in place (`with torch.no_grad(): p.copy_(...)`), or unstack_parameters first."
    )


def _rebuild(base: type[nn.Module], rows: _Rows) -> nn.Module:
    made: nn.Module = nn.Module.__new__(_member_class(base, rows))
    return made
