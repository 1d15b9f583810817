"""Peak memory of a training step: ``backend="inductor"`` against ``backend="highway"``, to the byte.

Forward and backward pass, no optimizer; what is allocated beyond parameters and inputs, see allocations.py.
Recurrent layers of torch.nn are left to eager torch by Inductor. For each row, in a process of its own, a
line of a table in Markdown: the megabytes of the weights; with Inductor, the peak and what the forward pass
keeps; in each setting of highway, the peak as a share of Inductor's, and again what the forward pass keeps.

    python benchmarks/memory.py
    python benchmarks/memory.py --only mlp --only gru --device cuda
"""

from __future__ import annotations

import argparse
from functools import partial

from allocations import Memory, memory_of
from depth_models import Row
from measuring import parser, set_limits, set_up
from memory_case import ROWS, SETTINGS, Layer, settings_of, steps_of, watching
from workers import Worker

LIMIT = 1.15
"""Shares above it are marked."""


def measure(arguments: argparse.Namespace, row: Row | Layer) -> tuple[dict[str, Memory], int]:
    """In a process of its own: what each setting takes, and the bytes of the weights."""
    set_limits(arguments)
    make, weights = steps_of(row, arguments)
    found = {}
    for name in settings_of(row):
        if name not in (SETTINGS[0], *arguments.settings):
            continue
        step = make(name)
        with watching(name):
            for _ in range(2):  # compiles; with k chosen, the first step is one that is watched
                step()
            found[name] = max((memory_of(step) for _ in range(arguments.repeats)), key=lambda m: m.peak)
        del step
    return found, weights


def line(row: Row | Layer, found: dict[str, Memory], weights: int) -> str:
    """A line of the table."""
    base = found[SETTINGS[0]]
    cells = [str(row), _megabytes(weights), f"{_megabytes(base.peak)} ({_megabytes(base.kept)})"]
    for name in SETTINGS[1:]:
        if name not in found:
            cells.append("")
            continue
        share = f"{found[name].peak / base.peak:.2f}"
        marked = f"**{share}**" if float(share) > LIMIT else share
        cells.append(f"{marked} ({_megabytes(found[name].kept)})")
    return "| " + " | ".join(cells) + " |"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g}"


def main() -> None:
    made = parser(__doc__, repeats=2)
    families = list(dict.fromkeys(row.family for row in ROWS))
    made.add_argument("--only", choices=families, action="append", help="only these")
    made.add_argument("--settings", choices=SETTINGS[1:], nargs="*", default=SETTINGS[1:], help="only these")
    made.add_argument("--patience", type=float, default=1800, help="seconds that a row may take")
    arguments = made.parse_args()
    arguments.precision = "float32"
    set_up(arguments)
    print("\n| | weights | `inductor`, MB | " + " | ".join(SETTINGS[1:]) + " |")
    print("|---" * (2 + len(SETTINGS)) + "|", flush=True)
    for row in ROWS:
        if arguments.only and row.family not in arguments.only:
            continue
        worker = Worker(partial(measure, arguments))
        try:
            print(line(row, *worker(row, arguments.patience)), flush=True)
        except (TimeoutError, EOFError) as failure:
            why = "no time" if isinstance(failure, TimeoutError) else "failed"
            print(f"| {row} | {why} |", flush=True)
        finally:
            worker.stop(patience=5)


if __name__ == "__main__":
    main()
