"""Packed sequences: what is given one runs as it is, and is told about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)

REASON = (
    "what is given a packed sequence runs as it is, with its exact gradient; pad the sequences, and mask the "
    "loss, to have a recurrent module take part"
)

_seen: ContextVar[list[str] | None] = ContextVar("packed_sequences", default=None)


def saw_packed_sequence() -> None:
    """Dynamo came across one while it traced for this backend."""
    log.info("A packed sequence: %s", REASON)
    seen = _seen.get()
    if seen is not None:
        seen.append(REASON)


@contextmanager
def record_packed_sequences() -> Iterator[list[str]]:
    """Collect :data:`REASON`, once for each that is come across inside."""
    found: list[str] = []
    token = _seen.set(found)
    try:
        yield found
    finally:
        _seen.reset(token)
