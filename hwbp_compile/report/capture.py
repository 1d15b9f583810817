"""Run a call through Dynamo and AOTAutograd for its joint graphs only.

Whatever is cached, for this or another backend, the graphs are traced anew: the call is made from a code
object of its own, which no cache knows. Frames that Dynamo compiles apart, after a graph break, belong to the
user's code objects; what is cached there is dropped at the end (:func:`.._compat.dynamo_caches_unchanged`).
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from .. import _compat
from .keep import Kept, unchanged


@dataclass(frozen=True)
class Frame:
    """One graph that Dynamo handed over."""

    joints: tuple[GraphModule, ...]
    """Its joint graph; none where nothing needs a gradient."""
    graph_break: _compat.GraphBreak | None
    """What ended it, if not the end of the call."""
    failure: str = ""
    """Why it could not be traced."""


@dataclass
class Capture:
    """What was seen of a call."""

    frames: list[Frame] = field(default_factory=list)
    graph_breaks: list[_compat.GraphBreak] = field(default_factory=list)
    """Of all frames, also those that Dynamo gave up."""


@dataclass
class _Running:
    capture: Capture
    kept: Kept


_running: ContextVar[_Running | None] = ContextVar("hwbp_compile_capture", default=None)


def capture(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: bool | None = None
) -> Capture:
    """Call ``function`` once, op by op, and return the joint graphs that a backend would be given."""
    found = Capture()
    with unchanged(function, (args, kwargs)) as kept, _compat.dynamo_caches_unchanged(_analysis_backend):
        token = _running.set(_Running(found, kept))
        try:
            with _compat.record_graph_breaks() as graph_breaks:
                torch.compile(_fresh_call(), backend=_analysis_backend, dynamic=dynamic)(function, args, dict(kwargs))
        finally:
            _running.reset(token)
    found.graph_breaks = graph_breaks
    return found


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _fresh_call() -> Callable[..., Any]:
    """A copy of :func:`_call` with its own code object and globals, where Dynamo keeps what it compiles."""
    return types.FunctionType(
        _call.__code__.replace(), {"__builtins__": builtins, "__name__": __name__}, _call.__name__
    )


def _analysis_backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Trace the joint graph and run the forward pass as it is.

    The graphs are handed over when they are run, not when they are compiled, so that a cached frame that
    runs again counts again.
    """
    joints: tuple[GraphModule, ...] = ()
    failure = ""
    try:
        joints = tuple(_compat.capture_joint_graphs(gm, example_inputs))
    except _compat.restart_exceptions():
        raise
    except Exception as error:  # whatever the graph is, the call goes on and the report says so
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    frame = Frame(joints, _compat.graph_break_of(gm), failure)

    def run(*inputs: Any) -> Any:
        running = _running.get()
        if running is not None:
            running.capture.frames.append(frame)
            running.kept.keep(iter(inputs))
        return gm.forward(*inputs)

    return run
