"""Which chains the options leave exact, and which blocks of a chain are rewritten."""

from __future__ import annotations

import itertools
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
    return part_of(chain, 0, len(chain.blocks) - exact_tail)


def longest_run(chain: Chain) -> tuple[int, int]:
    """The longest run of consecutive blocks of one kind in a chain: its first block, and its end."""
    kinds = {i: kind for kind, each in enumerate(chain.classes) for i in each.members}
    runs = [list(run) for _, run in itertools.groupby(range(len(chain.blocks)), kinds.__getitem__)]
    longest = max(runs, key=len)
    return longest[0], longest[-1] + 1


def part_of(chain: Chain, start: int, end: int) -> Chain:
    """Some consecutive blocks of a chain; the graph sweeps the others as before, one by one."""
    if (start, end) == (0, len(chain.blocks)):
        return chain
    blocks = chain.blocks[start:end]
    return replace(chain, blocks=blocks, classes=classify(blocks))
