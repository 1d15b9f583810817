"""What the benchmarks share: training steps, timed in turns."""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwbp_compile.report.closeness import closeness, with_direction

_PATIENCE = 300
"""Seconds to wait for other processes, one of which may have failed."""


class Step:
    """Forward and backward pass of a module, under a loss that is a random linear function of its output.

    Args:
        module: whose parameters get gradients.
        forward: the module, compiled or not; of several results, the first counts.
        inputs: its arguments.
        direction: the coefficients of the loss, like the output.
        optimizer: steps after the backward pass, if there is one.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        inputs: Tensor | Sequence[Tensor],
        direction: Tensor,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.module, self.forward = module, forward
        self.inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self.direction, self.optimizer = direction, optimizer
        self.device = direction.device

    def __call__(self) -> list[Tensor]:
        """The gradients, which stay on the parameters; all work is done when they are returned."""
        self.parts()
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def parts(self) -> tuple[float, ...]:
        """Seconds of the forward pass, the backward pass, the optimizer, and all of them."""
        clock = [now(self.device) for _ in self.stages()]
        return *(b - a for a, b in pairwise(clock)), clock[-1] - clock[0]

    def stages(self) -> Iterator[None]:
        """Do a step; stops where it begins and after each of its parts."""
        for p in self.module.parameters():
            p.grad = None
        yield
        y = self.forward(*self.inputs)
        loss = ((y if isinstance(y, Tensor) else y[0]) * self.direction).sum()
        yield
        loss.backward()
        yield
        if self.optimizer is not None:
            self.optimizer.step()
        yield


class Replay:
    """A whole step in a CUDA graph, captured when this is made: one call of Python's launches all of it.

    The current stream must not be the default one, and all that the step did before was done on it. Graphs of
    one memory ``pool`` overwrite each other's results.
    """

    def __init__(self, step: Step, pool: Any = None) -> None:
        self.device, self._graph = step.device, torch.cuda.CUDAGraph()
        if step.optimizer is not None:
            for group in step.optimizer.param_groups:
                group["capturable"] = True
        with torch.cuda.graph(self._graph, pool, torch.cuda.current_stream()):
            for _ in step.stages():
                pass

    def __call__(self) -> None:
        """All work is done when this returns; the gradients are on the parameters."""
        self.parts()

    def parts(self) -> tuple[float, ...]:
        """Seconds of the step."""
        start = now(self.device)
        self._graph.replay()
        return (now(self.device) - start,)


def captured(steps: Mapping[str, Step]) -> dict[str, Replay]:
    """Those of the steps that can be captured in CUDA graphs; why others cannot is printed."""
    made = {}
    pool = torch.cuda.graph_pool_handle()  # none of them reads what another leaves
    for name, step in steps.items():
        try:
            made[name] = Replay(step, pool)
        except Exception as error:
            while error.__context__ is not None:  # what ended the capture, not that it could not be ended
                error = error.__context__
            print(f"  {name:14} not capturable: {str(error).partition(chr(10))[0]}", flush=True)
            pool = torch.cuda.graph_pool_handle()  # to the last one memory may still be given
    return made


def use_side_stream() -> None:
    """Have all work done on a stream that can be captured: what is must never have run on the default one."""
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())


@contextmanager
def alone(folder: Path | None, processes: int = 0) -> Iterator[None]:
    """One process at a time, of those with this folder, once so many of them have come here."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"ready-{os.getpid()}").touch()
    print(
        f"ready after {time.process_time():.0f} s of processor time: {sys.argv}", file=sys.stderr, flush=True
    )
    end = time.perf_counter() + _PATIENCE
    while sum(1 for _ in folder.glob("ready-*")) < processes and time.perf_counter() < end:
        time.sleep(0.1)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def now(device: torch.device) -> float:
    """The time, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(steps: Mapping[str, Step | Replay], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one after the other in turns."""
    return {name: parts[-1] for name, parts in measure_parts(steps, repeats).items()}


def measure_parts(steps: Mapping[str, Step | Replay], repeats: int) -> dict[str, tuple[float, ...]]:
    """Median milliseconds of the parts of each, one after the other in turns."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            found[name].append(step.parts())
    return {
        name: tuple(statistics.median(column) * 1e3 for column in zip(*rows, strict=True))
        for name, rows in found.items()
    }


def smallest_cosine(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The smallest cosine between two gradients of one parameter, of those that are more than rounding."""
    live = with_direction({str(i): e for i, e in enumerate(exact)})
    return min(closeness([found[int(i)]], [exact[int(i)]]).cosine for i in live)


def parser(doc: str | None, threads: int = 1, repeats: int = 7) -> argparse.ArgumentParser:
    """With the arguments that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--threads", type=int, default=threads)
    made.add_argument("--repeats", type=int, default=repeats)
    return made


def add_turns(made: argparse.ArgumentParser) -> None:
    """Arguments for several processes that compile at once and measure one after the other."""
    made.add_argument("--turns", type=Path, metavar="FOLDER", help="measure alone, of those with this folder")
    made.add_argument("--processes", type=int, default=0, help="begin when so many have compiled")


PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


def use_precision(name: str) -> torch.dtype:
    """Compute in one of :data:`PRECISIONS` from now on; the dtype of a model and its inputs."""
    if name == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    narrow = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return narrow.get(name, torch.float32)


FIRST_STEPS = 3
"""Until all programs are compiled: with k chosen, the first step is watched, and the second takes k."""


def compile_once() -> None:
    """What Inductor does once a process (imports, the precompiled header), before compilation is timed."""
    once = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    once(torch.randn(3, 4)).sum().backward()
    torch._dynamo.reset()


def set_limits(arguments: argparse.Namespace) -> None:
    """Use so many threads, and compile for as many settings as there are."""
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 50  # one compiled version of a module per setting


def set_up(arguments: argparse.Namespace) -> None:
    """Set the limits, and say where and with what the figures are made."""
    set_limits(arguments)
    cuda = arguments.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{arguments.threads} of them used"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {where}, torch {torch.__version__}", flush=True)
