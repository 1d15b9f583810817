"""How fast this machine is: what products, memory and calls take, measured when first asked for.

Whatever is changed in this file, all rates are measured anew.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from .remembered import Found, Rate

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

_BUDGET = 2e9
"""Floating-point operations of one measurement on a CPU."""
_ROOM = 1 << 26
"""Bytes of all tensors of one measurement."""
_LONG_ENOUGH = 2e-2
"""Seconds after which a measurement is not repeated any more."""
_PATIENCE = 0.1
"""Seconds after which disturbed runs are not repeated any more."""
_SLICE = 5e-2
"""One interruption in so many seconds does not count as a disturbance."""


def _budget(device: torch.device) -> float:
    """Floating-point operations of one measurement."""
    return _BUDGET if device.type == "cpu" else 100 * _BUDGET


@Rate
def product_rate(
    rows: int,
    inner: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    batch: int = 1,
    turns: int = 1,
) -> Found:
    """FLOPs a second of ``[batch, rows, inner] @ [batch, inner, columns]``, on a part if that is large.

    Args:
        batch: 1 for matrices.
        turns: so many products of these sizes follow one another, each of other tensors. Where these are more
            than a cache holds, they have to come from memory.
    """
    share = min(1.0, _budget(device) / (2 * batch * rows * inner * columns))
    if batch > 1:
        batch = max(int(batch * share), 1)
    elif rows > inner:
        rows = max(int(rows * share), 1)
    else:
        inner = max(int(inner * share), 1)
    many = (batch,) if batch > 1 else ()
    size = batch * (rows * inner + inner * columns + rows * columns) * dtype.itemsize
    turns = max(min(turns, _ROOM // size), 1)
    pairs = [
        (
            torch.full((*many, rows, inner), 0.01, dtype=dtype, device=device),
            torch.full((*many, inner, columns), 0.01, dtype=dtype, device=device),
        )
        for _ in range(turns)
    ]
    return _per_second(
        turns * 2 * batch * rows * inner * columns, best(lambda: [a @ b for a, b in pairs], device)
    )


@Rate
def bandwidth(device: torch.device, threads: int, size: int, fresh: bool = True) -> Found:
    """Bytes a second of elementwise operators that make tensors of about this size in bytes.

    Args:
        fresh: whether these are tensors that were not in use just now, which takes longer.
    """
    n = max(min(size, 1 << 25) // 4, 1 << 12)
    a = torch.full((n,), 0.01, device=device)
    if fresh:
        # Once in a while there is memory at hand, which says nothing of the other times.
        return _per_second(4 * 3 * 4 * n, best(lambda: [a + a for _ in range(4)], device, usual=True))
    out = [torch.empty_like(a) for _ in range(4)]
    return _per_second(4 * 3 * 4 * n, best(lambda: [torch.add(a, a, out=each) for each in out], device))


@Rate
def operator_seconds(device: torch.device, threads: int) -> Found:
    """What it takes to call an operator that has next to nothing to do."""
    a = torch.full((16,), 0.01, device=device)

    def several() -> None:
        for _ in range(20):
            torch.add(a, a)

    found = best(several, device)
    return Found(found.value / 20, found.certain)


def _per_second(amount: int, time: Found) -> Found:
    return Found(amount / time.value, time.certain)


def best(run: Callable[[], object], device: torch.device, *, usual: bool = False) -> Found:
    """Seconds of the fastest of some runs, or of a usual one: at least four, more if they are short.

    Where the threads of an operator wait for each other, and one of them for another program, a small one
    takes a thousand times as long. Such runs do not count, as long as there is patience. Where there are any,
    one thread measures too, which waits for nobody.
    """
    seconds, certain, quiet = _fastest(run, device, usual)
    threads = torch.get_num_threads()
    if not quiet and threads > 1 and device.type == "cpu":
        torch.set_num_threads(1)
        try:
            alone, _, _ = _fastest(run, device, usual)
        finally:
            torch.set_num_threads(threads)
        if alone < seconds:
            seconds, certain = alone, False
    return Found(max(seconds, 1e-9), certain)


def _fastest(run: Callable[[], object], device: torch.device, usual: bool) -> tuple[float, bool, bool]:
    """Seconds of the fastest or a usual run, whether an undisturbed one was as fast, whether all were so."""
    all_: list[float] = []
    clean: list[float] = []
    spent, quiet = 0.0, True
    begun = now(device)
    with torch.no_grad():
        while len(clean) < 4 or (spent < _LONG_ENOUGH and len(clean) < 100):
            before = _interruptions()
            start = now(device)
            run()
            end = now(device)
            all_.append(end - start)
            if _interruptions() - before <= (end - start) // _SLICE:
                clean.append(end - start)
                spent += end - start
                continue
            quiet = False
            if end - begun > _PATIENCE:
                break
    if usual:
        return statistics.median(clean or all_), len(clean) > 1, quiet
    return min(all_), min(clean, default=math.inf) <= 1.1 * min(all_), quiet


def _interruptions() -> int:
    """How often this process had to leave a core to another; always 0 where that is not told."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def now(device: torch.device) -> float:
    """The time, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
