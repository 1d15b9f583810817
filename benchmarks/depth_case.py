"""What depth.py measures: rows and settings, models ready to be compiled, and folders for compiled code."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from depth_models import FAMILIES, Row
from measuring import FIRST_STEPS, Replay, Step, use_precision
from torch import Tensor
from torch._inductor.utils import clear_caches
from torch.utils.flop_counter import FlopCounterMode

import hwbp_compile

GRIDS = {
    "cpu": [
        Row("mlp", 32, 64, 4),
        Row("mlp", 64, 64, 1),
        Row("mlp", 32, 128, 8),
        Row("mlp", 32, 256, 4),
        Row("pre-norm", 12, 64, 1, 16),
        Row("pre-norm", 24, 64, 1, 16),
        Row("pre-norm", 12, 128, 4, 64),
        Row("post-norm", 12, 64, 1, 16),
        Row("post-norm", 12, 128, 4, 64),
        Row("mixer", 12, 64, 1, 16),
        Row("mixer", 24, 128, 4, 16),
        Row("resnet", 110, 16, 1, 32),
    ],
    "cuda": [
        Row("mlp", 48, 256, 8),
        Row("pre-norm", 24, 256, 1, 64),
        Row("mlp", 96, 256, 8),
        Row("pre-norm", 24, 512, 8, 128),
        Row("resnet", 110, 16, 8, 32),
        Row("mixer", 24, 256, 1, 64),
        Row("post-norm", 24, 256, 1, 64),
        Row("mlp", 48, 512, 8),
        Row("pre-norm", 48, 256, 1, 64),
        Row("mlp", 96, 256, 1),
        Row("mlp", 96, 256, 32),
        Row("pre-norm", 12, 256, 1, 64),
        Row("pre-norm", 12, 512, 8, 128),
        Row("mlp", 48, 256, 1),
        Row("mlp", 48, 256, 32),
        Row("mlp", 96, 512, 8),
        Row("pre-norm", 48, 512, 8, 128),
    ],
}
"""By device; what tells most comes first, as time may be limited."""
K = "k = 2"
"""The setting of which the products in sequence are told."""
ITERATED: dict[str, dict[str, Any]] = {f"k = {k}": {"iterations": k, "apply": "always"} for k in (0, 1, 2, 4)}
SETTINGS = ITERATED | {"auto": {}}
STACKED = {
    f"stacked, {name}": options for name, options in ({"exact": {"apply": "never"}} | SETTINGS).items()
}
"""With parameters in stacks; exact is Inductor's, apart from the gradients of rows."""
ALL = {"inductor": None, "exact": {"iterations": "exact"}, **SETTINGS, **STACKED}
CHOSEN = {
    "cpu": ["inductor", *SETTINGS, *STACKED],
    "cuda": ["inductor", K, "stacked, exact", f"stacked, {K}"],
}
"""By device."""


class Case:
    """A model of the grid, with an input and a loss's direction.

    Random numbers are a CPU's on all devices.
    """

    def __init__(self, row: Row, arguments: argparse.Namespace) -> None:
        to = {"device": arguments.device, "dtype": use_precision(arguments.precision)}
        torch.manual_seed(0)
        model, x = FAMILIES[row.family](row)
        self.model, self.x = model.to(**to), x.to(**to)
        with FlopCounterMode(display=False) as counter:
            y = self.model(self.x)
            self.direction = torch.randn(y.shape).to(**to)
            (y * self.direction).sum().backward()
        self.flops = counter.get_total_flops()
        self.weights = sum(p.numel() * p.element_size() for p in self.model.parameters())

    def step(self, name: str, optimizer: bool = True, options: dict[str, Any] | None = None) -> Step:
        """Of a copy, compiled with a setting at its first call; those of another one are in ``options``."""
        module = copy.deepcopy(self.model)
        if name in STACKED:
            hwbp_compile.stack_parameters(module)
        adam = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True) if optimizer else None
        backend = "inductor" if name == "inductor" else "highway"
        compiled = torch.compile(module, backend=backend, options=options or ALL[name], dynamic=False)
        return Step(module, compiled, self.x, self.direction, adam)

    def gradients(self, step: Step, do: Step | Replay) -> list[Tensor]:
        """Of the weights that the model began with, by the names that they have without stacks."""
        step.module.load_state_dict(self.model.state_dict())
        do()
        plain = copy.deepcopy(step.module)
        for own, p in zip(plain.parameters(), step.module.parameters(), strict=True):
            own.grad = p.grad
        hwbp_compile.unstack_parameters(plain)
        return [p.grad.clone() for _, p in sorted(plain.named_parameters()) if p.grad is not None]

    def products(self) -> list[int]:
        """In sequence in a backward pass, exact and iterated."""
        (graph,) = hwbp_compile.explain(self.model, self.x, options=ITERATED[K]).graphs
        return [graph.depth_before, graph.depth_after]


@contextlib.contextmanager
def caches_in(folder: str | Path) -> Iterator[None]:
    """Keep compiled code in a folder, and what was read from another out of use."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
    clear_caches()
    with mock.patch.dict(os.environ, folders):
        yield


def compile_seconds(step: Step, folder: str | Path) -> float:
    """Of the first steps, with caches in a folder that no other setting has."""
    with caches_in(folder):
        start = time.perf_counter()
        for _ in range(FIRST_STEPS):
            step()
        return time.perf_counter() - start
