"""The runs of the demo side by side in text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from training import Run

COLUMNS: dict[str, Callable[[Run, Run], str]] = {
    "": lambda run, exact: run.name,
    "train loss": lambda run, exact: f"{run.checks[-1].train_loss:.3f}",
    "val. loss": lambda run, exact: f"{run.checks[-1].loss:.3f}",
    "accuracy": lambda run, exact: f"{run.checks[-1].accuracy:.1%}",
    "cosine": lambda run, exact: f"{run.checks[-1].cosine:.4f}",
    "mean cosine": lambda run, exact: f"{run.checks[-1].parameter_cosine:.4f}",
    "backward": lambda run, exact: f"{run.backward_ms:.1f} ms ({run.backward_ms / exact.backward_ms:.2f}x)",
    "step": lambda run, exact: f"{run.step_ms:.1f} ms ({run.step_ms / exact.step_ms:.2f}x)",
    "compile": lambda run, exact: f"{run.compile_seconds:.0f} s",
}

LEGEND = """\
train loss: mean of the last 20 steps. accuracy: on validation data. cosine: between the gradient on a
held-out batch after training and the exact one at the same weights. mean cosine: the same for each parameter,
then the mean. backward, step: median times, and how many times the exact run's. compile: the first step, most
of which the next demo finds in a cache.

An iteration does the blocks' part of a backward pass, less the weights' gradients, for all blocks at once.
That is more arithmetic in fewer steps one after the other: it pays where a backward pass waits for many small
operations, not where a few cores are busy all the time."""


def table(runs: Sequence[Run]) -> str:
    """One line for each run, the first being the exact one, as a table in Markdown."""
    columns = [[title, *(show(run, runs[0]) for run in runs)] for title, show in COLUMNS.items()]
    widths = [max(map(len, column)) for column in columns]
    names, *numbers = ([cell.rjust(width) for cell in c] for c, width in zip(columns, widths, strict=True))
    names = [name.strip().ljust(widths[0]) for name in names]
    lines = [f"| {' | '.join(cells)} |" for cells in zip(names, *numbers, strict=True)]
    rule = "".join(f" {'-' * (width - 1)}: |" for width in widths[1:])
    return "\n".join([lines[0], f"| {'-' * widths[0]} |{rule}", *lines[1:]])


def verdict(runs: Sequence[Run]) -> str:
    """What the table says about speed, in words, the first run being the exact one."""
    exact, *others = runs
    ratios = {run.name: run.step_ms / exact.step_ms for run in others}
    groups = {
        "faster": [name for name, ratio in ratios.items() if ratio <= 0.95],
        "as fast (within 5 %)": [name for name, ratio in ratios.items() if 0.95 < ratio < 1.05],
        "slower": [name for name, ratio in ratios.items() if ratio >= 1.05],
    }
    found = "; ".join(f"{word}: {', '.join(names) or 'none'}" for word, names in groups.items())
    return f"A training step against the exact one, on this machine: {found}."
