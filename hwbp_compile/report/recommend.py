"""``recommend``: the setting that comes close enough to the exact gradient with the least work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import OptionError
from .closeness import check_finite, mean_cosine
from .table import NOTHING, table
from .trial import LossFunction, Trial, trial

SPLITS: tuple[dict[str, Any], ...] = (
    {},
    {"gamma": 0.1},
    {"gamma": 0.2},
    {"gamma": 0.35},
    {"exact_tail": 2},
    {"exact_tail": 2, "gamma": 0.1},
    {"group_size": 2},
    {"group_size": 4},
    {"group_size": 8},
    {"group_size": 16},
    {"group_size": 4, "gamma": 0.2},
)
"""What is tried; an option that is not given is at its default over depth."""
_PLAIN = {"gamma": 0.0, "group_size": 1, "exact_tail": 0}


@dataclass(frozen=True, slots=True)
class Tried:
    """One way to split the residual path."""

    splits: dict[str, Any]
    cosines: dict[int, float]
    """By k, the mean over batches and parameters of the cosine to the exact gradient."""
    iterations: int | None
    """The smallest k that reaches the target; None if none does."""
    sweeps: float
    """What it then evaluates, in VJPs of all blocks: one per iteration, and what is swept after it."""
    blocks: int
    """Of the longest chain that is iterated."""
    sequential: float
    """VJPs that wait for each other: with groups as many per iteration as a group has blocks."""


@dataclass(frozen=True)
class Recommendation:
    """The result of :func:`recommend`."""

    options: dict[str, Any]
    """For ``torch.compile``."""
    tried: tuple[Tried, ...]
    """The best first."""
    target: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.tried:
            return f"{NOTHING}: options={self.options}"
        head = ["splits", "k", "cosine", "sweeps", "in sequence"]
        rows = []
        for t in self.tried:
            k = t.iterations if t.iterations is not None else max(t.cosines)
            found = t.iterations is not None
            rows.append(
                [
                    name_of(t.splits),
                    str(k) if found else f"> {k}",
                    f"{t.cosines[k]:.5f}",
                    f"{t.sweeps:.2g}" if found else "-",
                    f"{t.sequential:g}" if found else "-",
                ]
            )
        text = table(head, rows, words=[0])
        return f"{text}\n\nfor a cosine of {self.target:g}: options={self.options}"


def recommend(
    model: Any,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    target: float = 0.99,
    max_iterations: int = 8,
    splits: Sequence[dict[str, Any]] = SPLITS,
) -> Recommendation:
    """Try ways to split the residual path, each with growing k, and recommend one.

    That is the one whose gradients reach the target with the fewest sweeps: VJPs of all blocks. Of equal ones
    the one with fewer VJPs in sequence. What is fastest depends on the machine besides; with
    ``apply="auto"`` the backend will not iterate where that does not pay. The model is compiled op by op, for
    every split and k, and stays as it was.

    Args:
        model: a module, compiled with this backend or not at all; best one that is trained already, as
            models get harder while they train.
        loss_fn: ``loss_fn(model, batch)`` calls the model and returns the loss, a scalar.
        batches: a few of them.
        target: the mean cosine of the parameters' gradients to the exact ones.
        max_iterations: the largest k that is tried.
        splits: what to try, as options ``gamma``, ``group_size`` and ``exact_tail``.

    Returns:
        What was tried, and options: ``{"iterations": "exact"}`` if nothing reaches the target, or nothing is
        iterated in this model.

    Raises:
        OptionError: a split is wrong.
        TypeError: ``model`` is no module.
        ModelError: ``model`` is compiled with another backend, or ``loss_fn`` returns no scalar with a
            gradient or does not call the model, or an exact gradient is not finite.
        ValueError: ``target`` is not in (0, 1], or there is no batch or no split.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must be a cosine in (0, 1], but is {target!r}.")
    for split in splits:
        if wrong := split.keys() - _PLAIN.keys():
            raise OptionError(f"A split has {', '.join(_PLAIN)} only, but one has {min(wrong)!r}.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, but is {max_iterations!r}.")
    kept = list(batches)
    if not kept or not splits:
        raise ValueError("recommend needs at least one batch and one split.")
    with trial(model, loss_fn, kept, "recommend") as tried:
        exact = [tried.gradients(batch, {"iterations": "exact"})[0] for batch in kept]
        for gradients in exact:
            check_finite(gradients, "recommend")
        _, chains = tried.gradients(kept[0], _PLAIN | {"iterations": 1})
        if not chains:
            return Recommendation({"iterations": "exact"}, (), target)
        blocks = max(c.blocks for c in chains)
        found = [_try(tried, kept, exact, s, target, max_iterations, blocks) for s in splits]
    found.sort(key=lambda t: (t.iterations is None, t.sweeps, t.sequential, -max(t.cosines.values())))
    best = found[0]
    options: dict[str, Any] = {"iterations": "exact"}
    if best.iterations is not None:
        # Over time groups are the default, and were none where none is named.
        groups = {"group_size": 1} if any(c.over_time for c in chains) else {}
        options = {"iterations": best.iterations, **groups, **best.splits}
    return Recommendation(options, tuple(found), target)


def name_of(splits: dict[str, Any]) -> str:
    """A split in words."""
    return ", ".join(f"{name}={value}" for name, value in splits.items()) or "plain"


def sweeps_of(iterations: int, splits: dict[str, Any], blocks: int) -> float:
    """VJPs of all blocks that so many iterations evaluate, with what is swept exactly after them."""
    group, tail = splits.get("group_size", 1), min(splits.get("exact_tail", 0), blocks)
    return (iterations + (group - 1) / group) * (blocks - tail) / blocks + tail / blocks


def _try(
    tried: Trial,
    batches: Sequence[Any],
    exact: Sequence[dict[str, Tensor]],
    splits: dict[str, Any],
    target: float,
    max_iterations: int,
    blocks: int,
) -> Tried:
    cosines: dict[int, float] = {}
    for k in range(1, max_iterations + 1):
        each = []
        for batch, expected in zip(batches, exact, strict=True):
            gradients, chains = tried.gradients(batch, _PLAIN | splits | {"iterations": k})
            each.append(mean_cosine(gradients, expected))
        cosines[k] = sum(each) / len(each)
        if cosines[k] >= target:
            break
        if chains and all(k >= c.blocks for c in chains):
            break  # that was exact
    group, tail = splits.get("group_size", 1), splits.get("exact_tail", 0)
    reached = cosines[k] >= target
    return Tried(
        dict(splits),
        cosines,
        k if reached else None,
        sweeps_of(k, splits, blocks),
        blocks,
        k * group + group - 1 + tail,
    )
