"""How fast this machine is: what products, memory and calls take, measured when first asked for."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch

BUDGET = 2e9
"""Floating-point operations of one measurement."""
_LONG_ENOUGH = 2e-2
"""Seconds after which a measurement is not repeated any more."""


@functools.lru_cache(maxsize=1024)
def product_rate(
    rows: int,
    inner: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    batch: int = 1,
) -> float:
    """FLOPs a second of ``[batch, rows, inner] @ [batch, inner, columns]``, on a part if that is large.

    Without ``batch``, of matrices.
    """
    share = min(1.0, BUDGET / (2 * batch * rows * inner * columns))
    if batch > 1:
        batch = max(int(batch * share), 1)
    elif rows > inner:
        rows = max(int(rows * share), 1)
    else:
        inner = max(int(inner * share), 1)
    many = (batch,) if batch > 1 else ()
    a = torch.full((*many, rows, inner), 0.01, dtype=dtype, device=device)
    b = torch.full((*many, inner, columns), 0.01, dtype=dtype, device=device)
    return 2 * batch * rows * inner * columns / best(lambda: a @ b, device)


@functools.lru_cache(maxsize=1024)
def bandwidth(device: torch.device, threads: int, size: int, fresh: bool = True) -> float:
    """Bytes a second of elementwise operators that make tensors of about this size in bytes.

    Args:
        fresh: whether these are tensors that were not in use just now, which takes longer.
    """
    n = max(min(size, 1 << 25) // 4, 1 << 12)
    a = torch.full((n,), 0.01, device=device)
    if fresh:
        return 4 * 3 * 4 * n / best(lambda: [a + a for _ in range(4)], device)
    out = [torch.empty_like(a) for _ in range(4)]
    return 4 * 3 * 4 * n / best(lambda: [torch.add(a, a, out=each) for each in out], device)


@functools.lru_cache(maxsize=16)
def operator_seconds(device: torch.device, threads: int) -> float:
    """What it takes to call an operator that has next to nothing to do."""
    a = torch.full((16,), 0.01, device=device)

    def several() -> None:
        for _ in range(20):
            torch.add(a, a)

    return best(several, device) / 20


def best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs: at least four, more if they are short."""
    found, spent, runs = math.inf, 0.0, 0
    with torch.no_grad():
        while runs < 4 or (spent < _LONG_ENOUGH and runs < 100):
            start = now(device)
            run()
            seconds = now(device) - start
            found, spent, runs = min(found, seconds), spent + seconds, runs + 1
    return max(found, 1e-9)


def now(device: torch.device) -> float:
    """The time, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
