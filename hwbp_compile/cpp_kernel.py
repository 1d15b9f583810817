"""Kernels in C++ of our own, which something slower takes the place of where there is no compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from . import _compat

Kernel = Callable[..., None]


def compiled_or_none(
    argument_types: Sequence[str], source: str, *, log: logging.Logger, purpose: str, instead: str
) -> Kernel | None:
    """See :func:`._compat.load_cpp_kernel`; None, with a warning, if it cannot be compiled.

    Args:
        argument_types: those of C++.
        source: defines a function ``kernel``.
        log: of the module that asks.
        purpose: what it computes.
        instead: what happens without it.
    """
    try:
        return _compat.load_cpp_kernel(argument_types, source)
    except Exception as error:  # a missing compiler shows itself in many ways
        first = (str(error).strip().splitlines() or ["no message"])[0]
        log.warning(
            "The C++ kernel of %s cannot be compiled, so %s (%s: %s).",
            purpose, instead, type(error).__name__, first,
        )  # fmt: skip
        return None
