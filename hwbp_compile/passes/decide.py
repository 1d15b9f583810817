"""Seventh pass: which of the chains found are rewritten."""

from __future__ import annotations

from dataclasses import replace

from ..chain import Chain
from ..options import Options
from .classes import classify


def reason_to_leave_exact(chain: Chain, options: Options) -> str | None:
    """Why a chain is not to be rewritten under these options, as one clause; None if it is to be."""
    blocks = len(chain.blocks)
    if options.apply == "never":
        return 'apply="never" leaves every chain exact'
    if options.iterations == "exact":
        return 'iterations="exact" leaves every chain exact'
    if blocks < options.min_blocks:
        return f"too short: {blocks} block{'s' * (blocks != 1)}, and min_blocks is {options.min_blocks}"
    if blocks - options.exact_tail < 1:
        return f"exact_tail={options.exact_tail} covers all of its {blocks} blocks"
    return None


def without_tail(chain: Chain, exact_tail: int) -> Chain:
    """The chain that is iterated on: the graph already sweeps the last blocks exactly, one by one."""
    if exact_tail == 0:
        return chain
    blocks = chain.blocks[: len(chain.blocks) - exact_tail]
    return replace(chain, blocks=blocks, classes=classify(blocks))
