"""A training step of a cell of one's own: a loop in eager torch, torch's ``scan``, and ``backend="highway"``.

The cell is a GRU whose projections are normalised. ``scan`` is compiled with Inductor, or by this backend;
the loop is what ``scan`` means. The loss is a random linear function of all states, the weights are as
initialised.

    OMP_NUM_THREADS=1 python benchmarks/custom_cell.py --threads 1 --repeats 7
"""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from recurrent import SETTINGS, measure
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan


class LayerNormGRU(nn.Module):
    """``[T, B, I]`` to all states ``[T, B, H]``, from a learned initial one."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.of_input = nn.Linear(inputs, 3 * hidden)
        self.of_state = nn.Linear(hidden, 3 * hidden, bias=False)
        self.norm_input, self.norm_state = nn.LayerNorm(3 * hidden), nn.LayerNorm(3 * hidden)
        self.initial = nn.Parameter(torch.zeros(1, hidden))

    def step(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, twice."""
        reset_x, update_x, new_x = self.norm_input(self.of_input(x)).chunk(3, -1)
        reset_h, update_h, new_h = self.norm_state(self.of_state(h)).chunk(3, -1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        h = (1 - update) * torch.tanh(new_x + reset * new_h) + update * h
        return h, h.clone()

    def forward(self, x: Tensor) -> Tensor:
        """By ``scan``."""
        found: Tensor = scan(self.step, self.initial.expand(x.shape[1], -1).clone(), x)[1]
        return found

    def loop(self, x: Tensor) -> Tensor:
        """The same, step by step."""
        h, states = self.initial.expand(x.shape[1], -1).clone(), []
        for x_t in x:
            h, y = self.step(h, x_t)
            states.append(y)
        return torch.stack(states)


class Step:
    """Forward and backward; the gradients stay on the parameters."""

    def __init__(self, module: nn.Module, forward: Any, x: Tensor, direction: Tensor, **config: bool) -> None:
        self.module, self.forward, self.x, self.direction, self.config = module, forward, x, direction, config

    def __call__(self) -> list[Tensor]:
        """The gradients; all work is done when they are returned."""
        for p in self.module.parameters():
            p.grad = None
        with torch._dynamo.config.patch(**self.config):
            (self.forward(self.x) * self.direction).sum().backward()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return [p.grad.clone() for p in self.module.parameters() if p.grad is not None]


def main() -> None:
    """Print one table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shape", type=int, nargs=4, metavar=("T", "B", "I", "H"), default=(1024, 8, 16, 64))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    length, batch, inputs, hidden = arguments.shape
    module = LayerNormGRU(inputs, hidden).to(arguments.device)
    x = torch.randn(length, batch, inputs, device=arguments.device)
    direction = torch.randn(length, batch, hidden, device=arguments.device)
    # Inductor compiles a scan only with this setting; with it, it must stay, or the scan is compiled again.
    inductor = torch.compile(module, backend="inductor")
    steps = {
        "loop, eager": Step(module, module.loop, x, direction),
        "scan, Inductor": Step(module, inductor, x, direction, capture_scalar_outputs=True),
    }
    for name, options in SETTINGS.items():
        compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
        steps[name] = Step(module, compiled, x, direction)
    exact = steps["loop, eager"]()
    cosines = {}
    for name, step in steps.items():
        step()
        pairs = zip(step(), exact, strict=True)
        cosines[name] = min(float(F.cosine_similarity(f.flatten(), e.flatten(), 0)) for f, e in pairs)
    times = measure(steps, arguments.repeats)
    where = torch.cuda.get_device_name() if x.is_cuda else f"{arguments.threads} of them used"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {where}, torch {torch.__version__}")
    print(f"LayerNorm-GRU, T = {length}, B = {batch}, I = {inputs}, H = {hidden}")
    for name, ms in times.items():
        against = [f"{times[peer] / ms:6.2f}x" for peer in ("loop, eager", "scan, Inductor")]
        print(f"  {name:20} {ms:9.2f} ms  {'  '.join(against)}  cosine {cosines[name]:.4f}")


if __name__ == "__main__":
    main()
