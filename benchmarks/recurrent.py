"""A training step of ``nn.GRU`` or ``nn.LSTM``: eager torch against ``backend="highway"``, alternating.

The loss is a random linear function of all outputs, the weights are as initialised. Besides times, the
table has the smallest cosine between the exact and the highway gradient of any parameter, and on Linux by
how much a step raises the memory in use. ``--loops`` adds what a user has for a cell of his own: a loop in
Python, and torch's scan under Inductor.

    python benchmarks/recurrent.py --kind gru --threads 1 --repeats 15
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

SHAPES = [(2048, 4, 16, 64), (1024, 8, 3, 64), (256, 8, 64, 128), (1024, 128, 3, 64)]
"""(T, B, I, H)"""

SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "exact": {"iterations": "exact"},
    **{f"k = {k}": {"iterations": k, "group_size": 1, "apply": "always"} for k in (0, 1, 2, 5, 10)},
    "groups of 8, k = 1": {"iterations": 1, "group_size": 8, "apply": "always"},
    **{
        f"fixed point, k = {k}": {"iterations": k, "gamma": 1.0, "group_size": 1, "apply": "always"}
        for k in (1, 5, 10)
    },
}


class Step:
    """Forward and backward of a module; the gradients stay on the parameters."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], x: Tensor, direction: Tensor) -> None:
        self.module, self.forward, self.x, self.direction = module, forward, x, direction

    def __call__(self) -> list[Tensor]:
        """The gradients; all work is done when they are returned."""
        for p in self.module.parameters():
            p.grad = None
        (self.forward(self.x)[0] * self.direction).sum().backward()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return [p.grad for p in self.module.parameters() if p.grad is not None]


class Loop(nn.Module):
    """An ``nn.GRU`` as a user would write it, over time by ``over_time(step, initial state, inputs)``."""

    def __init__(self, gru: nn.GRU, over_time: Callable[..., Any]) -> None:
        super().__init__()
        self.weights, self.over_time = nn.ParameterList(gru.parameters()), over_time

    def forward(self, x: Tensor) -> tuple[Tensor]:
        w_x, w_h, b_x, b_h = self.weights

        def step(h: Tensor, of_x: Tensor) -> tuple[Tensor, Tensor]:
            of_h = F.linear(h, w_h, b_h)
            (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.chunk(3, -1), of_h.chunk(3, -1)
            z = torch.sigmoid(z_x + z_h)
            h = (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h
            return h, h.clone()

        return (self.over_time(step, x.new_zeros(x.shape[1], w_h.shape[1]), F.linear(x, w_x, b_x))[1],)


def in_python(step: Callable[..., Any], h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    states = []
    for each in inputs:
        h, _ = step(h, each)
        states.append(h)
    return h, torch.stack(states)


def memory_of(step: Callable[[], object]) -> float:
    """By how many megabytes a step raises the memory in use at most; nan where that cannot be told."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return (_status("VmHWM") - before) / 1e3
    except OSError:
        return math.nan


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


def measure(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one after the other in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) * 1e3 for name, each in times.items()}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kind", choices=["gru", "lstm"], default="gru")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32")
    parser.add_argument("--loops", action="store_true", help="also a loop in Python and torch's scan (GRU)")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("T", "B", "I", "H"), action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.precision == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    dtype = torch.bfloat16 if arguments.precision == "bfloat16" else torch.float32
    torch._dynamo.config.recompile_limit = 50  # one compiled version of the module per setting
    torch._dynamo.config.capture_scalar_outputs = True  # Inductor's scan needs it
    where = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} of them used"
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {where}, {arguments.precision}"
    print(f"{machine}, torch {torch.__version__}")
    for steps_, batch, inputs, hidden in arguments.shape or SHAPES:
        torch.manual_seed(0)
        torch._dynamo.reset()
        module = (nn.GRU if arguments.kind == "gru" else nn.LSTM)(inputs, hidden)
        module.to(arguments.device, dtype)
        x = torch.randn(steps_, batch, inputs, device=arguments.device, dtype=dtype)
        direction = torch.randn(steps_, batch, hidden, device=arguments.device, dtype=dtype)
        steps = {"torch, eager": Step(module, module, x, direction)}
        for name, options in SETTINGS.items():
            compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
            steps[name] = Step(module, compiled, x, direction)
        if arguments.loops and arguments.kind == "gru":
            loop, scanned = Loop(module, in_python), Loop(module, scan)
            steps["loop, eager"] = Step(module, loop, x, direction)
            under_inductor = torch.compile(scanned, backend="inductor", fullgraph=True)
            steps["scan, Inductor"] = Step(module, under_inductor, x, direction)
        exact = [g.clone() for g in steps["torch, eager"]()]
        cosines = {}
        for name, step in steps.items():
            found = step()
            cosines[name] = min(
                float(F.cosine_similarity(f.double().flatten(), e.double().flatten(), 0))
                for f, e in zip(found, exact, strict=True)
            )
        megabytes = {name: memory_of(step) for name, step in steps.items()}
        times = measure(steps, arguments.repeats)
        print(f"\n{arguments.kind}, T = {steps_}, B = {batch}, I = {inputs}, H = {hidden}")
        for name, ms in times.items():
            ratio = times["torch, eager"] / ms
            figures = f"{ms:9.2f} ms  {ratio:5.2f}x  cosine {cosines[name]:.4f}  {megabytes[name]:7.1f} MB"
            print(f"  {name:20} {figures}")


if __name__ == "__main__":
    main()
