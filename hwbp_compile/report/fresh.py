"""Code objects of their own for functions, for as long as a model is looked at.

Dynamo keeps what it compiles, how often, and what it has given up, with the code object of a function. A copy
is unknown to it, and what it learns about the copy is gone with it.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def copy_function(function: Callable[..., Any], module_name: str) -> Callable[..., Any]:
    """A copy with its own code object, and globals in which nothing else is kept."""
    assert isinstance(function, types.FunctionType)
    namespace = {"__builtins__": builtins, "__name__": module_name}
    return types.FunctionType(function.__code__.replace(), namespace, function.__name__)


@contextmanager
def fresh_code(callables: Iterable[Any]) -> Iterator[None]:
    """Let the methods of modules, and functions, run as copies of their code.

    This matters after a graph break only: the frames that are then compiled apart are the user's.
    """
    originals = {id(f): (f, f.__code__) for each in callables for f in _functions(each)}
    try:
        for function, code in originals.values():
            function.__code__ = code.replace()
        yield
    finally:
        for function, code in originals.values():
            function.__code__ = code


def _functions(callable_: Any) -> Iterator[types.FunctionType]:
    """The Python functions that are likely to run when ``callable_`` is called; none of torch's."""
    if isinstance(callable_, nn.Module):
        for kind in {k for m in callable_.modules() for k in type(m).__mro__ if not _is_torchs(k)}:
            for value in vars(kind).values():
                yield from _unwrapped(value)
    elif isinstance(callable_, types.MethodType) and isinstance(callable_.__self__, nn.Module):
        yield from _functions(callable_.__self__)
    else:
        yield from _unwrapped(callable_)


def _is_torchs(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] == "torch"


def _unwrapped(value: Any) -> Iterator[types.FunctionType]:
    """The functions behind methods, properties and decorators."""
    for _ in range(8):
        value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if not isinstance(value, types.FunctionType):
            return
        yield value
        value = getattr(value, "__wrapped__", None)
