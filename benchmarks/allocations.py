"""What a training step allocates, to the byte: its peak, and what its forward pass keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measuring import Step
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.profiler._utils import traverse_dfs

_STOP = "end of a part"


@dataclass(frozen=True)
class Part:
    """Bytes allocated beyond those at the beginning: at most during one part of the work, and at its end."""

    peak: int
    end: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a step allocates beyond those in use before it."""

    peak: int
    kept: int
    """When the forward pass is done: what it saved for the backward pass, its result and the loss."""


def memory_of(step: Step) -> Memory:
    """What one step allocates; gradients of the step before it are freed first."""
    stages = step.stages()
    next(stages)
    parts = allocated(stages, step.device)
    return Memory(max(part.peak for part in parts), parts[0].end)


def allocated(parts: Iterator[None], device: torch.device) -> list[Part]:
    """Do some work that stops after each of its parts, and tell what each allocated.

    On CPUs it is what torch's allocator hands out and takes back, as its profiler sees it: operators' results
    and scratch, buffers of generated code, and what autograd keeps. Not seen is what libraries such as oneDNN
    allocate for themselves, and what other threads allocate inside of an operator. What was allocated before
    counts as being there to the end.
    """
    return _of_cuda(parts, device) if device.type == "cuda" else _of_cpu(parts)


def _of_cuda(parts: Iterator[None], device: torch.device) -> list[Part]:
    found: list[Part] = []
    before = torch.cuda.memory_allocated(device)
    while True:
        torch.cuda.reset_peak_memory_stats(device)
        if next(parts, _STOP) is _STOP:
            return found
        torch.cuda.synchronize(device)
        peak, end = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        found.append(Part(peak - before, end - before))


def _of_cpu(parts: Iterator[None]) -> list[Part]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in parts:
            with record_function(_STOP):
                pass
    results = profiler.profiler
    assert results is not None
    events = list(traverse_dfs(results.kineto_results.experimental_event_tree()))
    return _parts_of(sorted(events, key=lambda event: event.start_time_ns))


def _parts_of(events: list[Any]) -> list[Part]:
    """From the profiler's events in the order of time."""
    found: list[Part] = []
    live: dict[int, int] = {}
    total = peak = 0
    for event in events:
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            if fields.alloc_size >= 0:
                live[fields.ptr] = fields.alloc_size
                total += fields.alloc_size
            else:
                total -= live.pop(fields.ptr, 0)
            peak = max(peak, total)
        elif event.name == _STOP:
            found.append(Part(peak, total))
            peak = total
    return found
