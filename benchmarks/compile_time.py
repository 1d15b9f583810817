"""Cold compile time of a GPT through Inductor: exact backprop against ``backend="highway"``, side by side.

Each measurement is a process of its own with an empty cache, and takes the first three steps; the settings
alternate: k fixed, the defaults (which may leave all exact), and k chosen where the iteration is insisted on.

    python benchmarks/compile_time.py --layers 12 --width 128 --iterations 4 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import FIRST_STEPS, compile_once
from torch.fx import Graph

from hwbp_compile.options import Options

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


SETTINGS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "inductor": ("inductor", None),
    "k fixed": ("highway", {"apply": "always"}),
    "defaults": ("highway", None),
    "auto, always": ("highway", {"iterations": "auto", "apply": "always"}),
}


def measure(arguments: argparse.Namespace, setting: str) -> dict[str, float]:
    """In this process: the first training steps; their seconds, and those of our passes."""
    from char_gpt import CharGPT

    import hwbp_compile.backend
    from hwbp_compile.passes.pipeline import Record, rewrite

    passes: list[float] = []

    def timed_rewrite(graph: Graph, options: Options, **how: bool) -> Record:
        record = rewrite(graph, options, **how)
        passes.append(sum(record.seconds.values()))
        return record

    hwbp_compile.backend.rewrite = timed_rewrite
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    compile_once()
    model = CharGPT(65, arguments.length, arguments.layers, arguments.width, arguments.width // 32)
    tokens = torch.randint(0, 65, (arguments.batch, arguments.length))
    backend, options = SETTINGS[setting]
    if setting == "k fixed":
        options = {"iterations": arguments.iterations, **(options or {})}
    compiled = torch.compile(model, backend=backend, options=options)
    start, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(FIRST_STEPS):
        F.cross_entropy(compiled(tokens).flatten(0, 1), tokens.flatten()).backward()
    return {"compile": time.perf_counter() - start, "cpu": cpu_seconds() - cpu, "passes": sum(passes)}


def cpu_seconds() -> float:
    """Processor time of this process and the compilers it ran: the same on a busy machine."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--one", choices=list(SETTINGS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments, arguments.one)))
        return
    found: dict[str, list[dict[str, float]]] = {setting: [] for setting in arguments.settings}
    for _ in range(arguments.repeats):
        for setting, results in found.items():
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", setting]
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{setting}: {results[-1]['compile']:.1f} s, {results[-1]['cpu']:.1f} s of CPU", flush=True)

    def median(setting: str, what: str) -> float:
        return statistics.median(r[what] for r in found[setting])

    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{arguments.layers} layers, d {arguments.width}, k = {arguments.iterations}:")
    first = arguments.settings[0]
    for setting in arguments.settings:
        ratios = [median(setting, what) / median(first, what) for what in ("compile", "cpu")]
        print(
            f"{setting}: {median(setting, 'compile'):.1f} s ({ratios[0]:.2f}), "
            f"{median(setting, 'cpu'):.1f} s of CPU ({ratios[1]:.2f}), "
            f"our passes {median(setting, 'passes'):.2f} s"
        )


if __name__ == "__main__":
    main()
