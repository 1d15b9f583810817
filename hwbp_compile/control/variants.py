"""One graph, compiled for each of the settings that are asked for while the model trains."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _compat
from ..options import Options
from ..passes.record import new_records
from .runs import Runs

log = logging.getLogger(__name__)

KEPT = 16
"""Compiled settings of one graph; the one that was used longest ago gives way to another."""

Compile = Callable[[GraphModule, Sequence[Any], Options, bool], Callable[..., Any]]
"""Compiles a graph, which it may change, for example inputs; whether the last one is memory for records."""


class Variants:
    """What Dynamo calls in place of a graph of the user's; made while Dynamo compiles.

    Args:
        gm: the graph as Dynamo handed it over; it is left as it is.
        example_inputs: as Dynamo handed them over.
        options: those that it is compiled with.
        compile: compiles one setting.
    """

    def __init__(
        self, gm: GraphModule, example_inputs: Sequence[Any], options: Options, compile: Compile
    ) -> None:
        self._gm, self._options = gm, options
        self._fake = _compat.fake_inputs(gm, example_inputs)
        self._compile = compile
        self._compiled: OrderedDict[Any, Callable[..., Any] | None] = OrderedDict()
        self._lock = threading.RLock()
        self._runs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._frame = _compat.frame_being_compiled()
        self._alone = Runs(options, (), self._frame)
        self._last: tuple[Any, Runs] = (lambda: None, self._alone)
        self._position: int | None = None
        self._seen_arguments = False
        self._device = _device_of(gm, example_inputs) if _trains(gm, example_inputs) else None
        # What the model begins with is compiled at once, while Dynamo is there.
        first = self._runs_of(_compat.real_inputs(gm)).first_options()
        self._current = first, self._compile_for(first, example_inputs)
        self._add(*self._current)
        self._known = _compat.known_of_sizes(self._fake)

    def __call__(self, *args: Any) -> Any:
        """Run the graph with the settings in force for the parameters it is given."""
        if self._device is None:  # settings are of the backward pass
            return self._current[1](*args)
        runs = self._runs_of(args)
        if _compat.in_backward_pass():  # a checkpoint computes again what it had not kept
            options = runs.last_options or runs.next_options()
            return self._variant(options, args)(*args, new_records(self._device, options.records_blocks))
        options = runs.next_options()
        variant = self._variant(options, args)
        records = new_records(self._device, options.records_blocks)
        runs.began(options, records)
        return variant(*args, records)

    def _runs_of(self, args: Sequence[Any]) -> Runs:
        """What belongs to the model that runs: equal models share one compiled graph."""
        if not self._seen_arguments and not all(x is None for x in args):
            found = (i for i, x in enumerate(args) if isinstance(x, nn.Parameter))
            self._position, self._seen_arguments = next(found, None), True
        if self._position is None:
            return self._alone
        parameter = args[self._position]
        known, runs = self._last
        if known() is parameter:
            return runs
        with self._lock:
            if parameter not in self._runs:
                read = [x for x in args if isinstance(x, nn.Parameter)]
                self._runs[parameter] = Runs(self._options, read, self._frame)
            runs = self._runs[parameter]
        self._last = ref(parameter), runs
        return runs

    def _variant(self, options: Options, args: Sequence[Any]) -> Callable[..., Any]:
        current, variant = self._current
        if current is options:
            return variant
        with self._lock:
            if options not in self._compiled:
                log.info("A graph is compiled for iterations=%s.", options.iterations)
                compiled, general = _compat.compile_later(
                    lambda: self._compile_for(options, self._fake), self._fake, self._known
                )
                # Where it holds for some sizes only, it is compiled for each of them that comes.
                self._add(options, compiled if general else None)
            key: Any = options
            if self._compiled[options] is None:
                key = options, tuple(x for x in args if isinstance(x, int))
            if key not in self._compiled:
                self._add(key, self._compile_for(options, args))
            self._compiled.move_to_end(key)
            found = self._compiled[key]
            assert found is not None
            if key is options:
                self._current = options, found
            return found

    def _add(self, key: Any, variant: Callable[..., Any] | None) -> None:
        self._compiled[key] = variant
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)

    def _compile_for(self, options: Options, inputs: Sequence[Any]) -> Callable[..., Any]:
        gm = _compat.copy_dynamo_graph(self._gm)
        if self._device is None:
            return self._compile(gm, inputs, options, False)
        records = _compat.add_input(
            gm, "highway_records", new_records(self._device, options.records_blocks), inputs
        )
        return self._compile(gm, [*inputs, records], options, True)


def _trains(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether there is a backward pass."""
    tensors = [x for x in (*inputs, *gm.parameters()) if isinstance(x, Tensor)]
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _device_of(gm: GraphModule, inputs: Sequence[Any]) -> torch.device:
    """Where the chains are taken to be."""
    tensors = [x for x in (*inputs, *gm.parameters()) if isinstance(x, Tensor)]
    return next(x.device for x in tensors if x.requires_grad)
