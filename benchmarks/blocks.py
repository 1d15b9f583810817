"""Exact training passes of residual MLPs: Inductor's against one kernel for all blocks, in turns.

Forward and backward pass each. Beside them is the kernel alone, without what calls it, what there is to
do, operations and bytes of weights, and what any backward pass takes in which autograd is given as many
gradients by one function: nothing is computed in it.

    OMP_NUM_THREADS=2 python benchmarks/blocks.py --threads 2 --repeats 150
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections import Counter
from typing import Any
from unittest import mock

import torch
from depth_models import Row, residual_mlp
from measuring import parser
from torch import Tensor, nn

from hwbp_compile import stack_parameters
from hwbp_compile.blocks import limits
from hwbp_compile.blocks.kernel_cpp import BlocksKernel

EXACT = {"iterations": "exact"}


def timed_kernel(kernel: Any, seconds: list[float]) -> Any:
    """The same function, which tells how long it took."""

    def run(*arguments: Any) -> None:
        start = time.perf_counter()
        kernel(*arguments)
        seconds.append(time.perf_counter() - start)

    return run


class _Nothing(torch.autograd.Function):
    """Gives each parameter a gradient that nothing is computed for: a row of a tensor for all of a shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [p.shape for p in parameters]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        stacks = {s: torch.empty(n, *s).unbind() for s, n in Counter(ctx.shapes).items()}
        rows = {shape: iter(stack) for shape, stack in stacks.items()}
        return None, *(next(rows[shape]) for shape in ctx.shapes)


class AutogradAlone(nn.Module):
    """A model of the same parameters, in which nothing is computed.

    A compiled graph is one function for autograd, too, so that its backward pass takes this time and more.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return _Nothing.apply(x, *self.model.parameters())  # type: ignore[no-any-return]


def measure(row: Row, stacked: bool, repeats: int) -> tuple[list[list[float]], list[float]]:
    """Median milliseconds of forward and backward pass, Inductor's, ours, and of autograd alone.

    Beside them, of ours those of the kernels.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = residual_mlp(row)
    if stacked:
        stack_parameters(model)
    theirs = torch.compile(copy.deepcopy(model), dynamic=False)
    ours = torch.compile(copy.deepcopy(model), backend="highway", options=EXACT, dynamic=False)
    inside: list[float] = []
    original = BlocksKernel.__call__

    def call(self: BlocksKernel, *arguments: Any) -> None:
        with mock.patch.object(self, "_run", timed_kernel(self._run, inside)):
            original(self, *arguments)

    with mock.patch.object(BlocksKernel, "__call__", call):
        found = in_turns([theirs, ours, AutogradAlone(copy.deepcopy(model))], x, repeats)
    kernels = [statistics.median(inside[i - 2 * repeats :: 2]) * 1e3 for i in (0, 1)] if inside else []
    return found, kernels


def in_turns(models: list[nn.Module], x: Tensor, repeats: int) -> list[list[float]]:
    """Median milliseconds of the forward and the backward pass of each."""
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    for i in range(repeats + 3):
        for model, times in zip(models, seconds, strict=True):
            model.zero_grad()
            start = time.perf_counter()
            y = model(x)
            middle = time.perf_counter()
            y.backward(torch.ones_like(y))
            if i >= 3:
                times.append((middle - start, time.perf_counter() - middle))
    return [[statistics.median(each) * 1e3 for each in zip(*times, strict=True)] for times in seconds]


def main() -> None:
    """Measure a grid of widths and batches."""
    made: argparse.ArgumentParser = parser(__doc__, threads=2, repeats=150)
    made.add_argument("--depth", type=int, default=32)
    made.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256])
    made.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 32])
    made.add_argument("--stacked", action="store_true", help="with stacked parameters")
    made.add_argument("--any", action="store_true", help="also where the kernel is not expected to be faster")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.any:
        limits.MOST_ROWS = limits.MOST_BYTES = 1 << 40
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} used, torch {torch.__version__}"
    )
    for width in arguments.widths:
        for batch in arguments.batches:
            row = Row("mlp", arguments.depth, width, batch)
            (theirs, ours, alone), kernels = measure(row, arguments.stacked, arguments.repeats)
            weights = arguments.depth * 4 * width * width
            said = []
            for i, name in enumerate(("forward", "backward")):
                said.append(f"{name} {theirs[i]:.3f} ms, ours {ours[i]:.3f} ({theirs[i] / ours[i]:.2f}x)")
                said[-1] += f", of which kernel {kernels[i]:.3f}" if kernels else ""
            print(
                f"{row}: {'; '.join(said)}; both {sum(theirs) / sum(ours):.2f}x; "
                f"backward of autograd alone {alone[1]:.3f}; "
                f"{2 * weights * batch / 1e6:.1f} MFLOP forward, {4 * weights / 1e6:.1f} MB of weights",
                flush=True,
            )


if __name__ == "__main__":
    main()
