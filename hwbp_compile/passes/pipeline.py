"""The passes in order, from a joint graph to a rewritten one, and a record of what was done."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from .. import _compat
from ..chain import Chain, Refusal
from ..errors import CannotRewrite
from ..options import Options
from . import batch_rules as _batch_rules  # noqa: F401 - registers the rules
from .chains import find_chains
from .decide import reason_to_leave_exact, without_tail
from .emit import Schedule, insert_schedule, trace_schedule
from .linear import linear_part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of one chain: ``reason`` is empty if it was rewritten; ``new`` are its schedule's nodes."""

    found: Chain | Refusal
    reason: str
    schedule: Schedule | None = None
    new: tuple[Node, ...] = ()


@dataclass
class Record:
    """What the passes did to one joint graph."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    needs_gradient: bool = True


def rewrite(graph: Graph, options: Options) -> Record:
    """Rewrite all chains of a joint graph in place.

    Nothing is changed before a chain's whole schedule is traced, so whatever goes wrong leaves it exact.
    """
    record = Record()
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        record.seconds[name] = record.seconds.get(name, 0.0) + now - clock
        clock = now

    part = linear_part(graph)
    record.needs_gradient = bool(part.order)
    found = list(find_chains(part))
    lap("find")
    for each in found:
        record.outcomes.append(_plan(each, options))
        lap("trace")
    renamed: dict[Node, Node] = {}
    for i, outcome in enumerate(record.outcomes):
        if outcome.schedule is not None:
            new = insert_schedule(graph, outcome.schedule, renamed)
            record.outcomes[i] = Outcome(outcome.found, "", outcome.schedule, tuple(new))
    if renamed:
        _compat.sort_topologically(graph)
        graph.eliminate_dead_code()
        graph.lint()
    lap("insert")
    return record


def _plan(found: Chain | Refusal, options: Options) -> Outcome:
    """Decide on one chain and trace its schedule."""
    if isinstance(found, Refusal):
        return Outcome(found, found.reason)
    reason = reason_to_leave_exact(found, options)
    if reason is not None:
        return Outcome(found, reason)
    try:
        return Outcome(found, "", trace_schedule(without_tail(found, options.exact_tail), options))
    except CannotRewrite as refusal:
        return Outcome(found, refusal.reason)
    except _compat.restart_exceptions():
        raise
    except Exception as error:  # a bug of ours must not stop a training that exact backprop could do
        log.warning(
            "A chain of %d blocks is left exact after an internal error.", len(found.blocks), exc_info=True
        )
        return Outcome(found, f"internal error: {type(error).__name__}: {error}")
