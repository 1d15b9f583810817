"""Training steps of residual models: ``backend="inductor"`` against ``backend="highway"``, alternating.

For each row of the grid, in its own process: milliseconds of the forward and the backward pass and of the
whole step with AdamW (fused), the smallest cosine of a parameter's gradient to the exact one, seconds to
compile with empty and with filled caches, and the most memory that a step allocates. Beside it the
floor: the FLOPs of an exact step, the bytes of the weights, and the products one after the other in a
backward pass, exact and iterated.

    OMP_NUM_THREADS=2 python benchmarks/depth.py --threads 2 --only mlp

Compilation takes longer than what is measured. So it can be done before, in parallel, into a folder that the
measurement reads; one process measures, and with ``--jobs`` others load what is next. On CUDA,
``--cuda-graphs`` adds the whole step in a CUDA graph.

    python benchmarks/depth.py --device cuda --cache FOLDER --prepare
    python benchmarks/depth.py --device cuda --cache FOLDER --cuda-graphs --save depth.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from allocations import memory_of
from depth_case import ALL, CHOSEN, GRIDS, Case, K, compile_seconds
from depth_models import FAMILIES, Row, add_row, row_of
from json_lines import add_line, read_lines
from measuring import (
    PRECISIONS,
    Step,
    add_turns,
    alone,
    captured,
    compile_once,
    measure,
    measure_parts,
    parser,
    set_limits,
    set_up,
    smallest_cosine,
    use_side_stream,
)
from torch import Tensor
from workers import run_jobs

PRODUCTS = "products"
"""Beside the settings, what is prepared of a row."""
NOTES = "prepared.jsonl"
"""In the folder: what is prepared."""


def measure_row(
    row: Row, arguments: argparse.Namespace, names: Sequence[str], known: Mapping[str, Any]
) -> None:
    """Print the block of one model, and keep it; ``known`` is what was prepared."""
    torch._dynamo.reset()
    gc.collect()
    case = Case(row, arguments)
    products = known.get(PRODUCTS) if arguments.cache else case.products()
    steps, seconds = {}, {name: [known.get(name, 0.0), 0.0] for name in names}
    with contextlib.ExitStack() as stack:
        folders = {
            n: folder_of(arguments, row, n) if arguments.cache else stack.enter_context(TemporaryDirectory())
            for n in names
        }
        for again in (0, 1) if arguments.compile_time else (1,):
            torch._dynamo.reset()
            for name in names:
                steps[name] = case.step(name)
                seconds[name][again] = compile_seconds(steps[name], folders[name])
    exact = case.gradients(steps[names[0]], steps[names[0]])
    kept: dict[str, dict[str, Any]] = {
        name: {
            "cosine": smallest_cosine(case.gradients(step, step), exact),
            "compile": seconds[name],
            "megabytes": memory_of(step).peak / 1e6,
        }
        for name, step in steps.items()
    }
    with alone(arguments.turns or arguments.cache):
        exact_products, iterated_products = products or ("?", "?")
        print(
            f"\n{row}: {case.flops / 1e6:.1f} MFLOP, weights {case.weights / 1e6:.2f} MB, "
            f"products in sequence {exact_products}, {K}: {iterated_products}"
        )
        for name, parts in launched(steps, arguments.repeats).items():
            kept[name] |= parts
        show(kept)
        if arguments.cuda_graphs:
            for name, found in replayed(case, steps, exact, arguments.repeats).items():
                kept[name] |= found
        if arguments.save:
            add_line(
                arguments.save,
                asdict(row)
                | {"device": arguments.device, "precision": arguments.precision, "flops": case.flops}
                | {"weights": case.weights, "products": products, "settings": kept},
            )


def launched(steps: Mapping[str, Step], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the parts of steps."""
    for _ in range(3):
        for step in steps.values():
            step()
    parts = "forward", "backward", "optimizer", "step"
    return {name: dict(zip(parts, ms, strict=True)) for name, ms in measure_parts(steps, repeats).items()}


def show(kept: Mapping[str, Mapping[str, Any]]) -> None:
    base = next(iter(kept.values()))
    for name, found in kept.items():
        print(
            f"  {name:14} forward {found['forward']:7.3f}  "
            f"backward {found['backward']:7.3f} ({base['backward'] / found['backward']:5.2f}x)  "
            f"optimizer {found['optimizer']:7.3f}  "
            f"step {found['step']:7.3f} ms ({base['step'] / found['step']:5.2f}x)  "
            f"cosine {found['cosine']:.4f}  "
            f"compile {found['compile'][0]:5.1f} / {found['compile'][1]:5.1f} s  "
            f"{found['megabytes']:6.1f} MB",
            flush=True,
        )


def replayed(
    case: Case, steps: Mapping[str, Step], exact: Sequence[Tensor], repeats: int
) -> dict[str, dict[str, float]]:
    """Print and return what the steps take in CUDA graphs, of those that can be captured."""
    made = captured(steps)
    cosines = {n: smallest_cosine(case.gradients(steps[n], replay), exact) for n, replay in made.items()}
    times = measure(made, repeats)
    base = times.get(next(iter(steps)), math.nan)
    for name, ms in times.items():
        figures = f"step {ms:7.3f} ms ({base / ms:5.2f}x)  cosine {cosines[name]:.4f}"
        print(f"  {name:14} in a CUDA graph: {figures}", flush=True)
    return {name: {"replay": ms, "replay_cosine": cosines[name]} for name, ms in times.items()}


def measure_prepared(arguments: argparse.Namespace, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Measure what the folder has of these rows; others load what is next while one process measures."""
    there = [row for row in rows if names[0] in prepared(arguments, row)]
    missing = {row: "not prepared" for row in rows if row not in there}
    one = partial(measure_one, arguments, names)
    for row, failure in run_jobs(one, there, arguments.jobs or 1, arguments.patience, arguments.seconds):
        if failure is not None:
            missing[row] = reason(failure)
    for row, why in missing.items():
        print(f"left out, {why}: {row}")


def reason(failure: BaseException) -> str:
    """Why a job has no result."""
    return "no time" if isinstance(failure, TimeoutError) else "failed"


def measure_one(arguments: argparse.Namespace, names: Sequence[str], row: Row) -> None:
    """In a process of its own."""
    begin(arguments)
    known = prepared(arguments, row)
    measure_row(row, arguments, [name for name in names if name in known], known)


def begin(arguments: argparse.Namespace) -> None:
    """Settle what a whole process measures with."""
    set_limits(arguments)
    if arguments.cuda_graphs:
        use_side_stream()
    compile_once()


def prepare(arguments: argparse.Namespace, jobs: Sequence[tuple[Row, str]]) -> None:
    """Do these jobs in parallel, and note in the folder what is done."""
    start, missing = time.perf_counter(), 0
    one, count = partial(prepare_one, arguments), arguments.jobs or os.cpu_count() or 1
    for (row, what), value in run_jobs(one, jobs, count, arguments.patience, arguments.seconds):
        failed = isinstance(value, BaseException)
        missing += failed
        said = reason(value) if failed else value if what == PRODUCTS else f"{value:.1f} s"
        print(f"{time.perf_counter() - start:6.1f} s  {row}, {what}: {said}", flush=True)
        if not failed:
            note = {"row": str(row), "what": what, "precision": arguments.precision, "value": value}
            add_line(arguments.cache / NOTES, note)
    print(f"{len(jobs) - missing} of {len(jobs)} in {time.perf_counter() - start:.1f} s", flush=True)


def prepare_one(arguments: argparse.Namespace, job: tuple[Row, str]) -> Any:
    """In a process of its own: the seconds that a setting takes to compile, or a row's products."""
    row, what = job
    begin(arguments)
    torch._dynamo.reset()
    case = Case(row, arguments)
    if what == PRODUCTS:
        return case.products()
    return compile_seconds(case.step(what), folder_of(arguments, row, what))


def folder_of(arguments: argparse.Namespace, row: Row, setting: str) -> Path:
    """Of the folder, what belongs to one setting of a row: what was compiled for others is of no use then."""
    if arguments.shared:
        return Path(arguments.cache)
    return Path(arguments.cache) / re.sub(r"\W+", "-", f"{row} {setting}")


def prepared(arguments: argparse.Namespace, row: Row) -> dict[str, Any]:
    """What the folder has of a row: seconds of each setting, and the products."""
    notes = arguments.cache / NOTES if arguments.cache else None
    mine = str(row), arguments.precision
    found = read_lines(notes) if notes and notes.exists() else []
    return {each["what"]: each["value"] for each in found if (each["row"], each["precision"]) == mine}


def arguments_of_command() -> argparse.Namespace:
    made = parser(__doc__, threads=2, repeats=50)
    add = made.add_argument
    add("--precision", choices=PRECISIONS, default="float32")
    add("--grid", choices=list(GRIDS), help="by default that of the device")
    add("--only", choices=list(FAMILIES), action="append", help="of the grid only these")
    add_row(made, action="append")
    add("--settings", nargs="*", choices=list(ALL), help="the first is what the others are compared with")
    add("--compile-time", action="store_true", help="compile with empty caches first")
    add("--cuda-graphs", action="store_true", help="also the whole step in a CUDA graph")
    add("--seconds", type=float, default=math.inf, help="leave out what takes longer than so many")
    add("--save", type=Path, metavar="FILE", help="append the results as JSON, a line a row")
    add("--cache", type=Path, metavar="FOLDER", help="measure what --prepare has compiled into it")
    add("--prepare", action="store_true", help="only compile, into the folder of --cache")
    add("--shared", action="store_true", help="all settings share the folder: quicker, but not compiled cold")
    add("--jobs", type=int, help="with --cache: processes; one by default, to prepare one per core")
    add("--patience", type=float, default=180, help="with --cache: seconds of one row, or setting to prepare")
    add_turns(made)
    add("--one", type=int, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.prepare and not arguments.cache:
        made.error("--prepare needs --cache")
    if arguments.cuda_graphs and arguments.device != "cuda":
        made.error("--cuda-graphs needs --device cuda")
    arguments.row = [row_of(made, values) for values in arguments.row or ()]
    return arguments


def main() -> None:
    start = time.perf_counter()
    arguments = arguments_of_command()
    grid = arguments.grid or arguments.device
    rows = arguments.row or [row for row in GRIDS[grid] if not arguments.only or row.family in arguments.only]
    names = arguments.settings or CHOSEN[grid]
    if arguments.cache:  # the processes have no pools of processes of their own
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if arguments.prepare:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        jobs = [(row, name) for row in rows for name in names] + [(row, PRODUCTS) for row in rows]
        prepare(arguments, [job for job in jobs if job[1] not in prepared(arguments, job[0])])
        return
    if arguments.one is not None:
        begin(arguments)
        measure_row(rows[arguments.one], arguments, names, {})
        return
    set_up(arguments)
    print(arguments.precision, flush=True)
    if arguments.cache:
        measure_prepared(arguments, rows, names)
        return
    for i, row in enumerate(rows):
        if time.perf_counter() - start > arguments.seconds:
            print(f"left out, no time: {row}", flush=True)
        else:
            subprocess.run([sys.executable, Path(__file__), *sys.argv[1:], "--one", str(i)], check=False)


if __name__ == "__main__":
    main()
