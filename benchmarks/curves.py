"""Validation loss against wall time: each of the paper's models, small, trained exactly and iterated.

The same training run under ``backend="inductor"`` and settings of ``backend="highway"``, step by step in
turns in one process, from one seed. Validation is not counted, and a step in which something was compiled
counts as the median step. Prints a table, and keeps the curves for figures.py.

    OMP_NUM_THREADS=1 python benchmarks/curves.py --threads 1 --save curves.jsonl
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from json_lines import add_line
from paper import loss_of, validate
from paper_tasks import PaperTask, tasks
from torch import nn

from hwbp_compile.report.table import table

EXACT = "inductor"
SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "k = 2": {"iterations": 2, "apply": "always"},
}
POINTS = 12
"""Of each curve."""
OUTLIER = 10
"""A step that takes so many times the median step has compiled something."""


@dataclass
class Curve:
    """One training run."""

    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of the validation data, after so many steps."""

    def clock(self) -> list[float]:
        """Seconds at each point of the curve."""
        median = statistics.median(self.seconds)
        counted = [median if s > OUTLIER * median else s for s in self.seconds]
        total = [0.0, *itertools.accumulate(counted)]
        return [total[n] for n in self.steps]


class Run:
    """A model in training."""

    def __init__(self, task: PaperTask, model: nn.Module, backend: str, options: dict[str, Any]) -> None:
        self.task, self.model, self.curve = task, model, Curve()
        self.compiled = torch.compile(model, backend=backend, options=options or None)
        self.optimizer, self.schedule = task.optimizer(model)

    def step(self, number: int) -> None:
        """Train on one batch."""
        batch = self.task.data.train(number)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss_of(self.compiled, batch).backward()
        self.optimizer.step()
        self.curve.seconds.append(time.perf_counter() - start)
        self.schedule.step()

    def look(self, number: int) -> None:
        """Add a point to the curve."""
        self.curve.steps.append(number)
        self.curve.losses.append(validate(self.model, self.task.data)[0])


def curves_of(task: PaperTask) -> dict[str, Curve]:
    """Train one model under each setting."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = task.make(task.data)
    runs = {EXACT: Run(task, copy.deepcopy(model), EXACT, {})}
    for name, options in SETTINGS.items():
        runs[name] = Run(task, copy.deepcopy(model), "highway", options)
    every = max(task.steps // POINTS, 1)
    for number in range(task.steps):
        for run in runs.values():
            if number % every == 0:
                run.look(number)
            run.step(number)
    for run in runs.values():
        run.look(task.steps)
    return {name: run.curve for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = tasks()
    parser.add_argument("--only", choices=list(known), action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, metavar="FILE", help="append the curves as JSON, a line a model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only or known:
        curves = curves_of(known[name]())
        show(name, curves)
        if arguments.save:
            kept = {setting: [curve.clock(), curve.losses] for setting, curve in curves.items()}
            add_line(arguments.save, {"model": name, "curves": kept})


def show(name: str, curves: dict[str, Curve]) -> None:
    """Median steps and where the curves end."""
    exact = statistics.median(curves[EXACT].seconds)
    rows = []
    for setting, curve in curves.items():
        step = statistics.median(curve.seconds)
        rows.append(
            [
                setting,
                f"{1e3 * step:.2f}",
                f"{exact / step:.2f}x",
                f"{curve.clock()[-1]:.1f}",
                f"{curve.losses[-1]:.4f}",
            ]
        )
    print(f"\n{name}", flush=True)
    print(
        table(["", "ms a step", "against exact", "seconds in all", "validation loss"], rows, words=[0]),
        flush=True,
    )


if __name__ == "__main__":
    main()
