"""Train real models with exact backpropagation and with Highway-BP, side by side.

A character-level GPT and a GRU read Python's language reference; a ResNet recognises handwritten digits, and
another GRU does so one pixel after the other. Run it with ``./demo.sh`` from the root of the repository;
tables and a plot end up in ``demo_output/``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch
from char_gpt import CharGPT
from data import characters, digits, pixels
from digits_resnet import DigitsResNet
from plot import draw
from recurrent import CharGRU, PixelGRU
from table import LEGEND, table, verdict
from training import Backward, Run, Task, train

import hwbp_compile

OUTPUT = Path(__file__).resolve().parent.parent / "demo_output"


def gpt_task(quick: bool) -> Task:
    """A pre-LN transformer: every layer is two residual blocks, attention and MLP."""
    layers, length = (4, 32) if quick else (8, 64)
    data = characters(batch=8, length=length)
    return Task(
        name="gpt",
        title=f"GPT: a chain of {2 * layers} residual blocks",
        make_model=lambda: CharGPT(data.classes, length, layers=layers),
        data=data,
        steps=30 if quick else 150,
        learning_rate=4e-3,
    )


def resnet_task(quick: bool) -> Task:
    """A pre-activation ResNet of two stages; the strided convolution between them divides the chains."""
    blocks = 4 if quick else 5
    return Task(
        name="resnet",
        title=f"ResNet: two chains of {blocks} residual blocks",
        make_model=lambda: DigitsResNet(blocks_per_stage=blocks),
        data=digits(batch=32),
        steps=30 if quick else 150,
        learning_rate=4e-3,
    )


def characters_task(quick: bool) -> Task:
    """A GRU with a loss at every step."""
    length = 64 if quick else 128
    data = characters(batch=8, length=length)
    return Task(
        name="gru",
        title=f"GRU on characters: a chain of {length} steps",
        make_model=lambda: CharGRU(data.classes),
        data=data,
        steps=50 if quick else 400,
        learning_rate=1e-2,
        over_time=True,
    )


def pixels_task(quick: bool) -> Task:
    """A GRU with a loss at its last step only."""
    size = 8 if quick else 16
    data = pixels(batch=32, size=size)
    return Task(
        name="pixels",
        title=f"GRU on pixels: a chain of {size * size} steps",
        make_model=lambda: PixelGRU(data.classes, size * size),
        data=data,
        steps=50 if quick else 600,
        learning_rate=1e-2,
        over_time=True,
    )


TASKS = {"gpt": gpt_task, "resnet": resnet_task, "gru": characters_task, "pixels": pixels_task}


def exact_backward(codegen: str) -> Backward:
    """Backpropagation as ``torch.compile`` does it by default."""
    return Backward("exact", {"backend": "inductor" if codegen == "inductor" else "aot_eager"})


def highway_backward(iterations: int | str, codegen: str, **options: int) -> Backward:
    """Highway-BP: all blocks of a chain at once, ``iterations`` times; also where exact is faster."""
    name = "highway, exact" if iterations == "exact" else f"k = {iterations}"
    if "group_size" in options:
        name = f"groups of {options['group_size']}, {name}"
    given = {"iterations": iterations, "group_size": 1, "codegen": codegen, "apply": "always", **options}
    return Backward(name, {"backend": "highway", "options": given})


def backwards_of(task: Task, iterations: list[int], codegen: str) -> list[Backward]:
    """The ways to train that are compared, the first of them exact."""
    ways = [exact_backward(codegen)]
    if task.over_time:
        ways.append(highway_backward("exact", codegen))
    ways += [highway_backward(k, codegen) for k in iterations]
    if task.over_time:
        ways.append(highway_backward(1, codegen, group_size=8))
    return ways


def choose_codegen() -> str:
    """Inductor needs a C++ compiler and Python's headers; where they are missing, run graphs op by op."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    missing = []
    if shutil.which(compiler) is None:
        missing.append(f"the C++ compiler {compiler}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's header files")
    if not missing:
        return "inductor"
    print(f"Inductor cannot generate code without {' and '.join(missing)} (Debian: g++ and python3-dev).")
    print("Running the graphs op by op instead: the losses and gradients are the same, times say little.")
    return "eager"


def compare(task: Task, iterations: list[int], codegen: str) -> tuple[list[Run], str]:
    """Train one task in all ways; the runs, and a section of the report."""
    torch.manual_seed(0)
    model = task.make_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{task.title}\n{parameters:,} parameters, {task.steps} steps; {task.data.description}\n")
    options = {"iterations": iterations[-1], "apply": "always"}
    print(hwbp_compile.explain(model, task.data.train(0)[0], options=options), "\n")
    runs = train(task, model, backwards_of(task, iterations, codegen))
    report = f"{table(runs)}\n\n{verdict(runs)}"
    print(f"\n{report}", flush=True)
    return runs, f"## {task.title}\n{task.steps} steps; {task.data.description}\n\n{report}\n"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./demo.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller models, few steps, only k = 2")
    parser.add_argument("--only", choices=sorted(TASKS), help="train only one of the models")
    parser.add_argument(
        "--iterations", type=int, nargs="+", metavar="K", help="the values of k to try (default: 1 2 4)"
    )
    parser.add_argument(
        "--codegen", choices=("inductor", "eager"), help="default: inductor, if there is a C++ compiler"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="FOLDER",
        help="for tables and plot (default: demo_output)",
    )
    arguments = parser.parse_args()
    arguments.iterations = arguments.iterations or ([2] if arguments.quick else [1, 2, 4])
    return arguments


def main() -> None:
    """Train, and report."""
    arguments = parse_arguments()
    start = time.perf_counter()
    codegen = arguments.codegen or choose_codegen()
    # Dynamo keeps a compiled version of the model's class for each run, by default no more than 8.
    torch._dynamo.config.recompile_limit = len(arguments.iterations) + 8
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # the models are too small for more
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, codegen {codegen}")

    results: dict[str, list[Run]] = {}
    sections = []
    for name in [arguments.only] if arguments.only else TASKS:
        task = TASKS[name](arguments.quick)
        results[task.title], section = compare(task, arguments.iterations, codegen)
        sections.append(section)

    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text("\n".join([*sections, LEGEND, ""]))
    draw(results, folder / "demo.png")
    seconds = time.perf_counter() - start
    print(f"\n{LEGEND}\n\n{seconds:.0f} s in all. Tables: {folder}/results.md, plot: {folder}/demo.png")


if __name__ == "__main__":
    main()
