"""Whether ``apply="auto"`` chooses well: its verdict on recurrent layers against what both choices take.

For each shape a training step is measured in eager torch, exact and iterated, alternating in one process. The
verdict is right if it names the faster of the two, or one that is at most 3 % slower. Of a cell of one's own,
the GRU of custom_cell.py by torch's scan, eager torch is the loop.

    python benchmarks/decision.py --threads 1 --repeats 7
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from custom_cell import LayerNormGRU
from measuring import Step, add_turns, alone, measure, parser, set_up
from torch import nn

import hwbp_compile
from hwbp_compile.recurrent import cost
from hwbp_compile.recurrent.measured import forget

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
    ("cell", 1024, 8, 16, 64, 1, 1),
    ("cell", 1024, 8, 16, 64, 2, 8),
    ("cell", 2048, 1, 16, 64, 1, 8),
    ("cell", 256, 32, 64, 128, 1, 1),
    ("cell", 512, 64, 16, 64, 1, 8),
]
MORE_ON_CUDA = [
    ("gru", 4096, 16, 64, 64, 1, 1),
    ("gru", 1024, 128, 3, 64, 1, 1),
    ("lstm", 2048, 16, 64, 64, 1, 1),
    ("gru", 256, 128, 512, 512, 1, 1),
]
KINDS = {"gru": nn.GRU, "lstm": nn.LSTM, "cell": LayerNormGRU}


@contextmanager
def expectations() -> Iterator[list[str]]:
    """What the backend logs of its decisions meanwhile: the times that it expects."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger(cost.__name__), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class Row:
    """A row of the grid, compiled, and not measured yet."""

    def __init__(self, kind: str, sizes: Sequence[int], k: int, group: int, device: str) -> None:
        torch.manual_seed(0)
        length, batch, inputs, hidden = sizes
        self.name = f"{kind:4} T {length:5} B {batch:4} I {inputs:4} H {hidden:5} k {k} group {group}"
        self.module = KINDS[kind](inputs, hidden).to(device)
        self.x = torch.randn(length, batch, inputs, device=device)
        direction = torch.randn(length, batch, hidden, device=device)
        self.options: dict[str, Any] = {"iterations": k, "group_size": group}
        eager = self.module.loop if kind == "cell" else self.module
        self.steps = {"eager": Step(self.module, eager, self.x, direction)}
        for name, more in (("exact", {"iterations": "exact"}), ("iterated", {"apply": "always"})):
            options = {**self.options, **more}
            compiled = torch.compile(self.module, backend="highway", options=options, dynamic=False)
            self.steps[name] = Step(self.module, compiled, self.x, direction)
        for step in self.steps.values():
            step()
            step()

    def measure(self, repeats: int) -> tuple[bool, float]:
        """Print the row; whether the choice is right, and how fast it is, against eager torch."""
        forget()  # what was measured while others compiled
        with expectations() as expected:
            (chain,) = hwbp_compile.explain(self.module, self.x, options=self.options).chains
        ms = measure(self.steps, repeats)
        chosen, other = ("iterated", "exact") if chain.applied else ("exact", "iterated")
        good, against = ms[chosen] <= 1.03 * ms[other], ms["eager"] / ms[chosen]
        why = expected[-1] if expected else chain.reason
        print(
            f"{self.name}: "
            f"eager {ms['eager']:8.2f} exact {ms['exact']:8.2f} iterated {ms['iterated']:8.2f} ms; "
            f"{chosen:8} {'right' if good else 'WRONG'} ({against:.2f}x of eager); {why}",
            flush=True,
        )
        return good, against


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, nargs=2, default=[0, None], help="first and last of the grid")
    add_turns(made)
    arguments = made.parse_args()
    set_up(arguments)
    rows = (GRID + MORE_ON_CUDA if arguments.device == "cuda" else GRID)[slice(*arguments.rows)]
    found: list[tuple[bool, float]] = []
    # In turns all rows are compiled before the first is measured. Else there would be many programs of one
    # function, among which each call would have to look for its own.
    for some in [rows] if arguments.turns else [[row] for row in rows]:
        torch._dynamo.reset()
        ready = [Row(kind, sizes, k, group, arguments.device) for kind, *sizes, k, group in some]
        with alone(arguments.turns, arguments.processes):
            found += [row.measure(arguments.repeats) for row in ready]
    right, slowest = sum(good for good, _ in found), min((against for _, against in found), default=1.0)
    print(f"{right} of {len(rows)} right; slowest choice {slowest:.2f}x of eager")


if __name__ == "__main__":
    main()
