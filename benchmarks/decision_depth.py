"""Whether ``apply="auto"`` chooses well over depth: its verdict on models against what both choices take.

For each model, with its parameters as they are and in stacks, forward and backward pass are measured exact,
with k iterations and, where a kernel is chosen, swept by it, alternating in one process. The verdict is right
if it names the fastest of them, or one that is at most 3 % slower. Beside it the times of the backward pass,
expected, of what is compared by costs, and measured.

    OMP_NUM_THREADS=2 python benchmarks/decision_depth.py --threads 2
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from depth_models import FAMILIES, Row
from json_lines import add_line
from measuring import Step, measure_parts, parser, set_up

import hwbp_compile

GRID = [
    # the model, k
    (Row("mlp", 16, 32, 1), 2),
    (Row("mlp", 16, 64, 8), 1),
    (Row("mlp", 16, 128, 4), 2),
    (Row("mlp", 32, 32, 4), 4),
    (Row("mlp", 32, 64, 1), 1),
    (Row("mlp", 32, 64, 8), 2),
    (Row("mlp", 32, 128, 8), 1),
    (Row("mlp", 64, 64, 1), 2),
    (Row("pre-norm", 6, 64, 1, 16), 1),
    (Row("pre-norm", 6, 64, 4, 64), 2),
    (Row("mixer", 6, 64, 1, 16), 2),
    (Row("resnet", 32, 8, 1, 16), 1),
]


@dataclass(frozen=True)
class Verdict:
    """Milliseconds of whole steps, and whether the choice between them was right."""

    exact: float
    chosen: float
    right: bool

    @property
    def gain(self) -> float:
        """How much faster the choice is than exact backpropagation."""
        return self.exact / self.chosen


def decide(row: Row, k: int, stacked: bool, arguments: argparse.Namespace) -> Verdict:
    """Measure one model, and print a line."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = FAMILIES[row.family](row)
    model, x = model.to(arguments.device), x.to(arguments.device)
    if stacked:
        hwbp_compile.stack_parameters(model)
    direction = torch.randn_like(model(x))

    def compiled(**options: Any) -> Step:
        module = copy.deepcopy(model)
        forward = torch.compile(module, backend="highway", options=options, dynamic=False)
        return Step(module, forward, x, direction)

    begun = time.perf_counter()
    found = hwbp_compile.explain(model, x, options={"iterations": k}).chains
    steps = {"exact": compiled(apply="never"), "iterated": compiled(iterations=k, apply="always")}
    chains = [c for c in found if c.costs is not None or c.swept]
    choices = {"iterated" if c.applied else "swept" if c.swept else "exact" for c in chains}
    chosen = choices.pop() if len(choices) == 1 else "several" if choices else "exact"
    if chosen not in steps:
        steps[chosen] = compiled(iterations=k)
    for step in steps.values():
        step()
        step()
    seconds = time.perf_counter() - begun
    times = measure_parts(steps, arguments.repeats)
    whole = {name: parts[-1] for name, parts in times.items()}
    right = whole[chosen] <= 1.03 * min(whole.values())
    compared = max((c for c in chains if c.costs), key=lambda c: c.blocks, default=None)
    costs = compared.costs if compared is not None and compared.costs else ()
    expected = {name: 1e3 * cost.seconds for name, cost in zip(("exact", "iterated"), costs, strict=False)}
    if arguments.save:
        here = {"stacked": stacked, "k": k, "expected": expected, "measured": times, "chosen": chosen}
        add_line(arguments.save, asdict(row) | {"threads": arguments.threads} | here)
    backward = (
        f"{name} {f'expected {expected[name]:7.3f} ' if name in expected else ''}{parts[1]:7.3f} ms"
        for name, parts in times.items()
    )
    verdict = Verdict(whole["exact"], whole[chosen], right)
    print(
        f"{row!s:28} {'stacked ' if stacked else 'ordinary'} k {k}: backward {', '.join(backward)}; "
        f"step {', '.join(f'{name} {ms:7.3f}' for name, ms in whole.items())} ms; "
        f"{chosen:8} {'right' if right else 'WRONG'} ({verdict.gain:.2f}x of exact); {seconds:.0f} s before",
        flush=True,
    )
    return verdict


def main() -> None:
    made = parser(__doc__, threads=2, repeats=100)
    made.add_argument("--rows", type=int, nargs=2, default=[0, len(GRID)], help="first and last of the grid")
    made.add_argument(
        "--save", type=Path, metavar="FILE", help="append what is found as JSON, a line a model"
    )
    arguments = made.parse_args()
    set_up(arguments)
    verdicts = [
        decide(row, k, stacked, arguments)
        for row, k in GRID[slice(*arguments.rows)]
        for stacked in (False, True)
    ]
    print(
        f"{sum(v.right for v in verdicts)} of {len(verdicts)} right; "
        f"slowest choice {min(v.gain for v in verdicts):.2f}x of exact, "
        f"largest gain {max(v.gain for v in verdicts):.2f}x"
    )


if __name__ == "__main__":
    main()
