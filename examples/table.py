"""The runs of the demo side by side in text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from training import Run

COLUMNS: dict[str, Callable[[Run], str]] = {
    "": lambda run: run.name,
    "train loss": lambda run: f"{run.checks[-1].train_loss:.3f}",
    "val. loss": lambda run: f"{run.checks[-1].loss:.3f}",
    "accuracy": lambda run: f"{run.checks[-1].accuracy:.1%}",
    "cosine": lambda run: f"{run.checks[-1].cosine:.4f}",
    "mean cosine": lambda run: f"{run.checks[-1].parameter_cosine:.4f}",
    "step": lambda run: f"{run.step_ms:.1f} ms",
    "backward": lambda run: f"{run.backward_ms:.1f} ms",
    "compile": lambda run: f"{run.compile_seconds:.0f} s",
}

LEGEND = """\
train loss: mean of the last 20 steps. accuracy: on validation data. cosine: between the gradient on a
held-out batch after training and the exact one at the same weights. mean cosine: the same for each parameter,
then the mean. step, backward: median times. compile: the first step, mostly cached for the next demo."""


def table(runs: Sequence[Run]) -> str:
    """One line for each run, as a table in Markdown."""
    columns = [[title, *map(show, runs)] for title, show in COLUMNS.items()]
    widths = [max(map(len, column)) for column in columns]
    names, *numbers = ([cell.rjust(width) for cell in c] for c, width in zip(columns, widths, strict=True))
    names = [name.strip().ljust(widths[0]) for name in names]
    lines = [f"| {' | '.join(cells)} |" for cells in zip(names, *numbers, strict=True)]
    rule = "".join(f" {'-' * (width - 1)}: |" for width in widths[1:])
    return "\n".join([lines[0], f"| {'-' * widths[0]} |{rule}", *lines[1:]])


def verdict(runs: Sequence[Run]) -> str:
    """What the table says about speed, in words, the first run being the exact one."""
    exact, *others = runs
    times = "; ".join(
        f"{run.name}: backward {_ratio(run.backward_ms, exact.backward_ms)}, "
        f"whole step {_ratio(run.step_ms, exact.step_ms)}"
        for run in others
    )
    return f"Time on this machine against exact backpropagation: {times}."


def _ratio(mine: float, exact: float) -> str:
    if 0.95 < mine / exact < 1.05:
        return "the same"
    return f"{exact / mine:.2f}x faster" if mine < exact else f"{mine / exact:.2f}x slower"
