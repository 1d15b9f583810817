"""Run a call through Dynamo and AOTAutograd for its joint graphs only.

Whatever is cached, for this or another backend, the graphs are traced anew: the call is made from a code
object of its own, which no cache knows, and so are the model's methods (:mod:`.fresh`). Only a function
outside of the model that breaks the graph keeps the cache entry made for it, which the next call finds again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .. import _compat
from ..options import Options
from ..passes.record import drop_observations
from ..recurrent.capture import MARK, Layer, install, settle
from ..recurrent.packed import record_packed_sequences
from .fresh import copy_function, fresh_code
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
    layers: tuple[Layer, ...] = ()
    """Its recurrent layers."""


@dataclass
class Capture:
    """What was seen of a call."""

    frames: list[Frame] = field(default_factory=list)
    graph_breaks: list[_compat.GraphBreak] = field(default_factory=list)
    """Of all frames, also those that Dynamo gave up."""
    packed: bool = False
    """Whether Dynamo came across a packed sequence."""


@dataclass
class _Running:
    capture: Capture
    kept: Kept
    options: Options


_running: ContextVar[_Running | None] = ContextVar("hwbp_compile_capture", default=None)


def capture(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    dynamic: bool | None = None,
) -> Capture:
    """Call ``function`` once, op by op, and return the joint graphs that a backend would be given."""
    install()
    found = Capture()
    modules = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, nn.Module)]
    with (
        unchanged(function, (args, kwargs)) as kept,
        fresh_code((function, *modules)),
        _compat.compiling_freely(),
    ):
        token = _running.set(_Running(found, kept, options))
        try:
            with _compat.record_graph_breaks() as graph_breaks, record_packed_sequences() as packed:
                call = torch.compile(
                    copy_function(_call, __name__), backend=_analysis_backend, dynamic=dynamic
                )
                call(function, args, dict(kwargs))
        finally:
            _running.reset(token)
    found.graph_breaks, found.packed = graph_breaks, bool(packed)
    return found


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _analysis_backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Trace the joint graph and run the forward pass as it is.

    The graphs are handed over when they are run, not when they are compiled, so that a cached frame that
    runs again counts again.
    """
    joints: tuple[GraphModule, ...] = ()
    failure = ""
    compiling = _running.get()
    layers = tuple(settle(gm, compiling.options)) if compiling is not None else ()
    try:
        joints = tuple(_compat.capture_joint_graphs(gm, example_inputs))
        for joint in joints:
            drop_observations(joint.graph)
    except _compat.restart_exceptions():
        raise
    except Exception as error:  # whatever the graph is, the call goes on and the report says so
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    frame = Frame(joints, _compat.graph_break_of(gm), failure, layers)

    def run(*inputs: Any) -> Any:
        running = _running.get()
        if running is not None:
            running.capture.frames.append(frame)
            running.kept.keep(iter(inputs))
        return gm.forward(*inputs)

    return run


setattr(_analysis_backend, MARK, True)
