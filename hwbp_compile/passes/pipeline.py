"""The passes in order, from a joint graph to a rewritten one, and a record of what was done."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from .. import _compat
from ..blocks.fuse import Fused, fuse_forward
from ..blocks.limits import is_for_cpus
from ..chain import Chain, Refusal
from ..errors import CannotRewrite
from ..options import Options
from ..solvers.observe import OBSERVE
from . import batch_rules as _batch_rules  # noqa: F401 - registers the rules
from .apart import take_apart
from .chains import find_chains
from .decide import longest_run, reason_to_leave_exact, without_tail
from .emit import Schedule, closes_a_cycle, insert_schedule, trace_schedule
from .linear import LinearPart, linear_part
from .linear_ops import op_name
from .memory_views import read_as_values
from .order import sort_topologically
from .record import needed_without_records, observations, record
from .restack import restack
from .row_gradients import join_row_gradients
from .sink import sink_stacks
from .sizes import sizes_of_inputs
from .unstacked import multiply_unstacked
from .worth import Comparison, Sequential, compare, verdicts

log = logging.getLogger(__name__)

BY_KERNEL = "one kernel computes its exact backward pass, which takes less time than iterations"
_BY_STRIDES = {"aten::as_strided", "aten::as_strided_scatter"}
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
    """That of its iteration; where there is a reason, that of an exact sweep by one kernel."""
    new: tuple[Node, ...] = ()
    comparison: Comparison | None = None
    """What was expected of it, where that decided."""
    no_sweep: str = ""
    """Why a chain that stays exact is not swept by one kernel, where that was tried."""

    @property
    def is_iterated(self) -> bool:
        """Whether its backward pass is replaced by an iteration."""
        return self.schedule is not None and not self.reason

    @property
    def is_swept(self) -> bool:
        """Whether its backward pass is exact, and one kernel for most of it or all."""
        return self.schedule is not None and bool(self.reason)

    @property
    def swept_share(self) -> str:
        """Of how many blocks a kernel is, where it is not for all."""
        if not self.is_swept or self.schedule is None:
            return ""
        swept, blocks = len(self.schedule.chain.blocks), len(self.found.blocks)
        return "" if swept == blocks else f"the kernel is for {swept} of its {blocks} blocks"


@dataclass
class Record:
    """What the passes did to one joint graph."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    needs_gradient: bool = True
    forward: list[Fused] = field(default_factory=list)
    """What became of the forward pass of the blocks that were rewritten."""

    @property
    def is_exact(self) -> bool:
        """Whether no chain is iterated."""
        return not any(outcome.is_iterated for outcome in self.outcomes)


def rewrite(
    graph: Graph,
    options: Options,
    *,
    keeps_records: bool = False,
    compiles: bool = False,
    stops: bool = False,
) -> Record:
    """Rewrite all chains of a joint graph in place.

    Nothing is changed before a chain's whole schedule is traced, so whatever goes wrong leaves it exact.

    Args:
        graph: changed in place.
        options: those in force.
        keeps_records: whether its last input is memory for :mod:`.record`.
        compiles: whether kernels of our own are compiled, as the graph is going to run.
        stops: whether it ends where a chain is found whose iterations are to be watched.

    Raises:
        IsWatched: see ``stops``.
    """
    done = Record()
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        done.seconds[name] = done.seconds.get(name, 0.0) + now - clock
        clock = now

    # As it was, for whatever fails before a schedule is in the graph.
    backup = _compat.copy_graph(graph)
    prepare(graph, backup=backup)
    lap("prepare")
    part = linear_part(graph)
    done.needs_gradient = bool(part.order)
    found = list(find_chains(part))
    if by_strides := [n for n in part.order if op_name(n) in _BY_STRIDES]:
        # Their results depend on where in memory an operand lies, and the new cotangents lie elsewhere.
        reason = f"unsupported operator {by_strides[0].target} in the backward pass"
        found = [Refusal(reason, f.blocks[-1].exit[0], f.blocks, f.residual) for f in found if f.blocks]
    # In the order of the backward pass, as the records are to be.
    place = {node: i for i, node in enumerate(graph.nodes)}
    found.sort(key=lambda f: min((place[n] for block in f.blocks for n in block.nodes), default=0))
    lap("find")
    taken = {n for f in found if isinstance(f, Chain) for block in f.blocks for n in block.nodes}
    chosen = None if options.chosen is None else options.chosen.over_depth
    of_chains = [options.for_chain(chosen, i) for i in range(len(found))]
    done.outcomes = _outcomes(graph, found, of_chains, part, taken, stops, compiles)
    lap("trace")
    if any(outcome.schedule is not None for outcome in done.outcomes):
        done.outcomes = _insert_all(graph, done.outcomes, backup)
        lap("insert")
    live = needed_without_records(graph)
    _record(graph, done.outcomes, keeps_records)
    done.outcomes = [replace(o, new=tuple(n for n in o.new if n in live)) for o in done.outcomes]
    lap("record")
    is_rewritten = any(outcome.schedule is not None for outcome in done.outcomes)
    simplified(graph, *([sink_stacks, restack] if is_rewritten else []), take_apart)
    if is_rewritten:
        simplified(graph, multiply_unstacked)
        watched = options.watch and not done.is_exact
        if uses_kernels(options) and not watched:
            fused: list[Fused] = []

            def fuse(graph: Graph) -> None:
                fused.extend(fuse_forward(graph, compiles=compiles))

            done.forward = fused if simplified(graph, fuse) else []
    _write_last(graph)
    lap("simplify")
    return done


def uses_kernels(options: Options) -> bool:
    """Whether several operators may become one, other than by the compiler's choice."""
    return options.codegen == "inductor"


def prefers_kernels() -> bool:
    """Whether what is fastest is an exact sweep by one kernel, wherever there is one.

    It takes as much arithmetic as one iteration, and no more calls.
    """
    return True


def may_have_kernels(graph: Graph, options: Options) -> bool:
    """Whether chains that stay exact may become kernels of our own."""
    return uses_kernels(options) and options.apply != "never" and is_for_cpus(graph)


def _write_last(graph: Graph) -> None:
    """Have inputs written to after all else, as they were before: what is new reads them as they are given.

    The partitioner of torch also relies on these copies being the last operators.
    """
    (output,) = graph.find_nodes(op="output")
    for node in list(graph.nodes):
        if op_name(node) == "aten::copy_" and node.args[0].op == "placeholder" and not node.users:
            output.prepend(node)


def prepare(graph: Graph, *, backup: Graph | None = None) -> None:
    """What autograd wrote, in operators that can be batched; applied twice it is as if applied once."""
    backup = _compat.copy_graph(graph) if backup is None else backup
    simplified(graph, sizes_of_inputs, backup=backup)
    simplified(graph, read_as_values, join_row_gradients, backup=backup)


def simplified(graph: Graph, *passes: Callable[[Graph], object], backup: Graph | None = None) -> bool:
    """Apply passes that the result does not depend on; nothing happens if one of them fails.

    Args:
        graph: changed in place.
        passes: one after the other.
        backup: a copy of a graph that computes the same, to go back to; by default one that is made here.

    Returns:
        Whether they were applied.
    """
    backup = _compat.copy_graph(graph) if backup is None else backup
    try:
        for each in passes:
            each(graph)
        graph.lint()
    except _compat.restart_exceptions():
        raise
    except Exception:
        names = ", ".join(each.__name__ for each in passes)
        log.warning("%s: left out after an internal error.", names, exc_info=True)
        _compat.restore_graph(graph, backup)
        return False
    return True


def _record(graph: Graph, outcomes: list[Outcome], keep: bool) -> None:
    """Collect what the iterations recorded; nothing is, if that fails."""
    over_depth = [n for outcome in outcomes for n in outcome.new if n.target is OBSERVE]
    known = set(over_depth)
    try:
        over_time = [n for n in observations(graph) if n not in known]
        record(graph, over_time, over_depth, keep=keep)
    except _compat.restart_exceptions():
        raise
    except Exception:
        log.warning("The error of the iterations is not recorded after an internal error.", exc_info=True)
        for node in observations(graph):
            graph.erase_node(node)
        graph.eliminate_dead_code()


def _insert_all(graph: Graph, outcomes: list[Outcome], backup: Graph) -> list[Outcome]:
    """Put the schedules into the graph, the longest chain first; if that fails it becomes ``backup``."""
    renamed: dict[Node, Node] = {}
    done: dict[int, Outcome] = {}
    try:
        for i in sorted(range(len(outcomes)), key=lambda i: -len(outcomes[i].found.blocks)):
            outcome = outcomes[i]
            if outcome.schedule is None:
                done[i] = outcome
            elif closes_a_cycle(outcome.schedule, renamed):
                why = "what it reads depends on its own result, by way of another rewritten chain"
                done[i] = _without_schedule(outcome, why)
            else:
                new = insert_schedule(graph, outcome.schedule, renamed)
                done[i] = replace(outcome, new=tuple(new))
        sort_topologically(graph)
        graph.eliminate_dead_code()
        graph.lint()
    except Exception as error:  # see _traced
        log.warning("All chains are left exact after an internal error.", exc_info=True)
        _compat.restore_graph(graph, backup)
        prepare(graph, backup=backup)
        return [_without_schedule(o, _internal(error)) for o in outcomes]
    return [done[i] for i in range(len(outcomes))]


def _without_schedule(outcome: Outcome, why: str) -> Outcome:
    """What becomes of a chain whose schedule, if it has one, cannot be in the graph."""
    if outcome.schedule is None:
        return outcome
    reason = why if outcome.reason in ("", BY_KERNEL) else outcome.reason
    return Outcome(outcome.found, reason, no_sweep=why if outcome.is_swept else "")


def _outcomes(
    graph: Graph,
    found: Sequence[Chain | Refusal],
    options: Sequence[Options],
    part: LinearPart,
    taken: set[Node],
    stops: bool,
    compiles: bool,
) -> list[Outcome]:
    """Trace the schedules of the chains, and decide which of them there are to be."""

    @functools.cache
    def sweep(number: int) -> Schedule | str:
        """An exact sweep by one kernel; or why there is none, empty if none was tried."""
        chain, each = found[number], options[number]
        if isinstance(chain, Refusal) or len(chain.blocks) < each.min_blocks:
            return ""
        if not may_have_kernels(graph, each):
            return ""
        run = longest_run(chain)
        if len(run.blocks) < each.min_blocks:
            return "its blocks are of several kinds"
        exact = replace(each, iterations="exact", watch=0, exact_tail=0)
        return _traced(run, exact, part, taken, compiles=compiles)

    def is_preferred(number: int) -> bool:
        kernel = sweep(number)
        if not prefers_kernels() or isinstance(kernel, str):
            return False
        return len(kernel.chain.blocks) >= _PREFERRED * len(found[number].blocks)

    def chosen(number: int) -> Outcome:
        chain, each = found[number], options[number]
        chooses = each.apply == "auto" and (each.watch > 0 or each.iterations != "exact")
        if chooses and is_preferred(number):
            return Outcome(chain, BY_KERNEL)
        if each.watch and each.apply != "auto":
            return Outcome(chain, "")
        return _plan(chain, judged[number], part, taken)

    judged = [o.judged() if o.watch and o.apply == "auto" else o for o in options]
    planned = _worth_it(graph, [chosen(i) for i in range(len(found))], judged)
    watched = [bool(o.watch) and not p.reason for o, p in zip(options, planned, strict=True)]
    if stops and any(w and isinstance(f, Chain) for w, f in zip(watched, found, strict=True)):
        raise IsWatched
    done = []
    for i, outcome in enumerate(planned):
        if watched[i]:
            seen = _plan(found[i], replace(options[i], iterations=options[i].watch), part, taken)
            outcome = replace(seen, comparison=outcome.comparison)
        elif outcome.schedule is None:
            kernel = sweep(i)
            if isinstance(kernel, Schedule):
                outcome = replace(outcome, schedule=kernel)
            else:
                outcome = replace(outcome, no_sweep=kernel)
        done.append(outcome)
    return done


def _plan(found: Chain | Refusal, options: Options, part: LinearPart, taken: set[Node]) -> Outcome:
    """Trace the schedule of a chain's iteration, if the options allow any."""
    if isinstance(found, Refusal):
        return Outcome(found, found.reason)
    reason = reason_to_leave_exact(found, options)
    if reason is not None:
        return Outcome(found, reason)
    schedule = _traced(found, options, part, taken)
    return Outcome(found, schedule) if isinstance(schedule, str) else Outcome(found, "", schedule)


def _traced(
    chain: Chain, options: Options, part: LinearPart, taken: set[Node], *, compiles: bool = False
) -> Schedule | str:
    """The schedule of a chain; or why there is none."""
    try:
        head = without_tail(chain, options.exact_tail)
        return trace_schedule(head, options, part, taken, compiles=compiles)
    except CannotRewrite as refusal:
        return refusal.reason
    except _compat.restart_exceptions():
        raise
    except Exception as error:  # a bug of ours must not stop a training that exact backprop could do
        log.warning(
            "A chain of %d blocks is left exact after an internal error.", len(chain.blocks), exc_info=True
        )
        return _internal(error)


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
        except Exception as error:
            log.warning("A chain is left exact as its cost cannot be estimated.", exc_info=True)
            reason = f"its cost cannot be estimated ({type(error).__name__}: {error})"
            done[i] = replace(outcome, reason=reason, schedule=None)
            continue
        log.info("A chain of %d blocks: %s", len(outcome.found.blocks), comparison)
        done[i] = replace(outcome, comparison=comparison)
    reasons = verdicts([outcome.comparison for outcome in done])
    return [replace(o, reason=r, schedule=None) if r else o for o, r in zip(done, reasons, strict=True)]


def _internal(error: Exception) -> str:
    return f"internal error: {type(error).__name__}: {error}"
