"""Log what the passes did: ``TORCH_LOGS="+hwbp_compile"``, and artifacts for tlparse.

A compilation that torch takes from a cache runs no pass, so it logs nothing; see :mod:`.explain` for a
report that does not depend on caches.
"""

from __future__ import annotations

import logging

from torch.fx import Graph

from .. import _compat
from ..blocks.fuse import Fused
from ..passes.outcomes import Outcome
from ..passes.pipeline import Record
from .where import Names, block_modules, shorten

log = logging.getLogger(__name__)


def log_record(record: Record, graph: Graph) -> None:
    """Write one line per chain and the time of each pass; both and the graph also as artifacts."""
    if not record.needs_gradient:
        log.debug("A graph without a backward half is left as it is.")
        return
    lines = [_describe(outcome) for outcome in record.outcomes] or ["no residual connection found"]
    lines += [_describe_forward(fused) for fused in record.forward]
    for line in lines:
        log.info("%s", line)
    times = [f"pass {name}: {seconds:.3f} s" for name, seconds in record.seconds.items()]
    for line in times:
        log.debug("%s", line)
    _compat.trace_artifact("hwbp_compile_chains", lambda: "\n".join([*lines, *times]))
    _compat.trace_artifact("hwbp_compile_joint_graph", lambda: str(graph))


def _describe_forward(fused: Fused) -> str:
    what = f"the forward pass of {fused.blocks} blocks"
    return f"{what} is left to the compiler: {fused.reason}" if fused.reason else f"{what} is one kernel"


def _describe(outcome: Outcome) -> str:
    found = outcome.found
    if not found.blocks:
        return f"left exact: {outcome.reason}"
    names = shorten(block_modules(found.blocks[::-1], Names()))
    plural = "s" * (len(found.blocks) != 1)
    chain = f"a chain of {len(found.blocks)} block{plural} ({names}; K: {found.residual or 'none'})"
    if outcome.is_swept:
        some = f" ({outcome.swept} of the blocks)" if outcome.swept < len(found.blocks) else ""
        return f"swept by one kernel{some}: {chain}, {len(outcome.new)} new nodes: {outcome.reason}"
    if outcome.schedule is None:
        kernel = f"; no kernel: {outcome.no_sweep}" if outcome.no_sweep else ""
        return f"left exact: {chain}: {outcome.reason}{kernel}"
    return f"rewritten: {chain}, {len(outcome.new)} new nodes"
