"""Draw the runs of the demo: loss, fidelity of the gradient, and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import LogLocator, NullFormatter
from training import Run

EXACT = "#222222"


def draw(results: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Write a row of three plots for each task in ``results`` (title to runs, the exact one first)."""
    figure, rows = plt.subplots(
        len(results), 3, figsize=(14, 4.2 * len(results)), squeeze=False, width_ratios=(5, 5, 4)
    )
    for axes, (title, runs) in zip(rows, results.items(), strict=True):
        colours = _colours(len(runs) - 1)
        _loss(axes[0], runs, colours)
        _fidelity(axes[1], runs, colours)
        _time(axes[2], runs, colours)
        axes[0].set_title(title, loc="left", fontweight="bold")
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(h_pad=2.5, w_pad=2.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _colours(highways: int) -> list[str]:
    """Black for the exact run, then from light to dark as the iterations grow."""
    scale = matplotlib.colormaps["plasma_r"]
    return [EXACT, *(to_hex(scale(0.2 + 0.6 * i / max(highways - 1, 1))) for i in range(highways))]


def _loss(axis: Axes, runs: Sequence[Run], colours: Sequence[str]) -> None:
    for i, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        # The exact run is dashed and on top, so that runs which match it stay visible.
        style, layer = ("--", 3) if i == 0 else ("-", 2)
        steps = [check.step for check in run.checks]
        losses = [check.loss for check in run.checks]
        axis.plot(steps, losses, style, color=colour, label=run.name, lw=2, zorder=layer)
    axis.set(xlabel="step", ylabel="validation loss", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)


def _fidelity(axis: Axes, runs: Sequence[Run], colours: Sequence[str]) -> None:
    for run, colour in list(zip(runs, colours, strict=True))[1:]:
        steps = [check.step for check in run.checks]
        cosines = [check.parameter_cosine for check in run.checks]
        axis.plot(steps, cosines, color=colour, label=run.name, lw=2, marker="o", ms=3.5)
    axis.axhline(1, color=EXACT, ls="--", lw=1)
    axis.set(xlabel="step", ylabel="cosine to the exact gradient\n(mean over parameters)")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)


def _time(axis: Axes, runs: Sequence[Run], colours: Sequence[str]) -> None:
    rows = range(len(runs))
    backward = [run.backward_ms for run in runs]
    rest = [run.step_ms - run.backward_ms for run in runs]
    axis.barh(rows, rest, color="#d0d0d0")
    axis.barh(rows, backward, left=rest, color=colours)
    for row, before, duration in zip(rows, rest, backward, strict=True):
        axis.text(before + duration, row, f" {duration:.1f}", va="center")
    axis.set_yticks(rows, [run.name for run in runs])
    axis.invert_yaxis()
    axis.set_xlim(right=1.15 * max(run.step_ms for run in runs))
    axis.set(xlabel="ms (median of a training step)")
    axis.set_title("backward, after the rest of the step in grey", fontsize="medium")
