"""Train copies of one model side by side, each with another backward pass, and measure them.

All runs start from the same weights and see the same batches. They take turns every few steps, so that
whatever else the machine does slows all of them alike.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from data import Batch, Data
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

TURN = 5
"""Steps that a run takes before it is the next one's turn."""

CHECKS = 12
"""How often a run is validated and its gradient compared."""


@dataclass(frozen=True)
class Task:
    """A model to train: how to make it, on which data, for how long, up to which learning rate."""

    name: str
    title: str
    make_model: Callable[[], nn.Module]
    data: Data
    steps: int
    learning_rate: float
    over_time: bool = False
    """Whether the chain runs over time, not over depth."""


@dataclass(frozen=True)
class Backward:
    """A way to compute gradients: a name, and the arguments of ``torch.compile`` that select it."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Check:
    """A look at a run after so many steps."""

    step: int
    train_loss: float
    loss: float
    accuracy: float
    cosine: float
    """Between this run's gradient on a held-out batch and the exact one at the same weights."""
    parameter_cosine: float
    """The same for each parameter by itself, then the mean."""


@dataclass
class Run:
    """One copy of the model in training, and what was measured on it."""

    name: str
    model: nn.Module
    compiled: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    compile_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    backward_seconds: list[float] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def step(self, batch: Batch) -> None:
        """One step of training, timed."""
        inputs, targets = batch
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = loss_of(self.compiled(inputs), targets)
        before = time.perf_counter()
        loss.backward()
        after = time.perf_counter()
        self.optimizer.step()
        self.schedule.step()
        self.step_seconds.append(time.perf_counter() - start)
        self.backward_seconds.append(after - before)
        self.losses.append(loss.item())

    def gradients(self, batch: Batch, weights: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Its gradients on ``batch``, at its own weights or at given ones; leaves the run as it was."""
        inputs, targets = batch
        before = copy.deepcopy(self.model.state_dict())
        if weights is not None:
            self.model.load_state_dict(weights)
        self.optimizer.zero_grad()
        loss_of(self.compiled(inputs), targets).backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.zero_grad()
        self.model.load_state_dict(before)
        return gradients

    @property
    def step_ms(self) -> float:
        """The median time of a step."""
        return 1e3 * statistics.median(self.step_seconds)

    @property
    def backward_ms(self) -> float:
        """The median time of a step's backward pass."""
        return 1e3 * statistics.median(self.backward_seconds)


def train(task: Task, model: nn.Module, backwards: Sequence[Backward]) -> list[Run]:
    """Train one copy of ``model`` for each of ``backwards``, of which the first must be exact."""
    runs = []
    with _progress(len(backwards), f"{task.name}: compiling", "run") as bar:
        for each in backwards:
            bar.set_postfix_str(each.name)
            runs.append(_start(task, model, each))
            bar.update()
    check_all(task, runs)
    every = max(task.steps // CHECKS, 1)
    with _progress(task.steps * len(runs), f"{task.name}: training", "step") as bar:
        for first in range(0, task.steps, TURN):
            turn = range(first, min(first + TURN, task.steps))
            for run in runs:
                for step in turn:
                    run.step(task.data.train(step))
                bar.set_postfix_str(f"{run.name}: loss {run.losses[-1]:.3f}", refresh=False)
                bar.update(len(turn))
            if turn.start // every != turn.stop // every or turn.stop == task.steps:
                check_all(task, runs)
    return runs


def _start(task: Task, model: nn.Module, backward: Backward) -> Run:
    """Copy the model, and compile the copy by a first forward and backward pass."""
    mine = copy.deepcopy(model)
    compiled = torch.compile(mine, **backward.arguments)
    optimizer = torch.optim.AdamW(mine.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.learning_rate, total_steps=task.steps)
    run = Run(backward.name, mine, compiled, optimizer, schedule)
    start = time.perf_counter()
    run.gradients(task.data.train(0))
    run.compile_seconds = time.perf_counter() - start
    return run


def check_all(task: Task, runs: Sequence[Run]) -> None:
    """Validate each run and compare its gradient with the one that the first run's backward pass gives."""
    held_out = task.data.validation[0]
    for run in runs:
        mine = run.gradients(held_out)
        exact = runs[0].gradients(held_out, weights=run.model.state_dict())
        each = [cosine(a, b) for a, b in zip(mine, exact, strict=True) if b.any()]
        recent = run.losses[-20:]
        loss, accuracy = validate(run.model, task.data.validation)
        run.checks.append(
            Check(
                step=len(run.losses),
                train_loss=statistics.fmean(recent) if recent else float("nan"),
                loss=loss,
                accuracy=accuracy,
                cosine=cosine(_join(mine), _join(exact)),
                parameter_cosine=statistics.fmean(each),
            )
        )


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy, for logits of any number of dimensions."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two gradients, in double precision."""
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@torch.no_grad()
def validate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Loss and accuracy of the model as it is, not compiled, in evaluation mode."""
    model.eval()
    logits = torch.cat([model(inputs).flatten(0, -2) for inputs, _ in batches])
    targets = _join([targets for _, targets in batches])
    model.train()
    return float(loss_of(logits, targets)), float((logits.argmax(-1) == targets).double().mean())


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _progress(total: int, text: str, unit: str) -> tqdm[Any]:
    """A progress bar; where the output is no terminal, a line every now and then."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, desc=text, unit=unit, mininterval=interval, maxinterval=interval)
