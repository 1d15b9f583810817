"""A training step of a cell of one's own: a loop in eager torch, torch's ``scan``, and ``backend="highway"``.

The cell is a GRU whose projections are normalised. ``scan`` is compiled with Inductor, or by this backend;
the loop is what ``scan`` means. The loss is a random linear function of all states, the weights are as
initialised.

    OMP_NUM_THREADS=1 python benchmarks/custom_cell.py --threads 1 --repeats 7
"""

from __future__ import annotations

import torch
from measuring import Step, add_turns, alone, measure, parser, set_up, smallest_cosine
from recurrent import SETTINGS
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


def main() -> None:
    """Print one table."""
    made = parser(__doc__)
    made.add_argument("--shape", type=int, nargs=4, metavar=("T", "B", "I", "H"), default=(1024, 8, 16, 64))
    made.add_argument("--no-scan", action="store_true", help="without torch's scan under Inductor")
    made.add_argument("--settings", nargs="*", help="some of: " + ", ".join(SETTINGS))
    add_turns(made)
    arguments = made.parse_args()
    set_up(arguments)
    torch.manual_seed(0)
    # Inductor compiles a scan only with this setting; without it while running, it would compile it again.
    torch._dynamo.config.capture_scalar_outputs = True
    length, batch, inputs, hidden = arguments.shape
    module = LayerNormGRU(inputs, hidden).to(arguments.device)
    x = torch.randn(length, batch, inputs, device=arguments.device)
    direction = torch.randn(length, batch, hidden, device=arguments.device)
    steps = {"loop, eager": Step(module, module.loop, x, direction)}
    if not arguments.no_scan:
        steps["scan, Inductor"] = Step(module, torch.compile(module, backend="inductor"), x, direction)
    peers = list(steps)
    for name, options in SETTINGS.items():
        if arguments.settings and name not in arguments.settings:
            continue
        compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
        steps[name] = Step(module, compiled, x, direction)
    exact = [g.clone() for g in steps["loop, eager"]()]
    for step in steps.values():
        step()
    cosines = {name: smallest_cosine(step(), exact) for name, step in steps.items()}
    with alone(arguments.turns, arguments.processes):
        times = measure(steps, arguments.repeats)
        print(f"LayerNorm-GRU, T = {length}, B = {batch}, I = {inputs}, H = {hidden}")
        for name, ms in times.items():
            against = [f"{times[peer] / ms:6.2f}x" for peer in peers]
            print(f"  {name:20} {ms:9.2f} ms  {'  '.join(against)}  cosine {cosines[name]:.4f}", flush=True)


if __name__ == "__main__":
    main()
