"""A training step of ``nn.GRU`` or ``nn.LSTM``: eager torch against ``backend="highway"``, alternating.

The loss is a random linear function of all outputs, the weights are as initialised. Besides times, the table
has the smallest cosine between the exact and the highway gradient of any parameter.

    python benchmarks/recurrent.py --kind gru --threads 1 --repeats 15
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPES = [(2048, 4, 16, 64), (1024, 8, 3, 64), (256, 8, 64, 128), (1024, 128, 3, 64)]
"""(T, B, I, H)"""

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"iterations": "exact"},
    "k = 0": {"iterations": 0},
    "k = 1": {"iterations": 1},
    "k = 2": {"iterations": 2},
    "k = 5": {"iterations": 5},
    "groups of 8, k = 1": {"iterations": 1, "group_size": 8},
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
    parser.add_argument("--shape", type=int, nargs=4, metavar=("T", "B", "I", "H"), action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} of them used"
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, {where}, torch {torch.__version__}")
    for steps_, batch, inputs, hidden in arguments.shape or SHAPES:
        torch.manual_seed(0)
        torch._dynamo.reset()
        module = (nn.GRU if arguments.kind == "gru" else nn.LSTM)(inputs, hidden)
        module.to(arguments.device)
        x = torch.randn(steps_, batch, inputs, device=arguments.device)
        direction = torch.randn(steps_, batch, hidden, device=arguments.device)
        steps = {"torch, eager": Step(module, module, x, direction)}
        for name, options in SETTINGS.items():
            compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
            steps[name] = Step(module, compiled, x, direction)
        exact = [g.clone() for g in steps["torch, eager"]()]
        cosines = {}
        for name, step in steps.items():
            found = step()
            cosines[name] = min(
                float(F.cosine_similarity(f.flatten(), e.flatten(), 0))
                for f, e in zip(found, exact, strict=True)
            )
        times = measure(steps, arguments.repeats)
        print(f"\n{arguments.kind}, T = {steps_}, B = {batch}, I = {inputs}, H = {hidden}")
        for name, ms in times.items():
            print(f"  {name:20} {ms:9.2f} ms  {times['torch, eager'] / ms:5.2f}x  cosine {cosines[name]:.4f}")


if __name__ == "__main__":
    main()
