"""The forward pass of residual MLPs: Inductor's against one kernel for all blocks, in turns.

Both are as in training, so that what is kept for the backward pass is part of them. Beside them is the kernel
alone, without what calls it, and what there is to do: operations, and bytes of weights.

    OMP_NUM_THREADS=2 python benchmarks/forward.py --threads 2 --repeats 150
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from typing import Any
from unittest import mock

import torch
from depth_models import Row, residual_mlp
from measuring import parser
from torch import Tensor, nn

from hwbp_compile.forward import fuse
from hwbp_compile.forward.kernel_cpp import BlocksKernel


def timed_kernel(kernel: Any, seconds: list[float]) -> Any:
    """The same function, which tells how long it took."""

    def run(*arguments: Any) -> None:
        start = time.perf_counter()
        kernel(*arguments)
        seconds.append(time.perf_counter() - start)

    return run


def measure(row: Row, repeats: int) -> tuple[float, float, float]:
    """Median milliseconds of Inductor's forward pass, of ours, and of the kernel in it (or nan)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = residual_mlp(row)
    options = {"iterations": 2, "apply": "always"}
    theirs = torch.compile(copy.deepcopy(model), dynamic=False)
    ours = torch.compile(copy.deepcopy(model), backend="highway", options=options, dynamic=False)
    inside: list[float] = []
    original = BlocksKernel.__call__

    def call(self: BlocksKernel, *arguments: Any) -> None:
        with mock.patch.object(self, "_run", timed_kernel(self._run, inside)):
            original(self, *arguments)

    with mock.patch.object(BlocksKernel, "__call__", call):
        found = in_turns([theirs, ours], x, repeats)
    kernel = statistics.median(inside[-repeats:]) * 1e3 if inside else float("nan")
    return found[0], found[1], kernel


def in_turns(models: list[nn.Module], x: Tensor, repeats: int) -> list[float]:
    """Median milliseconds of each."""
    seconds: list[list[float]] = [[] for _ in models]
    for i in range(repeats + 3):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(x)
            if i >= 3:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) * 1e3 for times in seconds]


def main() -> None:
    """Measure a grid of widths and batches."""
    made: argparse.ArgumentParser = parser(__doc__, threads=2, repeats=150)
    made.add_argument("--depth", type=int, default=32)
    made.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256])
    made.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 32])
    made.add_argument("--any", action="store_true", help="also where the kernel is not expected to be faster")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.any:
        fuse.MOST_ROWS = fuse.MOST_BYTES_ALONE = 1 << 40
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} used, torch {torch.__version__}"
    )
    for width in arguments.widths:
        for batch in arguments.batches:
            row = Row("mlp", arguments.depth, width, batch)
            theirs, ours, kernel = measure(row, arguments.repeats)
            weights = arguments.depth * 4 * width * width
            print(
                f"{row}: inductor {theirs:.3f} ms, ours {ours:.3f} ({theirs / ours:.2f}x), of which kernel "
                f"{kernel:.3f}; {2 * weights * batch / 1e6:.1f} MFLOP, {4 * weights / 1e6:.1f} MB of weights",
                flush=True,
            )


if __name__ == "__main__":
    main()
