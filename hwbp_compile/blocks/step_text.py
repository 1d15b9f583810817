"""The step from one state to the next as plain data, which compiled code holds to find its kernel."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import _compat
from ..errors import CannotRewrite
from ..recurrent.step_program import StepProgram

_NAMED = (torch.dtype, torch.memory_format, torch.layout)


def encoded(graph: Graph, emitted: int, keep: bool) -> list[Any]:
    """A graph that returns a state and what is emitted besides, as lists, numbers and strings.

    Args:
        graph: its first placeholder is the state; the others are what a block has of its own.
        emitted: how many values.
        keep: whether all states are returned, not only the last one.

    Raises:
        CannotRewrite: an argument of an operator cannot be told so.
    """
    index = {node: i for i, node in enumerate(graph.nodes)}
    lines: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            lines.append([list(value.shape), str(value.dtype).removeprefix("torch.")])
        elif node.op == "call_function":
            target = "getitem" if node.target is operator.getitem else str(node.target)
            lines.append([target, _encoded(node.args, index), _encoded(node.kwargs, index)])
    (results,) = next(n for n in graph.nodes if n.op == "output").args
    return [lines, _encoded(results, index), emitted, keep]


def program_of(step: Sequence[Any]) -> StepProgram:
    """What :func:`encoded` was given."""
    lines, results, emitted, keep = step
    graph = Graph()
    nodes: list[Node] = []
    with _compat.outside_of_tracing(), torch.inference_mode(False), torch.no_grad():
        for i, line in enumerate(lines):
            if len(line) == 2:
                shape, dtype = line
                node = graph.placeholder(f"value_{i}")
                node.meta["val"] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            else:
                target, args, kwargs = line
                node = graph.call_function(_operator(target), _decoded(args, nodes), _decoded(kwargs, nodes))
                node.meta["val"] = node.target(  # type: ignore[operator]
                    *torch.fx.map_arg(node.args, lambda n: n.meta["val"]),
                    **torch.fx.map_arg(node.kwargs, lambda n: n.meta["val"]),
                )
            nodes.append(node)
    graph.output(_decoded(results, nodes))
    carry, *inputs = (n for n in nodes if n.op == "placeholder")
    return StepProgram(
        graph=graph,
        carry=(carry,),
        inputs=tuple(inputs),
        shared=(),
        read=(),
        read_shared=(),
        emitted=tuple(range(emitted)),
        keep=keep,
    )


def _encoded(argument: Any, index: dict[Node, int]) -> Any:
    if isinstance(argument, Node):
        return {"node": index[argument]}
    if isinstance(argument, (list, tuple)):
        return [_encoded(x, index) for x in argument]
    if isinstance(argument, dict):
        return {"kwargs": {k: _encoded(v, index) for k, v in argument.items()}}
    if isinstance(argument, _NAMED):
        return {"torch": str(argument).removeprefix("torch.")}
    if isinstance(argument, str) and not argument.replace("_", "").isalnum():
        raise CannotRewrite(f"an argument is the text {argument!r}")
    if argument is None or type(argument) in (bool, int, float, str):
        return argument
    raise CannotRewrite(f"an argument of the type {type(argument).__name__} is not fixed")


def _decoded(argument: Any, nodes: Sequence[Node]) -> Any:
    if isinstance(argument, list):
        return tuple(_decoded(x, nodes) for x in argument)
    if not isinstance(argument, dict):
        return argument
    ((kind, value),) = argument.items()
    if kind == "node":
        return nodes[value]
    if kind == "kwargs":
        return {k: _decoded(v, nodes) for k, v in value.items()}
    return getattr(torch, value)


def _operator(name: str) -> Any:
    """The operator with a name like aten.add.Tensor."""
    return operator.getitem if name == "getitem" else functools.reduce(getattr, name.split("."), torch.ops)
