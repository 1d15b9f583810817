"""Where equal blocks may become one kernel of our own."""

from __future__ import annotations

from torch.fx import Graph

from ..blocks.limits import is_for_cpus
from ..options import Options


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
