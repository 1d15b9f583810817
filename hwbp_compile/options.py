"""The options of the backend: one dataclass, and the checks that turn a user's dictionary into it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from . import _compat
from .errors import OptionError

MOST = 31
"""The largest k that may be chosen: one more iteration is recorded beside it."""


def _option(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


class Choice(NamedTuple):
    """Which chains of a graph are iterated."""

    over_time: tuple[bool, ...]
    """In the order in which Dynamo's graph has them."""
    over_depth: tuple[bool, ...]
    """In the order of the backward pass."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of ``backend="highway"``. Each is checked when the object is made.

    Raises:
        OptionError: a value has a wrong type or is out of range.
    """

    iterations: int | Literal["exact", "auto"] = _option(
        "auto",
        'the paper\'s k: int >= 0, "exact" for no approximation, or "auto" to choose it while training',
    )
    gamma: float = _option(
        0.0, "share of the residual path counted as part of the block, in [0, 1]; 1 is fixed-point iteration"
    )
    group_size: int = _option(
        1,
        "so many consecutive blocks count as one, swept exactly; the group next to the input may be short; "
        "by default 8 over time",
    )
    exact_tail: int = _option(0, "so many blocks next to the input are swept exactly after the iteration")
    min_blocks: int = _option(4, "the shortest chain, or part of one, that is rewritten, in blocks")
    apply: Literal["auto", "always", "never"] = _option(
        "auto",
        '"auto" iterates only where that is expected to be faster than what is exact, such as one kernel; '
        '"always" rewrites what it can, "never" leaves all exact',
    )
    tolerance: float = _option(
        0.05, 'with iterations="auto": the relative change of the cotangents that one more iteration may make'
    )
    max_iterations: int = _option(8, 'with iterations="auto": the largest k; exact where it does not suffice')
    codegen: Literal["inductor", "eager"] = _option(
        "inductor", '"inductor" generates code, "eager" runs the rewritten graph op by op, for debugging'
    )

    watch: int = 0
    """With ``iterations="exact"``: so many iterations are made to record their steps only. No option."""
    records_blocks: bool = False
    """Whether iterations record each block's last step besides the means. No option."""
    chosen: Choice | None = None
    """With ``apply="auto"``: what is chosen for a range of sizes; None where the passes choose. No option."""
    given: frozenset[str] = frozenset()
    """The names of those that the user gave; no option itself."""

    def __post_init__(self) -> None:
        if self.iterations not in ("exact", "auto"):
            _check_int("iterations", self.iterations, 0, ', "exact" or "auto"')
        _check_int("max_iterations", self.max_iterations, 1)
        if self.max_iterations > MOST:
            raise OptionError(f"Option max_iterations must be at most {MOST}, but is {self.max_iterations}.")
        _check_number("tolerance", self.tolerance, 0.0, math.inf)
        _check_int("group_size", self.group_size, 1)
        _check_int("exact_tail", self.exact_tail, 0)
        _check_int("min_blocks", self.min_blocks, 1)
        _check_number("gamma", self.gamma, 0.0, 1.0)
        object.__setattr__(self, "gamma", float(self.gamma))
        _check_choice("apply", self.apply, ("auto", "always", "never"))
        _check_choice("codegen", self.codegen, ("inductor", "eager"))

    def to_dict(self) -> dict[str, Any]:
        """The options by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata}

    @property
    def is_iterated(self) -> bool:
        """Whether a backward pass with these options may hold an iteration."""
        return self.apply != "never" and (self.iterations != "exact" or self.watch > 0)

    @property
    def chooses(self) -> bool:
        """Whether it is still open which chains are iterated."""
        return self.is_iterated and self.apply == "auto" and self.chosen is None

    def exact(self) -> Options:
        """The options of an exact backward pass: the same, whatever its iterations would have been."""
        kept = {name: getattr(self, name) for name in ("codegen", "min_blocks", "records_blocks")}
        return Options(iterations="exact", given=frozenset({"iterations"}), **kept)

    def for_chain(self, chosen: Sequence[bool] | None, number: int) -> Options:
        """The options for one chain where some are chosen, by number; these where none are."""
        if chosen is None:
            return self
        is_iterated = number < len(chosen) and chosen[number]
        return replace(self, apply="always", chosen=None) if is_iterated else self.exact()

    def judged(self) -> Options:
        """The options by which it is chosen what these are used for.

        Nothing is to be seen of a chain that would stay exact with one iteration.
        """
        watched: dict[str, Any] = {"iterations": 1, "watch": 0} if self.watch else {}
        return replace(self, records_blocks=False, chosen=None, **watched)

    def shown(self) -> Options:
        """The options for looking at a graph: with "auto", which k it will be is not known yet."""
        if self.iterations != "auto":
            return self
        return replace(self, iterations=min(4, self.max_iterations), given=self.given | {"iterations"})

    def over_time(self) -> Options:
        """The options for chains over time, whose defaults are others.

        A sweep inside of groups takes no more arithmetic than one over single steps, and counts for several
        iterations where a cell is stiff.
        """
        return replace(self, **{k: v for k, v in _OVER_TIME.items() if k not in self.given})


_OVER_TIME: dict[str, Any] = {"group_size": 8}


def _check_int(name: str, value: Any, low: int, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise OptionError(f"Option {name} must be an integer >= {low}{alternative}, but is {value!r}.")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, (int, float))
    if wrong or not low <= value <= high:
        allowed = f"in [{low:g}, {high:g}]" if high < math.inf else f">= {low:g}"
        raise OptionError(f"Option {name} must be a number {allowed}, but is {value!r}.")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"Option {name} must be one of {', '.join(map(repr, allowed))}, but is {value!r}.")


def list_options() -> dict[str, dict[str, Any]]:
    """The options of the backend by name, each with its ``default`` and a one-line ``doc``.

    Any other option is taken for one of Inductor's; see ``torch._inductor.list_options()``.
    """
    return {f.name: {"default": f.default, "doc": f.metadata["doc"]} for f in fields(Options) if f.metadata}


def parse_options(
    options: Mapping[str, Any] | None, mode: str | None = None
) -> tuple[Options, dict[str, Any]]:
    """Split what was given to ``torch.compile`` into our options and a configuration of Inductor.

    Raises:
        OptionError: a name is unknown, or a value has a wrong type or is out of range.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a dictionary, but is of type {type(options).__name__}.")
    try:
        inductor = _compat.inductor_mode_options(mode)
    except ValueError as error:
        raise OptionError(str(error)) from None
    ours = set(list_options())
    known: dict[str, Any] | None = None
    mine: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if name in ours:
            mine[name] = value
            continue
        known = _compat.inductor_options() if known is None else known
        key = str(name).replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(str(name), [*ours, *known], n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"the options are {', '.join(sorted(ours))} and Inductor's."
            )
            raise OptionError(f"Option {name!r} is unknown; {hint}")
        present = known[key]
        if isinstance(present, (bool, int, float, str)) and not _same_type(value, present):
            raise OptionError(
                f"Option {name} (of Inductor) must be of type {type(present).__name__}, but is {value!r}."
            )
        inductor[key] = value
    return Options(**mine, given=frozenset(mine)), inductor


def _same_type(value: Any, present: Any) -> bool:
    if isinstance(present, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(present, bool)
    return isinstance(value, type(present)) or (isinstance(present, float) and isinstance(value, int))
