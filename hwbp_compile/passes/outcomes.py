"""Seventh pass: what becomes of each chain. It is iterated, swept exactly by one kernel, or left as it is."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from .. import _compat
from ..chain import Chain, Refusal
from ..errors import CannotRewrite
from ..options import Options
from . import kernels
from .decide import longest_run, part_of, reason_to_leave_exact, without_tail
from .emit import Schedule, trace_schedule, trace_sweep
from .linear import LinearPart
from .worth import Comparison, Sequential, compare, verdicts

log = logging.getLogger(__name__)

BY_KERNEL = "one kernel computes its exact backward pass, which takes less time than iterations"
_PREFERRED = 0.75
"""The share of a chain's blocks that a kernel has to sweep to be preferred to iterating on all of them."""


class IsWatched(BaseException):
    """Ends a compilation by Inductor, which would take any other exception for a failure of its own."""


@dataclass(frozen=True)
class Outcome:
    """What became of one chain: ``reason`` is empty if it is iterated; ``new`` are its schedule's nodes."""

    found: Chain | Refusal
    reason: str
    schedule: Schedule | None = None
    """That of its iteration or, where there is a reason, that of an exact sweep by one kernel."""
    new: tuple[Node, ...] = ()
    comparison: Comparison | None = None
    """What was expected of it, where that decided."""
    no_sweep: str = ""
    """Why a chain that stays exact is not swept by one kernel, where that was tried."""

    @property
    def is_iterated(self) -> bool:
        """Whether its backward pass is replaced by an iteration."""
        return self.schedule is not None and not self.schedule.is_exact

    @property
    def is_swept(self) -> bool:
        """Whether one kernel computes its exact backward pass, or that of some of its blocks."""
        return self.schedule is not None and self.schedule.is_exact

    @property
    def swept(self) -> int:
        """How many blocks the kernel is for, 0 where there is none."""
        return len(self.schedule.chain.blocks) if self.schedule is not None and self.is_swept else 0

    def without_schedule(self, why: str) -> Outcome:
        """What becomes of it where its schedule, if it has one, cannot be in the graph."""
        if self.schedule is None:
            return self
        if self.reason in ("", BY_KERNEL):
            return Outcome(self.found, why)
        return replace(self, schedule=None, no_sweep=why)


@dataclass(frozen=True)
class Backward:
    """The backward half of a joint graph.

    ``part`` is what is linear in the tangents, ``taken`` the nodes of all chains, and ``compiles`` tells
    whether kernels of our own are compiled, as the graph is going to run.
    """

    graph: Graph
    part: LinearPart
    taken: set[Node]
    compiles: bool
    claimed: dict[int, set[Node]] = field(default_factory=dict)
    """By the number of a chain, the gradients that its schedule computes."""

    def not_for(self, number: int) -> set[Node]:
        """What the schedule of a chain is not to compute: states of all, and gradients of others.

        What hangs on a state alone that two chains begin with belongs to either.
        """
        return self.taken.union(*(nodes for n, nodes in self.claimed.items() if n != number))


def outcomes_of(
    backward: Backward, found: Sequence[Chain | Refusal], options: Sequence[Options], *, stops: bool
) -> list[Outcome]:
    """Trace the schedules of the chains, and decide which of them there are to be.

    Args:
        backward: where they are; the graph is only read.
        found: the chains, and what looks like one.
        options: those in force for each.
        stops: whether it ends where a chain's iterations are to be watched.

    Raises:
        IsWatched: see ``stops``.
    """
    candidates = [_Candidate(backward, i, *each) for i, each in enumerate(zip(found, options, strict=True))]
    planned = _worth_it(backward.graph, [c.plan() for c in candidates], [c.judged for c in candidates])
    pairs = list(zip(candidates, planned, strict=True))
    if stops and any(c.is_watched(p) and isinstance(p.found, Chain) for c, p in pairs):
        raise IsWatched
    return [c.outcome(p) for c, p in pairs]


class _Candidate:
    """A chain, or what looks like one, of which it is to be decided what becomes."""

    def __init__(self, backward: Backward, number: int, found: Chain | Refusal, options: Options) -> None:
        self._backward, self._number, self._found, self._options = backward, number, found, options
        is_chosen = options.watch and options.apply == "auto"
        self.judged = options.judged() if is_chosen else options
        """The options by which it is judged whether an iteration is worth it."""

    def plan(self) -> Outcome:
        """What is to become of it, if an iteration is worth it; without the sweep that there may be."""
        options = self._options
        may_iterate = options.watch > 0 or options.iterations != "exact"
        if options.apply == "auto" and may_iterate and self._prefers_sweep():
            return Outcome(self._found, BY_KERNEL)
        if options.watch and options.apply != "auto":
            return Outcome(self._found, "")
        return self._iterated(self.judged)

    def is_watched(self, planned: Outcome) -> bool:
        """Whether only the steps of its iterations are recorded."""
        return self._options.watch > 0 and not planned.reason

    def outcome(self, planned: Outcome) -> Outcome:
        """What becomes of it, as was planned; with its sweep."""
        if self.is_watched(planned):
            seen = self._iterated(replace(self._options, iterations=self._options.watch))
            return replace(seen, comparison=planned.comparison)
        if planned.schedule is not None:
            return planned
        if isinstance(self._sweep, Schedule):
            return replace(planned, schedule=self._sweep)
        return replace(planned, no_sweep=self._sweep)

    @functools.cached_property
    def _sweep(self) -> Schedule | str:
        """The exact sweep by one kernel; or why there is none, empty if none was tried."""
        chain, backward, fewest = self._found, self._backward, self._options.min_blocks
        if isinstance(chain, Refusal) or len(chain.blocks) < fewest:
            return ""
        if not kernels.may_have_kernels(backward.graph, self._options):
            return ""
        start, end = longest_run(chain)
        if end - start < fewest:
            return "its blocks are of several kinds"

        def trace(taken: set[Node]) -> Schedule:
            return trace_sweep(part_of(chain, start, end), backward.part, taken, compiles=backward.compiles)

        return self._traced(end - start, trace)

    def _prefers_sweep(self) -> bool:
        if not kernels.prefers_kernels() or isinstance(self._found, Refusal):
            return False
        start, end = longest_run(self._found)
        is_enough = end - start >= _PREFERRED * len(self._found.blocks)
        return is_enough and isinstance(self._sweep, Schedule)

    def _iterated(self, options: Options) -> Outcome:
        """It with the schedule of its iteration, if the options allow any."""
        found, backward = self._found, self._backward
        if isinstance(found, Refusal):
            return Outcome(found, found.reason)
        reason = reason_to_leave_exact(found, options)
        if reason is not None:
            return Outcome(found, reason)

        def trace(taken: set[Node]) -> Schedule:
            return trace_schedule(without_tail(found, options.exact_tail), options, backward.part, taken)

        schedule = self._traced(len(found.blocks), trace)
        return Outcome(found, schedule) if isinstance(schedule, str) else Outcome(found, "", schedule)

    def _traced(self, blocks: int, trace: Callable[[set[Node]], Schedule]) -> Schedule | str:
        """A schedule of so many blocks, which is told what it is not to compute; or why there is none."""
        try:
            schedule = trace(self._backward.not_for(self._number))
        except CannotRewrite as refusal:
            return refusal.reason
        except _compat.restart_exceptions():
            raise
        except Exception as error:  # a bug of ours must not stop a training that exact backprop could do
            log.warning("A chain of %d blocks is left exact after an internal error.", blocks, exc_info=True)
            return internal(error)
        summed = {n for group in schedule.summed for n in group.nodes}
        self._backward.claimed[self._number] = summed.union(schedule.replaced)
        return schedule


def _worth_it(graph: Graph, outcomes: Sequence[Outcome], options: Sequence[Options]) -> list[Outcome]:
    """Leave chains exact that are not expected to be faster iterated."""
    exact: Sequential | None = None
    done = list(outcomes)
    for i, (outcome, each) in enumerate(zip(outcomes, options, strict=True)):
        if outcome.schedule is None or outcome.reason or each.apply != "auto":
            continue
        try:
            exact = exact or Sequential(graph)
            comparison = compare(exact, outcome.schedule)
        except _compat.restart_exceptions():
            raise
        except Exception as error:  # nor must a failure to count
            log.warning("A chain is left exact as its cost cannot be estimated.", exc_info=True)
            reason = f"its cost cannot be estimated ({type(error).__name__}: {error})"
            done[i] = replace(outcome, reason=reason, schedule=None)
            continue
        log.info("A chain of %d blocks: %s", len(outcome.found.blocks), comparison)
        done[i] = replace(outcome, comparison=comparison)
    reasons = verdicts([outcome.comparison for outcome in done])
    return [replace(o, reason=r, schedule=None) if r else o for o, r in zip(done, reasons, strict=True)]


def internal(error: Exception) -> str:
    """A reason for leaving a chain exact."""
    return f"internal error: {type(error).__name__}: {error}"
