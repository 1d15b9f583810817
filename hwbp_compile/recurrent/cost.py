"""What a recurrence costs on this machine, exact and iterated: the choice of ``apply="auto"``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from .. import _compat
from ..ranges import Sizes
from ..verdict import why_exact
from .backward import Settings
from .case import AS_TRACED, Case, case_of
from .measured import Exact, measure_kernels, measure_library
from .predicted import iteration_seconds

log = logging.getLogger(__name__)

_ENOUGH = 0.95
"""The share of the exact pass's time that an approximation may be expected to take at most."""


def why_exact_is_faster(
    inputs: Sequence[Tensor],
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    key: str,
    settings: Settings,
    sizes: Sizes = AS_TRACED,
) -> str:
    """Why the exact backward pass is chosen, for these tensors of all steps; empty if the iteration is.

    The forward passes are counted too: the library's and ours differ. Arguments as of :func:`case_of`.
    """
    case, steps = case_of(key, inputs, carry, weights, sizes)
    if not case.trains:
        return ""
    if case.empty:
        return "nothing to iterate over: the batch is empty"
    try:
        with _compat.outside_of_tracing():
            exact = fastest_exact(case, steps)
            if exact is None:
                return ""
            approximate = _iterated(case, settings, steps)
    except Exception as error:  # such as a lack of memory
        log.warning("A recurrence is left exact as its cost cannot be measured.", exc_info=True)
        return f"its cost cannot be measured ({type(error).__name__}: {error})"
    taken = exact.forward.at(steps) + exact.backward.at(steps)
    log.info(
        "%s, %s steps: exact %.2f ms (%s), iterated about %.2f ms",
        key, steps, taken * 1e3, exact.by, approximate * 1e3,
    )  # fmt: skip
    return why_exact(taken, approximate, _ENOUGH)


def kernels_are_faster(
    inputs: Sequence[Tensor], carry: Sequence[Tensor], weights: Sequence[Tensor], key: str, *, backward: bool
) -> bool:
    """Whether our kernels, which exist, take no longer than the library.

    Args:
        backward: whether they are to do exact backpropagation as well, not the forward pass only.
    """
    case, steps = case_of(key, inputs, carry, weights)
    if case.empty:
        return True
    try:
        with _compat.outside_of_tracing():
            if not backward:
                return case.device.type == "cpu" or _kernels_go_forward(case, steps)
            exact = fastest_exact(case, steps)
    except Exception:
        log.warning("A recurrent layer is run by our kernels as its cost cannot be measured.", exc_info=True)
        return True
    return exact is not None and exact.by == "kernels"


def _kernels_go_forward(case: Case, steps: int) -> bool:
    """Whether the forward pass of an iterated layer is our kernels'.

    On a CPU they are never slower than the library where only the backward pass is iterated, as they also
    return what the backward pass needs.
    """
    kernels = measure_kernels(case, steps)
    if kernels is None or case.device.type == "cpu":
        return kernels is not None
    library = measure_library(case, steps)
    return library is None or kernels.forward.at(steps) <= library.forward.at(steps)


def fastest_exact(case: Case, steps: int) -> Exact | None:
    """The faster of our kernels and the library for so many steps, measured; None if there is neither."""
    choices = [measure_kernels(case, steps), measure_library(case, steps)]
    found = [c for c in choices if c is not None]
    return min(found, key=lambda c: c.forward.at(steps) + c.backward.at(steps), default=None)


def _iterated(case: Case, settings: Settings, steps: int) -> float:
    """Seconds expected of an iterated training step."""
    by_kernels = _kernels_go_forward(case, steps)
    forward = (measure_kernels if by_kernels else measure_library)(case, steps)
    assert forward is not None
    return forward.forward.at(steps) + iteration_seconds(case, settings, steps, again=not by_kernels)
