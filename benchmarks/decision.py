"""Whether ``apply="auto"`` chooses well: its verdict on recurrent layers against what both choices take.

For each shape a training step is measured in eager torch, exact and iterated, alternating in one process. The
verdict is right if it names the faster of the two, or one that is at most 3 % slower.

    python benchmarks/decision.py --threads 1 --repeats 7
"""

from __future__ import annotations

from typing import Any

import torch
from measuring import Step, add_turns, alone, measure, parser, set_up
from torch import nn

import hwbp_compile

GRID = [
    # kind, T, B, I, H, k, group_size
    ("gru", 2048, 4, 16, 64, 1, 1),
    ("gru", 2048, 1, 16, 32, 1, 1),
    ("gru", 1024, 8, 3, 64, 1, 1),
    ("gru", 1024, 8, 3, 64, 0, 1),
    ("gru", 1024, 8, 3, 64, 2, 1),
    ("gru", 512, 1, 64, 256, 1, 1),
    ("gru", 512, 1, 64, 256, 2, 1),
    ("gru", 2048, 1, 64, 128, 1, 1),
    ("gru", 512, 2, 64, 384, 1, 1),
    ("gru", 256, 8, 64, 128, 1, 1),
    ("gru", 256, 8, 64, 128, 0, 1),
    ("gru", 256, 8, 64, 128, 1, 8),
    ("gru", 256, 128, 3, 64, 1, 1),
    ("gru", 128, 32, 128, 256, 1, 1),
    ("gru", 64, 8, 512, 512, 1, 1),
    ("gru", 32, 64, 512, 512, 1, 1),
    ("gru", 64, 4, 64, 1024, 1, 1),
    ("lstm", 2048, 4, 16, 64, 1, 1),
    ("lstm", 1024, 8, 3, 64, 0, 1),
    ("lstm", 512, 1, 64, 256, 1, 1),
    ("lstm", 256, 8, 64, 128, 1, 1),
    ("lstm", 256, 32, 64, 128, 1, 1),
    ("lstm", 256, 64, 64, 128, 1, 1),
    ("lstm", 128, 8, 64, 256, 1, 1),
    ("lstm", 64, 32, 512, 512, 1, 1),
    ("lstm", 64, 16, 300, 300, 2, 1),
]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, nargs=2, default=[0, len(GRID)], help="first and last of the grid")
    add_turns(made)
    arguments = made.parse_args()
    set_up(arguments)
    right, slowest, rows = 0, float("inf"), GRID[slice(*arguments.rows)]
    for kind, steps_, batch, inputs, hidden, k, group in rows:
        torch.manual_seed(0)
        torch._dynamo.reset()
        module = (nn.GRU if kind == "gru" else nn.LSTM)(inputs, hidden).to(arguments.device)
        x = torch.randn(steps_, batch, inputs, device=arguments.device)
        direction = torch.randn(steps_, batch, hidden, device=arguments.device)
        options: dict[str, Any] = {"iterations": k, "group_size": group}
        with alone(arguments.turns):
            (chain,) = hwbp_compile.explain(module, x, options=options).chains
        steps = {"eager": Step(module, module, x, direction)}
        for name, more in (("exact", {"iterations": "exact"}), ("iterated", {"apply": "always"})):
            compiled = torch.compile(module, backend="highway", options={**options, **more}, dynamic=False)
            steps[name] = Step(module, compiled, x, direction)
        for step in steps.values():
            step()
            step()
        with alone(arguments.turns, arguments.processes):
            ms = measure(steps, arguments.repeats)
        chosen, other = ("iterated", "exact") if chain.applied else ("exact", "iterated")
        good = ms[chosen] <= 1.03 * ms[other]
        right += good
        slowest = min(slowest, ms["eager"] / ms[chosen])
        print(
            f"{kind:4} T {steps_:5} B {batch:4} I {inputs:4} H {hidden:5} k {k} group {group}: "
            f"eager {ms['eager']:8.2f} exact {ms['exact']:8.2f} iterated {ms['iterated']:8.2f} ms; "
            f"{chosen:8} {'right' if good else 'WRONG'} ({ms['eager'] / ms[chosen]:.2f}x of eager); "
            f"{chain.reason}",
            flush=True,
        )
    print(f"{right} of {len(rows)} right; slowest choice {slowest:.2f}x of eager")


if __name__ == "__main__":
    main()
