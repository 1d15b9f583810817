"""``iterations="auto"``: k from what the iterations record, between steps.

Now and then a step is *watched*: its gradients are exact, and beside them so many iterations are made as are
allowed. They tell the change ``delta_j = step_(j+1)`` that one more iteration makes after j of them. The
smallest k whose delta is below the tolerance is used then, until the steps that are recorded with it say that
this has changed, or until the next watched step. Training starts with a watched step. It is exact where no k
is good enough, or none below half the number of blocks.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from ..options import Options

if TYPE_CHECKING:
    from .runs import ChainRecord, Entry

log = logging.getLogger(__name__)

FIRST_PERIOD = 10
"""Steps from the first watched one to the next; twice as many each time that nothing changes."""
LONGEST_PERIOD = 320
RECENT = 64
"""Steps that are looked at: their records may come late, or never."""
AT_ONCE, SELDOM = 4, 16
"""Where nothing comes, so many of the newest are looked at each time, and all of them every so many times."""
AWAITED = 2
"""Watched steps that are waited for, however many steps are begun before their backward passes."""
SUDDEN = 2.0
"""So many times the tolerance may be estimated between watched steps before one is made at once."""
LOWER = 0.7
"""The share of the tolerance below which a lower k is chosen."""


class AutoIterations:
    """Chooses the options of one step after the other.

    Args:
        options: with ``iterations="auto"``.
        begins: the number of its first step. What was recorded before was recorded with other options.
        warned: whether the user knows already that training is exact for now.
    """

    def __init__(self, options: Options, begins: int = 0, warned: bool = False) -> None:
        self._options = options
        self._tolerance = options.tolerance
        exact = replace(options, iterations="exact", given=options.given | {"iterations"})
        self.exact = exact
        """Those where nothing is iterated."""
        self.first = replace(exact, watch=options.max_iterations + 1)
        """Those of the first step, and of every step that is watched."""
        self._with: dict[int, Options] = {}
        self.iterations: int | None = None
        """k; None for exact."""
        self._ratios: list[float] = []
        """Per chain, how much smaller than the k-th step the next one was when it was watched."""
        self._period = FIRST_PERIOD
        self._until_watched = 0
        self._seen, self._looks = begins - 1, 0
        self._unread: deque[Entry] = deque(maxlen=RECENT)
        self._waiting, self._decided = False, False
        self._unheard = False
        """Whether no watched step has recorded anything, which may stay so."""
        self.warned = warned

    def take_in(self, history: Iterable[Entry]) -> None:
        """Judge what was recorded since the last time."""
        steps = tuple(history)  # other threads may begin more
        new = list(takewhile(lambda entry: entry.number > self._seen, reversed(steps)))
        if new:
            self._seen = new[0].number
            self._unread.extend(entry for entry in reversed(new) if entry.options.is_iterated)
        self._looks += 1
        if len(self._unread) == RECENT and self._looks % SELDOM:
            # Most likely nothing will be recorded any more, and to look costs some microseconds each.
            newest = islice(reversed(self._unread), AT_ONCE)
            if not any(entry.is_here for entry in newest):
                return
        for entry in list(self._unread):
            if entry.is_here and (chains := entry.chains()):
                # What a watched step recorded still counts when it comes after that of others.
                left = (
                    other
                    for other in self._unread
                    if other.number > entry.number or (other.options.watch and not entry.options.watch)
                )
                self._unread = deque(left, RECENT)
                self._take(entry, chains)

    def awaited(self) -> list[Entry]:
        """The first watched steps whose records have not come."""
        return list(islice((entry for entry in self._unread if entry.options.watch), AWAITED))

    def next_options(self, history: Iterable[Entry]) -> Options:
        """The options of the next step."""
        self.take_in(history)
        if not self._decided and not self._unheard and len(self._unread) == RECENT:
            self._unheard, self._period, self._until_watched = True, FIRST_PERIOD, FIRST_PERIOD
            self._warn_once(
                'iterations="auto" uses exact backpropagation for now, as nothing has come of the first %d '
                "steps: either they had no backward pass, or something such as save_on_cpu copies what is "
                "saved for it. Give iterations a number if that stays so.",
                RECENT,
            )
        if self._until_watched <= 0 or not (self._decided or self._unheard):
            if self._waiting:
                self._period = min(2 * self._period, LONGEST_PERIOD)
            self._until_watched, self._waiting = self._period, True
            return self.first
        self._until_watched -= 1
        return self._chosen()

    def _chosen(self) -> Options:
        k = self.iterations
        if k is None:
            return self.exact
        if k not in self._with:
            self._with[k] = replace(self._options, iterations=k, given=self.exact.given)
        return self._with[k]

    def _take(self, entry: Entry, chains: tuple[ChainRecord, ...]) -> None:
        if not all(c.is_finite for c in chains) or not any(c.is_moved for c in chains):
            # No gradient to be judged: a gradient scaler leaves the step out, or there is none.
            self._until_watched *= not entry.options.watch
            return
        if entry.options.watch:
            self._decide(chains)
        elif entry.options.iterations == self.iterations and self._is_suspect(chains):
            log.info("The iterations of step %d are watched, as their error has grown.", entry.number)
            self._until_watched = 0
            self._period = FIRST_PERIOD
            self.iterations = None

    def _decide(self, chains: tuple[ChainRecord, ...]) -> None:
        before, self._waiting, self._decided = self.iterations, False, True
        k = self._smallest(chains, self._tolerance)
        if k is not None and before is not None and k < before:
            # Not lower for a change that the next steps may undo.
            lower = self._smallest(chains, LOWER * self._tolerance)
            k = before if lower is None else min(lower, before)
        self._period = min(2 * self._period, LONGEST_PERIOD) if k == before else FIRST_PERIOD
        self._until_watched = self._period
        self.iterations = k
        if k is None:
            self._ratios = []
            self._warn(chains)
            return
        self._ratios = [
            min(1.0, c.steps[k] / c.steps[k - 1]) if len(c.steps) > k and c.steps[k - 1] else 1.0
            for c in chains
        ]
        if k != before:
            log.info("From now on %d iterations.", k)

    def _smallest(self, chains: tuple[ChainRecord, ...], tolerance: float) -> int | None:
        """The smallest k after which no more iteration moves any chain's cotangents by more than that."""
        needed = [_smallest(c, tolerance) for c in chains if c.is_moved]
        found = [k for k in needed if k is not None]
        return max(found) if found and len(found) == len(needed) else None

    def _is_suspect(self, chains: tuple[ChainRecord, ...]) -> bool:
        ratios = self._ratios if len(self._ratios) == len(chains) else [1.0] * len(chains)
        estimates = [c.steps[-1] * ratio for c, ratio in zip(chains, ratios, strict=True)]
        return any(not e <= SUDDEN * self._tolerance for e in estimates)

    def _warn_once(self, message: str, *args: object) -> None:
        if not self.warned:
            self.warned = True
            log.warning(message, *args)

    def _warn(self, chains: tuple[ChainRecord, ...]) -> None:
        worst = max(chains, key=lambda c: c.steps[-1] if math.isfinite(c.steps[-1]) else math.inf)
        late = [(k, c.blocks) for c in chains if (k := _settled(c, self._tolerance)) and 2 * k > c.blocks]
        if worst.steps[-1] <= self._tolerance and late:
            what = "it takes {} iterations of a chain of {} blocks or groups, more than half of them".format(
                *max(late)
            )
            advice = "Try another gamma or group_size"
        else:
            what = (
                f"iteration {worst.iterations} of a chain of {worst.blocks} blocks or groups still changes "
                f"the cotangents by {worst.steps[-1]:.2g}, and tolerance is {self._tolerance:.2g}"
            )
            advice = "Try gamma or group_size, or a larger max_iterations"
        self._warn_once(
            'iterations="auto" uses exact backpropagation for now: %s. %s; it will be looked at again.',
            what,
            advice,
        )


def _settled(chain: ChainRecord, tolerance: float) -> int | None:
    """The smallest k >= 1 after which no recorded step is larger."""
    found = None
    for k in range(len(chain.steps) - 1, 0, -1):
        if not chain.steps[k] <= tolerance:
            break
        found = k
    return found


def _smallest(chain: ChainRecord, tolerance: float) -> int | None:
    """The same, at most half of the blocks: beyond, exact backpropagation has no more to do."""
    if chain.blocks == 1:
        return 1  # which is exact
    found = _settled(chain, tolerance)
    return found if found is not None and 2 * found <= chain.blocks else None
