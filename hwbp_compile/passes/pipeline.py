"""The passes in order, from a joint graph to a rewritten one, and a record of what was done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from .. import _compat
from ..blocks.fuse import Fused, fuse_forward
from ..chain import Chain, Refusal
from ..options import Options
from ..solvers.observe import OBSERVE
from . import batch_rules as _batch_rules  # noqa: F401 - registers the rules
from . import kernels
from .apart import take_apart
from .chains import find_chains
from .emit import closes_a_cycle, insert_schedule
from .linear import linear_part
from .linear_ops import op_name
from .memory_views import read_as_values
from .order import sort_topologically
from .outcomes import Backward, Outcome, internal, outcomes_of
from .record import needed_without_records, observations, record
from .restack import restack
from .row_gradients import join_row_gradients
from .sink import sink_stacks
from .sizes import sizes_of_inputs
from .unstacked import multiply_unstacked

log = logging.getLogger(__name__)

_BY_STRIDES = {"aten::as_strided", "aten::as_strided_scatter"}


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
    done.outcomes = outcomes_of(Backward(graph, part, taken, compiles), found, of_chains, stops=stops)
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
        if kernels.uses_kernels(options) and not watched:
            fused: list[Fused] = []

            def fuse(graph: Graph) -> None:
                fused.extend(fuse_forward(graph, compiles=compiles))

            done.forward = fused if simplified(graph, fuse) else []
    _write_last(graph)
    lap("simplify")
    return done


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
                done[i] = outcome.without_schedule(why)
            else:
                new = insert_schedule(graph, outcome.schedule, renamed)
                done[i] = replace(outcome, new=tuple(new))
        sort_topologically(graph)
        graph.eliminate_dead_code()
        graph.lint()
    except Exception as error:  # see outcomes.py
        log.warning("All chains are left exact after an internal error.", exc_info=True)
        _compat.restore_graph(graph, backup)
        prepare(graph, backup=backup)
        return [o.without_schedule(internal(error)) for o in outcomes]
    return [done[i] for i in range(len(outcomes))]
