"""``fidelity``: how close a model's highway gradients are to the exact ones, for one k after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..control.settings import NAMES
from ..errors import ModelError, OptionError
from .closeness import Closeness, check_finite, closeness, mean_cosine, norm, with_direction
from .table import NOTHING, table
from .trial import LossFunction, trial


@dataclass(frozen=True, slots=True)
class FidelityRow:
    """All gradients after k iterations."""

    iterations: int
    overall: Closeness
    """Of all parameters as one vector."""
    mean_cosine: float
    """Over the parameters."""
    worst: str
    """The parameter with the smallest cosine."""
    parameters: dict[str, Closeness]
    """By name, but for those whose exact gradient is zero but for rounding."""
    contribution: float
    """The norm of what the gradient has gained since the row before, relative to it (paper, Figure 6)."""
    estimates: tuple[float, ...]
    """Per chain what the backward pass itself estimates; empty for k = 0."""


@dataclass(frozen=True)
class Fidelity:
    """The result of :func:`fidelity`."""

    rows: tuple[FidelityRow, ...]
    without_gradient: tuple[str, ...]
    """Parameters whose exact gradient is zero but for rounding."""
    splits: dict[str, Any]
    iterated: bool = True
    """Whether any chain of the model is; if not, all gradients are exact."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ["k", "cosine", "mean cosine", "rel. error", "contribution", "estimate", "worst parameter"]
        rows = [
            [
                str(r.iterations),
                f"{r.overall.cosine:.5f}",
                f"{r.mean_cosine:.5f}",
                f"{r.overall.relative_error:.2g}",
                f"{r.contribution:.2g}",
                f"{max(r.estimates):.2g}" if r.estimates else "-",
                f"{r.worst} ({r.parameters[r.worst].cosine:.4f})" if r.worst else "-",
            ]
            for r in self.rows
        ]
        text = table(head, rows, words=[len(head) - 1])
        if not self.iterated:
            text = f"{NOTHING}\n\n{text}"
        if not self.without_gradient:
            return text
        return f"{text}\nleft out, as their gradient is zero: {', '.join(self.without_gradient)}"

    def plot(self, path: str | Path) -> None:
        """Draw cosines, errors and contributions against k into a file (.png, .svg, .pdf).

        Raises:
            ImportError: matplotlib is not installed (``pip install hwbp-compile[draw]``).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Drawing needs matplotlib: pip install hwbp-compile[draw]") from error
        ks = [r.iterations for r in self.rows]
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(ks, [r.overall.cosine for r in self.rows], "o-", label="all parameters")
        left.plot(ks, [r.mean_cosine for r in self.rows], "s-", label="mean over parameters")
        left.set(xlabel="iterations k", ylabel="cosine to the exact gradient")
        left.legend()
        right.plot(ks, [r.overall.relative_error for r in self.rows], "o-", label="relative error")
        right.plot(ks, [r.contribution for r in self.rows], "s-", label="contribution of the iterations")
        estimated = [(r.iterations, max(r.estimates)) for r in self.rows if r.estimates]
        right.plot(*zip(*estimated, strict=True), "^--", label="estimate")
        right.set(xlabel="iterations k", yscale="log")
        right.legend()
        figure.savefig(path)


def fidelity(
    model: Any,
    loss_fn: LossFunction,
    batch: Any,
    iterations: Sequence[int] = (0, 1, 2, 3, 4, 6, 8),
    codegen: str = "eager",
    **splits: Any,
) -> Fidelity:
    """Compare a model's highway gradients with its exact ones, on one batch.

    The model is compiled op by op, once per k, whatever it is compiled with otherwise. With
    ``codegen="inductor"`` its highway gradients are those of generated code, as in training, and the exact
    ones those of torch's operators: as many iterations as blocks then check what is trained with. Afterwards
    its parameters, buffers and gradients, the batch and all random states are what they were before.

        print(hwbp_compile.fidelity(model, lambda model, batch: loss(model(batch[0]), batch[1]), batch))

    Args:
        model: a module, in training or evaluation mode, compiled with this backend or not at all.
        loss_fn: ``loss_fn(model, batch)`` calls the model and returns the loss, a scalar.
        batch: whatever ``loss_fn`` takes.
        iterations: values of k.
        codegen: ``"eager"`` or ``"inductor"``, as the option.
        **splits: ``gamma``, ``group_size`` and ``exact_tail``, as the options.

    Raises:
        OptionError: a setting is wrong.
        TypeError: ``model`` is no module.
        ModelError: ``model`` is compiled with another backend, ``loss_fn`` returns no scalar with a gradient
            or does not call the model, or the exact gradient is not finite.
        ValueError: there is no k.
    """
    if codegen not in ("eager", "inductor"):
        raise OptionError(f"codegen must be 'eager' or 'inductor', but is {codegen!r}.")
    for name in splits:
        if name not in NAMES[1:]:
            raise OptionError(f"Option {name!r} is unknown to fidelity; {', '.join(NAMES[1:])} are known.")
    if not iterations:
        raise ValueError("fidelity needs at least one k, such as iterations=[1, 2, 4].")
    for k in iterations:
        if isinstance(k, bool) or not isinstance(k, int):
            raise OptionError(f"fidelity compares integers k, but iterations holds {k!r}.")
    with trial(model, loss_fn, batch, "fidelity") as tried:
        exact, _ = tried.gradients(batch, {"iterations": "exact"})
        if not exact:
            raise ModelError("The loss reaches no parameter of the model.")
        check_finite(exact, "fidelity")
        live = with_direction(exact)
        rows: list[FidelityRow] = []
        before: dict[str, Tensor] = {}
        for k in sorted(set(iterations)):
            found, chains = tried.gradients(batch, {"iterations": k, **splits}, codegen)
            each = {n: closeness([found[n]], [exact[n]]) for n in live}
            change = [g - before[n] if before else g for n, g in found.items()]
            rows.append(
                FidelityRow(
                    k,
                    closeness([found[n] for n in exact], list(exact.values())),
                    mean_cosine(found, exact),
                    min(each, key=lambda n: _sortable(each[n].cosine), default=""),
                    each,
                    norm(change) / (norm(list(found.values())) or math.nan),
                    tuple(c.estimate for c in chains),
                )
            )
            before = found
    iterated = any(r.estimates for r in rows) or not any(r.iterations for r in rows)
    return Fidelity(tuple(rows), tuple(n for n in exact if n not in live), dict(splits), iterated)


def _sortable(cosine: float) -> float:
    """NaN, of a gradient that is zero or not finite, is worse than any."""
    return -math.inf if math.isnan(cosine) else cosine
