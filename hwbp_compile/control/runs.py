"""The training steps of one graph with one model's parameters: settings in force, and what was recorded."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor

from .. import _compat
from ..options import Options
from ..passes.record import EMPTY, OVER_TIME, new_records
from ..solvers.observe import HEAD, STEPS
from .auto import AutoIterations
from .settings import epoch, overrides_for

log = logging.getLogger(__name__)

LENGTH = 256
"""Steps of which records are kept."""
SENT = 4
"""Steps back, from the next one on, that may still wait for their backward pass."""


@dataclass(frozen=True, slots=True)
class ChainRecord:
    """What one backward pass recorded of one chain."""

    blocks: int
    """L, or the number of groups."""
    over_time: bool
    """Whether it is a recurrence."""
    iterations: int
    """k; with exact gradients the iterations made beside them."""
    steps: tuple[float, ...]
    """Per iteration, the mean over the blocks of how far it moved the cotangent, relative to it."""
    largest: float
    """The largest element of the cotangent that came from the loss."""
    block_steps: tuple[float, ...] = ()
    """The last step of each block (or group) by itself, in the order of the forward pass, if asked for."""

    @property
    def is_finite(self) -> bool:
        """Whether the gradient that came from the loss is: under a gradient scaler it need not be."""
        return math.isfinite(self.largest)

    @property
    def is_moved(self) -> bool:
        """Whether an iteration changed anything; where no gradient arrives none does, which says nothing."""
        return any(step != 0 for step in self.steps)

    @property
    def estimate(self) -> float:
        """How far one more iteration would move the cotangents.

        It is the last step, times its ratio to the one before, or the step itself if that is no smaller.
        """
        last = self.steps[-1]
        if len(self.steps) < 2 or not self.steps[-2] > 0:
            return last
        return last * min(1.0, last / self.steps[-2])


class Entry:
    """One training step."""

    def __init__(self, number: int, options: Options, records: Tensor) -> None:
        self.number, self.options = number, options
        self._records = records
        self._host: Tensor | None = None if records.device.type == "cuda" else records
        self._event: Any = None
        self._came = False
        self._chains: tuple[ChainRecord, ...] = ()

    def send(self) -> None:
        """Have the records come to the host, which does not wait for them.

        Again if there were none yet: the backward pass may come after other forward passes. Not while a CUDA
        graph is captured, in which the copy would stay.
        """
        if self._records.device.type != "cuda" or _captures() or self.is_here:
            return
        if self._event is None or self._event.query():
            self._host = torch.empty(self._records.shape, pin_memory=True)
            self._host.copy_(self._records, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def unsent(self) -> Tensor | None:
        """The records, if they are on the device only."""
        return self._records if self._host is None else None

    def receive(self, host: Tensor) -> None:
        """Take records that were copied to the host; they may not have been there yet."""
        if float(host[0, 0]) != EMPTY:
            self._host, self._came = host, True

    def take_out(self) -> None:
        """Have the records in memory of their own. What is recorded later is not among them."""
        if self._host is self._records:
            self._host = self._records = self._records.clone()
        else:
            self._records = self._records.clone()

    @property
    def is_here(self) -> bool:
        """Whether something is recorded, and reading it would not wait for the device.

        While a CUDA graph is captured nothing can be asked.
        """
        if self._host is None or _captures():
            return False
        if not self._came and (self._event is None or self._event.query()):
            self._came = float(self._host[0, 0]) != EMPTY
        return self._came

    def chains(self) -> tuple[ChainRecord, ...]:
        """One record per chain; none before the backward pass is done, and where nothing is iterated."""
        if not self._chains:
            rows = (self._host if self.is_here and self._host is not None else self._records).tolist()
            self._chains = tuple(_chain(row) for row in rows if row[0] != EMPTY)
        return self._chains


class Begun(NamedTuple):
    """What a training step runs with."""

    number: int
    options: Options
    records: Tensor | None
    """Memory for records; None if there is nothing to record."""


class _Place:
    """Memory at which all steps with the same options record.

    Of several steps that are begun before their backward passes the last one has what comes; all of it is of
    iterations with these options.
    """

    def __init__(self, records: Tensor) -> None:
        self.records = records
        self._entry: Entry | None = None

    def give_to(self, entry: Entry) -> None:
        """From now on it is this step's."""
        if self._entry is not None:
            self._entry.take_out()
        self.records.data.fill_(EMPTY)  # autograd may have saved it for a backward pass that is still to come
        self._entry = entry


def _captures() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _chain(row: list[float]) -> ChainRecord:
    kind, largest, blocks, iterations, *rest = row
    steps, each = rest[:STEPS], rest[STEPS:]
    steps, each = steps[: int(iterations)], each[: int(blocks)]
    return ChainRecord(
        int(blocks), kind == OVER_TIME, int(iterations), tuple(steps), largest, tuple(reversed(each))
    )


assert HEAD == 3, "see _chain"

_all: WeakSet[Runs] = WeakSet()


_checkpointed: WeakKeyDictionary[Any, dict[Any, list[Begun]]] = WeakKeyDictionary()
"""By checkpoint, the steps that it may compute again, in the order of its forward pass.

Under what they have in common with those of the same code that was compiled once more in between.
"""


_apart: ContextVar[list[Runs] | None] = ContextVar("hwbp_compile_apart", default=None)


@contextmanager
def apart() -> Iterator[list[Runs]]:
    """What is run inside is listed here, and nowhere else."""
    found: list[Runs] = []
    token = _apart.set(found)
    try:
        yield found
    finally:
        _apart.reset(token)


def all_runs() -> list[Runs]:
    """Of all graphs and models that are alive, in the order in which they were made."""
    return sorted(_all, key=lambda runs: runs.number)


class Runs:
    """See the module.

    Args:
        compiled: the options that the graph was compiled with.
        parameters: those that the graph reads.
        frame: equal for graphs of one code, such as those for other sizes.
        one_address: whether steps with the same options record at one address, as code in CUDA graphs does.
    """

    _made = 0
    _begun = 0

    def __init__(
        self, compiled: Options, parameters: Sequence[Tensor], frame: Any, one_address: bool = False
    ) -> None:
        self._compiled, self.frame = compiled, frame
        self._memory: dict[Options, _Place] | None = {} if one_address else None
        self._parameters = [ref(p) for p in parameters]
        self.history: deque[Entry] = deque(maxlen=LENGTH)
        self.steps = 0
        self.last_options: Options | None = None
        """Those of the last training step; None before the first."""
        self._computed_again: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        """How many steps each computation of a checkpoint's again has done."""
        self.last = 0
        """When it began a step, in the order of all steps of all graphs."""
        self.records_blocks = False
        self._with_blocks: dict[Options, Options] = {}
        self.auto: AutoIterations | None = None
        self._epoch = -1
        self._resolved = self._warned_of_capture = False
        self._unwatched: Options | None = None
        """Those of the last step with the present settings that was no watched one."""
        self._options = compiled
        Runs._made += 1
        self.number = Runs._made
        elsewhere = _apart.get()
        if elsewhere is None:
            _all.add(self)
        else:
            elsewhere.append(self)

    def parameters(self) -> list[Tensor]:
        """Those that the graph reads."""
        return [p for each in self._parameters if (p := each()) is not None]

    def first_options(self) -> Options:
        """The settings of the first training step, before it begins."""
        self._resolve()
        return self._options if self.auto is None else self.auto.first

    def next_options(self, iterates: Callable[[Options], bool] = lambda _: True) -> Options:
        """The settings of the next training step; those that are always the same are the same object.

        Args:
            iterates: whether with some options anything is iterated in that step. Where nothing is when the
                iterations are to be watched, the step says nothing about k.
        """
        if self._epoch != epoch():
            self._resolve()
        if self.auto is None:
            options = self._options
        elif _captures():
            options = self._captured_options(self.auto)
        elif iterates(self.auto.first):
            options = self.auto.next_options(self.history)
        else:
            self.auto.take_in(self.history)
            options = self.auto.exact
        if not self.records_blocks or not options.is_iterated:
            return options
        if options not in self._with_blocks:
            self._with_blocks[options] = replace(options, records_blocks=True)
        return self._with_blocks[options]

    def again(self, saving: _compat.Saving) -> Begun | None:
        """The step that a checkpoint computes again, which must be what it was; None if there is none."""
        if saving.inside_again and self.last_options is not None:
            begun = Begun(self.steps, self.last_options, None)
            if saving.checkpoint is not None:  # the function in the checkpoint may ask for gradients itself
                self._of_checkpoint(saving.checkpoint).append(begun)
            return begun
        if saving.again is None or not (steps := self._of_checkpoint(saving.checkpoint)):
            return None
        done = self._computed_again.get(saving.again, 0)
        self._computed_again[saving.again] = done + 1
        return steps[min(done, len(steps) - 1)]

    def _of_checkpoint(self, checkpoint: Any) -> list[Begun]:
        if checkpoint is None:
            return []
        model = id(self._parameters[0]()) if self._parameters else None
        return _checkpointed.setdefault(checkpoint, {}).setdefault((self.frame, model), [])

    def _captured_options(self, auto: AutoIterations) -> Options:
        """For a step that is captured: meanwhile nothing can be compiled, and later nothing changed."""
        if self._unwatched is not None:
            return self._unwatched
        if not self._warned_of_capture:
            self._warned_of_capture = True
            log.warning(
                "A CUDA graph is captured of a step whose iterations are only watched, as k has not been "
                "chosen yet. Run more steps before, or give iterations a number."
            )
        return auto.first

    def _resolve(self) -> None:
        self._epoch = epoch()
        overrides = overrides_for(self.parameters())
        options = self._compiled if overrides is None else overrides.over(self._compiled)
        if self._resolved and options == self._options:
            return
        self._resolved, self._unwatched = True, None
        self._with_blocks.clear()
        self._options = options
        warned = self.auto is not None and self.auto.warned
        self.auto = AutoIterations(options, self.steps, warned) if options.iterations == "auto" else None

    def memory(self, device: torch.device, options: Options) -> Tensor:
        """Where a step with these options records; see :func:`.passes.record.new_records`."""
        if self._memory is None:
            return new_records(device, options.records_blocks)
        if options not in self._memory:
            self._memory[options] = _Place(new_records(device, options.records_blocks))
        return self._memory[options].records

    def fetch(self) -> None:
        """Have what all steps recorded on the host, waiting for the device once."""
        by_shape: dict[torch.Size, list[tuple[Entry, Tensor]]] = {}
        for entry in tuple(self.history):  # other threads may begin steps
            if (records := entry.unsent) is not None:
                by_shape.setdefault(records.shape, []).append((entry, records))
        for pairs in by_shape.values():
            together = torch.stack([records for _, records in pairs]).cpu()
            for (entry, _), host in zip(pairs, together, strict=True):
                entry.receive(host)

    def began(self, options: Options, records: Tensor | None) -> None:
        """A training step begins its forward pass.

        Args:
            options: those in force.
            records: where it will record; None if there is nothing to record.
        """
        if self.auto is not None:  # else nobody reads them but who asks for them, and waits
            for entry in {*islice(reversed(self.history), SENT), *self.auto.awaited()}:
                entry.send()
        if records is not None:
            entry = Entry(self.steps, options, records)
            self.history.append(entry)
            if self._memory is not None:
                self._memory[options].give_to(entry)
        saving = _compat.saving()
        if saving.checkpoint is not None and saving.again is None:
            self._of_checkpoint(saving.checkpoint).append(Begun(self.steps, options, records))
        self.last_options = options
        if not options.watch:
            self._unwatched = options
        self.steps += 1
        Runs._begun += 1
        self.last = Runs._begun
