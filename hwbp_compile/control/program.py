"""A compiled graph, and whether its backward pass records anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .. import _compat
from ..passes.record import EMPTY


@dataclass(eq=False)
class Program:
    """A graph, compiled.

    Code that comes from a cache was rewritten by another process, or not: what it records shows in its first
    backward pass.
    """

    run: Callable[..., Any]
    records: bool
    """Whether its last input is memory for records, besides the inputs of the graph."""
    is_sure: bool = True
    """Whether it is known that something is recorded there."""

    def records_nothing(self, unused: Tensor) -> None:
        """Nothing is written to the memory it was traced with, after all: from now on it is always this."""
        self.run = partial(_with_last, self.run, unused)
        self.records, self.is_sure = False, True

    def watch(self, results: Any, records: Tensor) -> None:
        """Find out from the backward pass of a run with these results, without waiting for a device."""
        if records.device.type == "cpu":
            _compat.after_backward_pass(results, lambda: self._found(records))

    def _found(self, records: Tensor) -> None:
        if self.is_sure:
            return
        if float(records[0, 0]) == EMPTY:
            self.records_nothing(records)
        else:
            self.is_sure = True


def _with_last(run: Callable[..., Any], last: Any, *args: Any) -> Any:
    """Call what was traced with one more input."""
    return run(*args, last)
