"""Training steps of residual models: ``backend="inductor"`` against ``backend="highway"``, alternating.

For each row of the grid, in its own process: milliseconds of the forward and the backward pass and of the
whole step with AdamW (fused), the smallest cosine of a parameter's gradient to the exact one, seconds to
compile with empty and with filled caches, and by how much a step raises the memory in use. Beside it the
floor: the FLOPs of an exact step and the bytes of the weights.

    OMP_NUM_THREADS=2 python benchmarks/depth.py --threads 2 --only mlp
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from depth_models import FAMILIES, Row
from measuring import Step, measure_parts, memory_of, parser, set_up, smallest_cosine
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.utils.flop_counter import FlopCounterMode

import hwbp_compile

GRID = [
    Row("mlp", 32, 64, 4),
    Row("mlp", 64, 64, 1),
    Row("mlp", 32, 128, 8),
    Row("mlp", 32, 256, 4),
    Row("pre-norm", 12, 64, 1, 16),
    Row("pre-norm", 24, 64, 1, 16),
    Row("pre-norm", 12, 128, 4, 64),
    Row("post-norm", 12, 64, 1, 16),
    Row("post-norm", 12, 128, 4, 64),
    Row("mixer", 12, 64, 1, 16),
    Row("mixer", 24, 128, 4, 16),
    Row("resnet", 110, 16, 1, 32),
]
ITERATED: dict[str, dict[str, Any]] = {f"k = {k}": {"iterations": k, "apply": "always"} for k in (0, 1, 2, 4)}
SETTINGS = ITERATED | {"auto": {}}
STACKED = {
    f"stacked, {name}": options for name, options in ({"exact": {"apply": "never"}} | ITERATED).items()
}
"""With parameters in stacks; exact is Inductor's, apart from the gradients of rows."""
ALL = {"inductor": None, **SETTINGS, **STACKED}


def measure_row(row: Row, arguments: argparse.Namespace) -> None:
    """Print the block of one model."""
    torch.manual_seed(0)
    model, x = FAMILIES[row.family](row)
    model, x = model.to(arguments.device), x.to(arguments.device)
    direction = torch.randn_like(model(x))
    with FlopCounterMode(display=False) as counter:
        (model(x) * direction).sum().backward()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"\n{row}: {counter.get_total_flops() / 1e6:.1f} MFLOP, weights {weights / 1e6:.2f} MB")
    names = [n for n in ALL if not arguments.settings or n in arguments.settings]
    steps, seconds = {}, {name: [0.0, 0.0] for name in names}
    with contextlib.ExitStack() as stack:
        folders = {name: stack.enter_context(TemporaryDirectory()) for name in names}
        for again in (0, 1) if arguments.compile_time else (1,):
            torch._dynamo.reset()
            for name in names:
                module = copy.deepcopy(model)
                if name in STACKED:
                    hwbp_compile.stack_parameters(module)
                optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
                backend = "inductor" if name == "inductor" else "highway"
                compiled = torch.compile(module, backend=backend, options=ALL[name], dynamic=False)
                steps[name] = Step(module, compiled, x, direction, optimizer)
                with fresh_cache(dir=folders[name], delete=False):
                    start = time.perf_counter()
                    steps[name]()
                    seconds[name][again] = time.perf_counter() - start
    for step in steps.values():
        step.module.load_state_dict(model.state_dict())
        step()
    exact = gradients(steps[names[0]].module)
    cosines = {name: smallest_cosine(gradients(step.module), exact) for name, step in steps.items()}
    megabytes = {name: memory_of(step) for name, step in steps.items()}
    for _ in range(3):
        for step in steps.values():
            step()
    times = measure_parts(steps, arguments.repeats)
    for name, (forward, backward, optimizer, whole) in times.items():
        base = times[names[0]]
        print(
            f"  {name:14} forward {forward:7.3f}  backward {backward:7.3f} ({base[1] / backward:5.2f}x)  "
            f"optimizer {optimizer:7.3f}  step {whole:7.3f} ms ({base[3] / whole:5.2f}x)  "
            f"cosine {cosines[name]:.4f}  compile {seconds[name][0]:5.1f} / {seconds[name][1]:5.1f} s  "
            f"{megabytes[name]:6.1f} MB",
            flush=True,
        )


def gradients(module: nn.Module) -> list[Tensor]:
    """By the names that the parameters have without stacks."""
    plain = copy.deepcopy(module)
    for own, p in zip(plain.parameters(), module.parameters(), strict=True):
        own.grad = p.grad
    hwbp_compile.unstack_parameters(plain)
    return [p.grad.clone() for _, p in sorted(plain.named_parameters()) if p.grad is not None]


def main() -> None:
    made = parser(__doc__, threads=2, repeats=50)
    made.add_argument("--only", choices=list(FAMILIES), action="append", help="of the grid only these")
    made.add_argument("--settings", nargs="*", help="some of: inductor, " + ", ".join(ALL))
    made.add_argument("--row", nargs=5, metavar=("FAMILY", "DEPTH", "WIDTH", "BATCH", "SEQUENCE"))
    made.add_argument("--compile-time", action="store_true", help="compile with empty caches first")
    made.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.row or arguments.one is not None:
        if arguments.row:
            set_up(arguments)
            row = Row(arguments.row[0], *map(int, arguments.row[1:]))
        else:
            torch.set_num_threads(arguments.threads)
            row = GRID[arguments.one]
        measure_row(row, arguments)
        return
    set_up(arguments)
    for i, row in enumerate(GRID):
        if not arguments.only or row.family in arguments.only:
            subprocess.run([sys.executable, Path(__file__), *sys.argv[1:], "--one", str(i)], check=False)


if __name__ == "__main__":
    main()
