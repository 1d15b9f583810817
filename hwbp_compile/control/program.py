"""A compiled graph, and whether its backward pass records anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ..passes.record import EMPTY


class Program:
    """A graph, compiled.

    Args:
        compiled: what to call with the inputs of the graph.
        has_memory: whether it takes one more input, memory for records.
        is_sure: whether it is known that something is recorded there. Code that comes from a cache may have
            been rewritten, or not; on a CPU that shows in its first backward pass.
    """

    def __init__(self, compiled: Callable[..., Any], has_memory: bool, is_sure: bool = True) -> None:
        self._compiled, self._has_memory = compiled, has_memory
        self.is_sure = is_sure or not has_memory
        self._unused: Tensor | None = None
        """Where nothing is recorded, after all: memory that all runs are given."""

    @property
    def records(self) -> bool:
        """Whether a run needs memory for records."""
        return self._has_memory and self._unused is None

    def run(self, args: Sequence[Any], records: Tensor | None = None) -> Any:
        """Run the graph; ``records`` is new memory, if it is needed."""
        if not self._has_memory:
            return self._compiled(*args)
        unused = self._unused  # other threads may find out meanwhile
        return self._compiled(*args, records if unused is None else unused)

    def records_nothing(self, unused: Tensor) -> None:
        """Nothing is written to the memory it was traced with, after all: from now on it is always this."""
        self._unused, self.is_sure = unused, True

    def watch(self, args: Sequence[Any], results: Any, records: Tensor) -> None:
        """Find out from the backward pass of a run with these results, without waiting for a device."""
        # Where others take care of what is saved, it may be a copy that is written to.
        if records.device.type == "cpu" and not _compat.saving().is_hooked:
            _compat.after_backward_pass(args, results, lambda: self._found(records))

    def _found(self, records: Tensor) -> None:
        if self.is_sure:
            return
        if float(records[0, 0]) == EMPTY:
            self.records_nothing(torch.full_like(records, EMPTY))
        else:
            self.is_sure = True
