"""Which chains of a graph with open sizes are iterated, chosen anew for each range of the sizes."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch.fx import GraphModule

from .. import _compat
from ..options import Choice, Options
from ..passes.pipeline import rewrite
from ..passes.worth import Comparison, verdicts
from ..ranges import OpenSizes, Range, named
from ..recurrent.capture import Layer, settle

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST = 3
"""Choices of one setting by which anything is iterated: each of them costs a compilation."""
_KEPT = 16
"""Settings of which comparisons are kept."""

Comparisons = tuple[Comparison | None, ...]
"""Of each chain over depth; None for one that stays exact whatever it costs."""


@dataclass(frozen=True)
class Findings:
    """What was found while a graph was compiled."""

    layers: Sequence[Layer]
    comparisons: Comparisons | None
    """None if the program came from a cache, so that no pass has run."""


class Choices:
    """What is expected to be faster, for any sizes of a graph that trains.

    A choice is made when the first sizes of a range come, and holds from then on. What has to be known of the
    graph is known from its first compilation; for other settings it is traced once more.

    Args:
        gm: the graph as Dynamo handed it over; it is left as it is.
        fake: the fake inputs that it was traced with.
        alone: held while anything is traced.
    """

    def __init__(self, gm: GraphModule, fake: Sequence[Any], alone: AbstractContextManager[Any]) -> None:
        self._gm, self._fake, self._alone = gm, fake, alone
        self.open_sizes = OpenSizes(fake)
        self._found: dict[tuple[Options, tuple[bool, ...]], Comparisons] = {}
        self._indifferent: set[Options] = set()
        self._over_time_only = False
        self._used: defaultdict[Options, list[Choice]] = defaultdict(list)
        self._said: Choice | None = None
        self.options_for = functools.lru_cache(maxsize=1024)(self._options_for)
        """What to compile a graph with, for options in force and a range of sizes."""
        self._judged = functools.lru_cache(maxsize=1024)(Options.judged)
        self._compared = functools.lru_cache(maxsize=_KEPT)(self._compare)

    def found(self, options: Options, findings: Findings) -> None:
        """Take in what was found while the graph was compiled for the sizes that were traced."""
        if options.chooses and findings.comparisons is not None:
            judged = self._judged(options)
            self._found[judged, _iterated(findings.layers)] = findings.comparisons
            self._note(judged, findings.layers, findings.comparisons)

    def matter(self, options: Options) -> bool:
        """Whether what is chosen may depend on the sizes."""
        return bool(self.open_sizes) and options.chooses and self._judged(options) not in self._indifferent

    def _options_for(self, options: Options, range: Range) -> Options:
        if not self.open_sizes or options.apply != "auto":
            return options
        if not options.is_iterated:
            return options.exact()
        try:
            with self._alone:
                choice = self._choice(self._judged(options), range)
        except Exception:  # a bug of ours must not stop a training
            log.warning("What is chosen for the first sizes holds for others too.", exc_info=True)
            return options
        return replace(options, chosen=choice) if _any(choice) else options.exact()

    def _choice(self, judged: Options, range: Range) -> Choice:
        sizes = self.open_sizes.ends_of(range)
        layers = self._later(lambda: settle(_compat.copy_dynamo_graph(self._gm), judged, sizes))
        comparisons = self._compared(judged, _iterated(layers))
        self._note(judged, layers, comparisons)
        there = [c and c.at(sizes) for c in comparisons]
        over_depth = tuple(bool(c) and not why for c, why in zip(there, verdicts(there), strict=True))

        def is_worth_it(choice: Choice) -> bool:
            chosen = [c if on else None for c, on in zip(there, choice.over_depth, strict=True)]
            return not any(verdicts(chosen))

        choice = self._within_limit(judged, Choice(_iterated(layers), over_depth), is_worth_it)
        if self._said not in (None, choice):
            chains = [*choice.over_time, *choice.over_depth]
            count = f"{sum(chains)} of {len(chains)}"
            log.info("For sizes up to %s, %s chains are iterated.", named(sizes), count)
        self._said = choice
        return choice

    def _within_limit(self, judged: Options, wanted: Choice, is_worth_it: Callable[[Choice], bool]) -> Choice:
        """A choice that was made before if there are many: one that iterates nothing that is not wanted."""
        used = self._used[judged]
        if not _any(wanted) or wanted in used:
            return wanted
        if len(used) < MOST:
            used.append(wanted)
            return wanted
        exact = Choice(*(tuple(False for _ in chains) for chains in wanted))
        fitting = [
            c for c in used if c.over_time == wanted.over_time and _within(c, wanted) and is_worth_it(c)
        ]
        return max(fitting, key=lambda c: sum(c.over_depth), default=exact)

    def _compare(self, judged: Options, over_time: tuple[bool, ...]) -> Comparisons:
        if (judged, over_time) in self._found:
            return self._found[judged, over_time]
        if self._over_time_only:
            return ()

        def compared() -> Comparisons:
            gm = _compat.copy_dynamo_graph(self._gm)
            settle(gm, replace(judged, chosen=Choice(over_time, ())))
            joints = _compat.capture_joint_graphs(gm, self._fake)
            return tuple(o.comparison for joint in joints for o in rewrite(joint.graph, judged).outcomes)

        log.info("A graph is traced to compare iterations=%s with exact backpropagation.", judged.iterations)
        return self._later(compared)

    def _later(self, trace: Callable[[], T]) -> T:
        return _compat.compile_later(trace, self._fake, None)[0]

    def _note(self, judged: Options, layers: Sequence[Layer], comparisons: Comparisons) -> None:
        if not any(layer.by_cost for layer in layers) and not any(c and c.is_open for c in comparisons):
            self._indifferent.add(judged)
        # What is done with recurrences makes no chain over depth, nor do any options.
        self._over_time_only |= not comparisons


def _iterated(layers: Sequence[Layer]) -> tuple[bool, ...]:
    return tuple(not layer.reason for layer in layers)


def _any(choice: Choice) -> bool:
    return any(choice.over_time) or any(choice.over_depth)


def _within(choice: Choice, other: Choice) -> bool:
    return all(b or not a for a, b in zip(choice.over_depth, other.over_depth, strict=True))
