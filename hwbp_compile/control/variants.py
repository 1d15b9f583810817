"""One graph, compiled for each of the settings that are asked for while the model trains.

Where it leaves sizes open, a setting may need several programs: see :mod:`.choices`.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _compat
from ..options import Options
from ..passes.record import new_records
from ..ranges import Range
from .choices import Choices, Findings
from .program import Program
from .runs import Runs

log = logging.getLogger(__name__)

KEPT = 16
"""Compiled settings of one graph; the one that was used longest ago gives way to another."""


Compile = Callable[[GraphModule, Sequence[Any], Options, bool], tuple[Program, Findings]]
"""Compiles a graph, which it may change, for example inputs; whether the last one is memory for records."""


class _Current(NamedTuple):
    """What the settings that were in force last need no more than a look for."""

    options: Options
    program: Program | None
    """The one for all sizes; None where it depends on them."""
    by_range: dict[Range, Program]


class Variants:
    """What Dynamo calls in place of a graph of the user's; made while Dynamo compiles.

    Args:
        gm: the graph as Dynamo handed it over; it is left as it is.
        example_inputs: as Dynamo handed them over.
        options: those that it is compiled with.
        compile: compiles one setting.
        cuda_graphs: whether what is compiled runs in CUDA graphs, if it is for a CUDA device.
    """

    def __init__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        compile: Compile,
        cuda_graphs: bool = False,
    ) -> None:
        self._gm, self._options = gm, options
        self._fake = _compat.fake_inputs(gm, example_inputs)
        self._compile = compile
        self._compiled: OrderedDict[Any, Program | None] = OrderedDict()
        self._lock = threading.RLock()
        self._runs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._frame = _compat.frame_being_compiled()
        self._device = _device_of(gm, example_inputs) if _trains(gm, example_inputs) else None
        self._one_address = cuda_graphs and self._device is not None and self._device.type == "cuda"
        self._alone = Runs(options, (), self._frame, self._one_address)
        self._last: tuple[Any, Runs] = (lambda: None, self._alone)
        self._position: int | None = None
        self._seen_arguments = False
        # What the model begins with is compiled at once, while Dynamo is there. What is faster is chosen
        # meanwhile, for the sizes at hand.
        first = self._runs_of(_compat.real_inputs(gm)).first_options()
        program, findings = self._compile_for(first, example_inputs)
        self._known = _compat.known_of_sizes(self._fake)
        self._choices = Choices(gm, self._fake, self._lock)
        self._choices.found(first, findings)
        range_ = self._choices.open_sizes.traced
        self._first: tuple[Options, Range, Program] | None = (first, range_, program)
        self._begun = first, program
        depends = self._device is not None and self._choices.matter(first)
        self._current = _Current(first, None if depends else program, {range_: program})

    def __call__(self, *args: Any) -> Any:
        """Run the graph with the settings in force for the parameters it is given."""
        if self._device is None:  # settings are of the backward pass
            assert self._current.program is not None
            return self._current.program.run(args)
        runs = self._runs_of(args)
        saving = _compat.saving()
        begun = runs.again(saving) if saving.is_hooked else None
        if begun is not None:
            program, records = self._variant(begun.options, args), begun.records
            if records is None and program.records:  # compiled anew: that it records nothing is not known yet
                records = runs.memory(self._device, begun.options)
            return program.run(args, records)
        options = runs.next_options(functools.partial(self._iterates, args))
        program = self._variant(options, args)
        if not program.records:
            runs.began(options, None)
            return program.run(args)
        records = runs.memory(self._device, options)
        runs.began(options, records)
        results = program.run(args, records)
        if not program.is_sure:
            program.watch(args, results, records)
        return results

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
                self._runs[parameter] = Runs(self._options, read, self._frame, self._one_address)
            runs = self._runs[parameter]
        self._last = ref(parameter), runs
        return runs

    def _iterates(self, args: Sequence[Any], options: Options) -> bool:
        """Whether anything is iterated with these options, for these sizes."""
        if not self._choices.matter(options):
            return True
        range_ = self._choices.open_sizes.range_of(args)
        if self._first is not None:
            if self._first[1] == range_:
                return True  # It may be, and as long as there are no other sizes no more has to be known.
            self._place_first()
        return self._choices.options_for(options, range_).is_iterated

    def _variant(self, options: Options, args: Sequence[Any]) -> Program:
        current = self._current
        if current.options is options:
            if current.program is not None:
                return current.program
            found = current.by_range.get(self._choices.open_sizes.range_of(args))
            if found is not None:
                return found
        with self._lock:
            return self._find(options, args)

    def _find(self, options: Options, args: Sequence[Any]) -> Program:
        self._place_first()
        range_ = self._choices.open_sizes.range_of(args)
        wanted = self._choices.options_for(options, range_)
        if wanted not in self._compiled:
            log.info("A graph is compiled for iterations=%s.", wanted.iterations)
            (compiled, _), general = _compat.compile_later(
                lambda: self._compile_for(wanted, self._fake), self._fake, self._known
            )
            if not general and self._choices.matter(options) and options == self._begun[0]:
                log.info("That would hold for some of the sizes only. What was compiled first stays.")
                compiled, general = self._begun[1], True
            # Where it holds for some sizes only, it is compiled for each of them that comes.
            self._add(wanted, compiled if general else None)
        key: Any = wanted
        if self._compiled[wanted] is None:
            key = wanted, tuple(x for x in args if isinstance(x, int))
        if key not in self._compiled:
            self._add(key, self._compile_for(wanted, args)[0])
        self._compiled.move_to_end(key)
        found = self._compiled[key]
        assert found is not None
        if key is wanted:
            before = self._current.by_range if self._current.options is options else {}
            everywhere = None if self._choices.matter(options) else found
            self._current = _Current(options, everywhere, before | {range_: found})
        return found

    def _place_first(self) -> None:
        """Have the first program found by what was chosen for it."""
        with self._lock:
            if self._first is not None:
                first, range_, program = self._first
                self._first = None
                self._add(self._choices.options_for(first, range_), program)

    def _add(self, key: Any, program: Program | None) -> None:
        self._compiled[key] = program
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)

    def _compile_for(self, options: Options, inputs: Sequence[Any]) -> tuple[Program, Findings]:
        gm = _compat.copy_dynamo_graph(self._gm)
        if self._device is None or not options.is_iterated:
            return self._compile(gm, inputs, options, False)
        memory = new_records(self._device, options.records_blocks)
        records = _compat.add_input(gm, "highway_records", memory, inputs, one_address=self._one_address)
        return self._compile(gm, [*inputs, records], options, True)


def _trains(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether there is a backward pass."""
    tensors = [x for x in (*inputs, *gm.parameters()) if isinstance(x, Tensor)]
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _device_of(gm: GraphModule, inputs: Sequence[Any]) -> torch.device:
    """Where the chains are taken to be."""
    tensors = [x for x in (*inputs, *gm.parameters()) if isinstance(x, Tensor)]
    return next(x.device for x in tensors if x.requires_grad)
