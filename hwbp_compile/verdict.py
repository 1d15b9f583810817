"""What ``apply="auto"`` concludes from two expected times, and how it says so."""

from __future__ import annotations

_REMEDY = 'apply="always" iterates all the same'


def is_about_cost(reason: str) -> bool:
    """Whether a reason is one of :func:`why_exact`, so that another number of iterations may be worth it."""
    return reason.endswith(_REMEDY)


def why_exact(exact: float, iterated: float, most: float, where: str = "") -> str:
    """Why a chain stays exact; empty if it is worth iterating.

    Args:
        exact: seconds expected of exact backpropagation.
        iterated: seconds expected of the iteration.
        most: the share of the exact time that an iteration may be expected to take; what is gained beyond it
            is not sure.
        where: for which sizes, if not for all.
    """
    if iterated <= most * exact:
        return ""
    share = iterated / max(exact, 1e-9)
    return (
        f"the iteration is expected to take {share:.3g} times as long as exact backpropagation{where}, about "
        f"{iterated * 1e3:.3g} ms against {exact * 1e3:.3g} ms, and {most:g} is the most that is worth it; "
        + _REMEDY
    )
