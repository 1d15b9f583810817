"""Log what the passes did: ``TORCH_LOGS="+hwbp_compile"``, and artifacts for tlparse."""

from __future__ import annotations

import logging

from torch.fx import Graph

from .. import _compat
from ..passes.pipeline import Record

log = logging.getLogger(__name__)


def log_record(record: Record, graph: Graph) -> None:
    """Write one line per chain, the time of each pass, and the graph as an artifact."""
    if not record.needs_gradient:
        log.debug("A graph without a backward half is left as it is.")
        return
    for outcome in record.outcomes:
        blocks, residual = len(outcome.found.blocks), outcome.found.residual
        if outcome.schedule is None:
            log.info("left exact: %d blocks (K: %s): %s", blocks, residual, outcome.reason)
        else:
            log.info("rewritten: a chain of %d blocks, K: %s, %d new nodes", blocks, residual, len(outcome.new))
    for name, seconds in record.seconds.items():
        log.debug("%s: %.3f s", name, seconds)
    _compat.trace_artifact("hwbp_compile_joint_graph", lambda: str(graph))
