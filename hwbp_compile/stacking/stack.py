"""``stack_parameters``: equal blocks of a model share one tensor for each of their parameters."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .member import Place, former_class, hold, place, places_of, release, stacks_of


@dataclass
class Stacking:
    """What :func:`stack_parameters` did."""

    stacks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each new parameter of the model, the names of those that are its rows, in the order of the rows."""
    left_out: dict[str, str] = field(default_factory=dict)
    """For parameters of repeated blocks that were left as they are, the reason."""

    def __str__(self) -> str:
        lines = [f"{name}: {len(rows)} rows, {rows[0]} to {rows[-1]}" for name, rows in self.stacks.items()]
        lines += [f"left out: {name}, {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines) or "nothing is stacked: no two blocks in one container are equal"


def stack_parameters(model: nn.Module) -> Stacking:
    """Put the parameters of equal blocks into stacks ``[blocks, ...]``, one parameter of the model each.

    Blocks are equal if they are children of the same module (or of containers side by side in it), of the
    same classes throughout, with parameters and buffers of the same names, shapes, dtypes and devices. The
    last block is row 0, as the backward pass meets it first. A block's own parameters become views of the
    stacks: it reads and computes as before, ``backend="highway"`` hands whole stacks to the batched backward
    pass instead of copying them together, and an optimizer has few large tensors to step.

    ``state_dict`` and ``load_state_dict`` keep the former names and shapes. ``parameters`` and
    ``named_parameters`` have the stacks in place of the single tensors. So make optimizers afterwards, and
    mind what treats parameters one by one: rules such as "no weight decay for vectors", or optimizers that
    normalise each tensor. Gradients arrive on the stacks; the blocks' views have none. Other backends, and
    eager torch, add up the gradients of the rows one by one, each as large as the stack, which is slow.

    What is done to a part of the model does not reach its rows: freeze, move or cast the whole model, or
    unstack it first.

    Parameters that are shared, do not require gradients, have hooks, are parametrized, of a subclass of
    ``nn.Parameter``, or of ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, are left out: they stay as they are, beside
    a stack of the others. A row, ``block.weight``, is a view made anew each time: a hook on it, or another
    ``.data``, is lost with it. The state of an optimizer belongs to the stacks or to the single tensors, and
    does not fit the other.

    Args:
        model: changed in place; it may come from ``torch.compile``, and is compiled anew when it runs.

    Returns:
        What was stacked and what was left out, and why.

    Raises:
        ValueError: an optimizer, or a module that trains on several devices, has parameters that would be
            stacked; or some are not initialized yet.
    """
    model = _original(model)
    if any(is_lazy(x) for x in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "stack_parameters needs parameters that are initialized: call the model once before."
        )
    done = Stacking()
    columns = list(_columns(model, done))
    _refuse_users([p for _, column in columns for p in column.values()], "stack_parameters")
    placed: dict[str, dict[str, Place]] = {}
    for suffix, column in columns:
        name = _free_name(model, f"stacked_{suffix}")
        values = list(column.values())
        stack = nn.Parameter(torch.stack([p.detach() for p in values]))
        if any(p.grad is not None for p in values):
            stack.grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in values])
        model.register_parameter(name, stack)
        for row, path in enumerate(column):
            owner, _, short = path.rpartition(".")
            placed.setdefault(owner, {})[short] = Place(model, name, row)
        done.stacks[name] = tuple(column)
    for path, places in placed.items():
        place(model.get_submodule(path), places)
    if done.stacks:
        hold(model, (*stacks_of(model), *done.stacks))
    return done


def unstack_parameters(model: nn.Module) -> None:
    """Undo :func:`stack_parameters`: every block has parameters of its own again, with their gradients.

    Raises:
        ValueError: an optimizer has the stacks, or this is only a part of the model that holds them.
    """
    model = _original(model)
    members = [(m, places) for m in model.modules() if (places := places_of(m))]
    stacks = {(id(at.model), at.stack): at for _, places in members for at in places.values()}
    inside = set(model.modules())
    if any(at.model not in inside for at in stacks.values()):
        raise ValueError(
            "unstack_parameters needs the model that stack_parameters was given, not a part of it."
        )
    _refuse_users([_stack(at) for at in stacks.values()], "unstack_parameters")
    for module, places in members:
        order = release(module)
        for short, at in places.items():
            stack = _stack(at)
            own = nn.Parameter(stack.detach()[at.row].clone(), requires_grad=stack.requires_grad)
            if stack.grad is not None:
                own.grad = stack.grad[at.row].clone()
            module.register_parameter(short, own)
        for short in order:
            if short in module._parameters:
                module._parameters[short] = module._parameters.pop(short)
    for at in stacks.values():
        at.model._parameters.pop(at.stack)
        release(at.model)


def _stack(at: Place) -> nn.Parameter:
    found = at.model._parameters[at.stack]
    assert found is not None
    return found


def _original(model: nn.Module) -> nn.Module:
    """The model that was given to ``torch.compile``."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def _columns(model: nn.Module, done: Stacking) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Corresponding parameters of equal blocks, by name, last block first; and what they have in common."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for common, blocks in _classes(model):
        for path, _ in blocks[0][1].named_parameters(remove_duplicate=False):
            column = {_join(name, path): block.get_parameter(path) for name, block in reversed(blocks)}
            reasons = {n: _why_not(model, n, p, uses) for n, p in column.items()}
            kept = {n: p for n, p in column.items() if not reasons[n]}
            if len(kept) == 1:
                reasons |= dict.fromkeys(kept, "has no other to share a stack with")
            done.left_out |= {n: reason for n, reason in reasons.items() if reason}
            if len(kept) > 1:
                yield _join(common, path).replace(".", "_"), kept


def _why_not(model: nn.Module, name: str, p: nn.Parameter, uses: Counter[int]) -> str:
    module, _ = _owner(model, name)
    if name.rpartition(".")[2] in stacks_of(module):
        return "is a stack"
    if places_of(module):
        return "belongs to a module with parameters in stacks"
    if uses[id(p)] > 1:
        return "is shared"
    if not p.requires_grad:
        return "does not require gradients"
    if type(p) is not nn.Parameter:
        return f"is of class {type(p).__name__}"
    if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
        return "has hooks"
    if isinstance(module, ParametrizationList):
        return "is parametrized"
    if isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)):
        return f"belongs to a {former_class(module).__name__}"
    return ""


def _classes(module: nn.Module, path: str = "") -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    """Equal blocks, each with its name; and how all these names begin."""
    groups: dict[Any, list[tuple[str, nn.Module]]] = {}
    for name, child in _blocks(module, path):
        groups.setdefault(_structure(child), []).append((name, child))
    for group in groups.values():
        if len(group) > 1:
            yield _beginning([name for name, _ in group]), group
        else:
            yield from _classes(group[0][1], group[0][0])


def _beginning(names: list[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=False)
    return _join(*(column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns)))


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The children; instead of a container of equal ones, what it contains."""
    for name, child in module.named_children():
        inner = list(child.children())
        if type(child) in (nn.Sequential, nn.ModuleList) and len(inner) > 1:
            first = _structure(inner[0])
            if all(_structure(x) == first for x in inner[1:]):
                yield from _blocks(child, _join(path, name))
                continue
        yield _join(path, name), child


def _structure(module: nn.Module) -> Any:
    """Equal for modules that look the same."""
    own = [
        (name, None if x is None else (tuple(x.shape), x.dtype, x.device, type(x)))
        for tensors in (module._parameters, module._buffers)
        for name, x in tensors.items()
    ]
    inner = [(name, _structure(child)) for name, child in module.named_children()]
    return type(module), tuple(own), tuple(inner)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, short = name.rpartition(".")
    return model.get_submodule(path), short


def _free_name(model: nn.Module, name: str) -> str:
    number, free = 1, name
    while hasattr(model, free):
        number += 1
        free = f"{name}_{number}"
    return free


def _refuse_users(parameters: Sequence[Tensor], function: str) -> None:
    """An optimizer goes on to step what it was given, which would no longer be what the model uses.

    Nor would the gradients of what is new be averaged over devices.
    """
    ids = {id(p) for p in parameters}
    if _user_of(ids):
        gc.collect()  # it may have been deleted
    if user := _user_of(ids):
        kind, what = user
        raise ValueError(
            f"A {kind.__name__} {what} has parameters that {function} would replace; "
            f"delete it, and make the {what} afterwards."
        )


def _user_of(ids: set[int]) -> tuple[type, str] | None:
    """The class of an object that has some of these parameters, and what it is."""
    for each in gc.get_objects():
        kind = type(each)
        if issubclass(kind, torch.optim.Optimizer):
            found, what = (
                (p for group in getattr(each, "param_groups", ()) for p in group["params"]),
                "optimizer",
            )
        elif issubclass(kind, nn.parallel.DistributedDataParallel) and "_modules" in each.__dict__:
            found, what = iter(each.parameters()), "module"
        else:
            continue
        if any(id(p) in ids for p in found):
            return kind, what
    return None
