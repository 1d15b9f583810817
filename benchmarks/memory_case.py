"""What memory.py measures: models over depth and over time, and steps of them in each setting."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from custom_cell import LayerNormGRU
from depth_case import ALL, Case
from depth_models import Row
from measuring import Step
from torch import nn

from hwbp_compile.control.auto import AutoIterations


@dataclass(frozen=True)
class Layer:
    """A recurrent layer: ``[steps, batch, inputs]`` to ``[steps, batch, hidden]``."""

    family: str
    steps: int
    batch: int
    inputs: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.family} T {self.steps} B {self.batch} I {self.inputs} H {self.hidden}"


ROWS: list[Row | Layer] = [
    Row("mlp", 32, 64, 4),
    Row("mlp", 16, 64, 256),
    Row("pre-norm", 6, 64, 1, 16),
    Row("pre-norm", 6, 128, 4, 64),
    Row("post-norm", 6, 64, 1, 16),
    Row("post-norm", 6, 128, 4, 64),
    Row("mixer", 8, 64, 1, 16),
    Row("mixer", 8, 128, 16, 16),
    Row("resnet", 32, 16, 1, 32),
    Row("resnet", 32, 16, 8, 32),
    Layer("gru", 1024, 8, 3, 64),
    Layer("gru", 1024, 128, 3, 64),
    Layer("lstm", 1024, 8, 3, 64),
    Layer("lstm", 1024, 128, 3, 64),
    Layer("custom cell", 512, 8, 16, 64),
    Layer("custom cell", 512, 64, 16, 64),
]
"""Of each family a row where single layers are small, and one where activations take more than weights."""

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "custom cell": LayerNormGRU,
}

WATCHED = "watched"
"""A step that is exact and beside which iterations are looked at, as some are where k is chosen."""
SETTINGS = [
    "inductor",
    "auto",
    "exact",
    WATCHED,
    "k = 1",
    "k = 2",
    "k = 4",
    "stacked, exact",
    "stacked, k = 2",
]
"""The first is what the others are compared with."""
_OPTIONS = {**ALL, WATCHED: {"iterations": "auto", "apply": "always"}}


def steps_of(row: Row | Layer, arguments: argparse.Namespace) -> tuple[Callable[[str], Step], int]:
    """What makes a step in a setting, compiled at its first call, and the bytes of the weights."""
    if isinstance(row, Row):
        case = Case(row, arguments)
        return (lambda name: case.step(name, optimizer=False, options=_OPTIONS[name])), case.weights
    torch._dynamo.config.capture_scalar_outputs = True  # Inductor's scan needs it
    torch.manual_seed(0)
    module = LAYERS[row.family](row.inputs, row.hidden).to(arguments.device)
    x = torch.randn(row.steps, row.batch, row.inputs, device=arguments.device)
    direction = torch.randn(row.steps, row.batch, row.hidden, device=arguments.device)

    def step(name: str) -> Step:
        options: dict[str, Any] | None = _OPTIONS[name]
        backend = "inductor" if options is None else "highway"
        compiled = torch.compile(module, backend=backend, options=options)
        return Step(module, compiled, x, direction)

    return step, sum(p.numel() * p.element_size() for p in module.parameters())


def settings_of(row: Row | Layer) -> list[str]:
    """Those that a row can have: recurrent layers have no parameters to stack."""
    return [name for name in SETTINGS if isinstance(row, Row) or not name.startswith("stacked")]


def watching(name: str) -> AbstractContextManager[object]:
    """In the setting of that name, has every step watched."""
    if name != WATCHED:
        return nullcontext()
    return mock.patch.object(AutoIterations, "next_options", lambda self, _: self.first)
