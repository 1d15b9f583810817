"""A training step of ``nn.GRU`` or ``nn.LSTM``: eager torch against ``backend="highway"``, alternating.

The loss is a random linear function of all outputs, the weights are as initialised. Besides times, the
table has the smallest cosine between the exact and the highway gradient of any parameter, and the most memory
that a step allocates. ``--loops`` adds what a user has for a cell of his own: a loop in Python, with autograd
and without (written by hand), and torch's scan under Inductor. The kind ``3-gru`` is the paper's: three
layers, each added to its input.

    python benchmarks/recurrent.py --kind gru --threads 1 --repeats 15

With ``--turns`` several processes compile at once and measure one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from allocations import memory_of
from gru_by_hand import GRUByHand
from measuring import (
    PRECISIONS,
    Step,
    add_turns,
    alone,
    captured,
    measure,
    parser,
    set_up,
    smallest_cosine,
    use_precision,
    use_side_stream,
)
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


class Loop(nn.Module):
    """An ``nn.GRU`` as a user would write it, over time by ``over_time(step, initial state, inputs)``."""

    def __init__(self, gru: nn.GRU, over_time: Callable[..., Any]) -> None:
        super().__init__()
        self.weights, self.over_time = nn.ParameterList(gru.parameters()), over_time

    def forward(self, x: Tensor) -> tuple[Tensor]:
        # On CUDA a module's weights are parts of one tensor, which no scan may read.
        w_x, w_h, b_x, b_h = (w.clone() for w in self.weights)

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


class ThreeGRUs(nn.Module):
    """``x + gru(x)`` three times, after a projection."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, hidden)
        self.layers = nn.ModuleList(nn.GRU(hidden, hidden) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.project(x)
        for layer in self.layers:
            x = x + layer(x)[0]
        return (x,)


KINDS: dict[str, Callable[[int, int], nn.Module]] = {"gru": nn.GRU, "lstm": nn.LSTM, "3-gru": ThreeGRUs}


def main() -> None:
    add = (made := parser(__doc__, repeats=15)).add_argument
    add("--kind", choices=list(KINDS), default="gru")
    add("--precision", choices=PRECISIONS, default="float32")
    add("--settings", nargs="*", help="some of: " + ", ".join(SETTINGS))
    add("--cuda-graphs", action="store_true", help="also the whole step in a CUDA graph")
    add_turns(made)
    add("--loops", action="store_true", help="also a loop in Python and torch's scan (GRU)")
    add("--shape", type=int, nargs=4, metavar=("T", "B", "I", "H"), action="append")
    arguments = made.parse_args()
    set_up(arguments)
    dtype = use_precision(arguments.precision)
    if arguments.cuda_graphs:
        use_side_stream()
    torch._dynamo.config.capture_scalar_outputs = True  # Inductor's scan needs it
    for steps_, batch, inputs, hidden in arguments.shape or SHAPES:
        torch.manual_seed(0)
        torch._dynamo.reset()
        module = KINDS[arguments.kind](inputs, hidden)
        module.to(arguments.device, dtype)
        x = torch.randn(steps_, batch, inputs, device=arguments.device, dtype=dtype)
        direction = torch.randn(steps_, batch, hidden, device=arguments.device, dtype=dtype)
        steps = {"torch, eager": Step(module, module, x, direction)}
        for name, options in SETTINGS.items():
            if arguments.settings and name not in arguments.settings:
                continue
            compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
            steps[name] = Step(module, compiled, x, direction)
        if arguments.loops and arguments.kind == "gru":
            loop, scanned = Loop(module, in_python), Loop(module, scan)
            steps["loop, eager"] = Step(module, loop, x, direction)
            steps["loop, by hand"] = Step(module, GRUByHand(module), x, direction)
            under_inductor = torch.compile(scanned, backend="inductor", fullgraph=True)
            steps["scan, Inductor"] = Step(module, under_inductor, x, direction)
        exact = [g.clone() for g in steps["torch, eager"]()]
        cosines = {name: smallest_cosine(step(), exact) for name, step in steps.items()}
        with alone(arguments.turns, arguments.processes):
            megabytes = {name: memory_of(step).peak / 1e6 for name, step in steps.items()}
            times = measure(steps, arguments.repeats)
            replays = measure(captured(steps), arguments.repeats) if arguments.cuda_graphs else {}
            sizes = f"T = {steps_}, B = {batch}, I = {inputs}, H = {hidden}"
            print(f"\n{arguments.kind}, {sizes}, {arguments.precision}")
            for name, ms in times.items():
                ratio = times["torch, eager"] / ms
                figures = (
                    f"{ms:9.2f} ms  {ratio:5.2f}x  cosine {cosines[name]:.4f}  {megabytes[name]:7.1f} MB"
                )
                replayed = replays.get(name)
                graph = f"  in a CUDA graph {replayed:9.2f} ms" if replayed else ""
                print(f"  {name:20} {figures}{graph}", flush=True)


if __name__ == "__main__":
    main()
