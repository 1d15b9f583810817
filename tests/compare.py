"""Run a case with exact, reference and highway gradients, and compare."""

from __future__ import annotations

import cProfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from families import Case
from reference import Settings, plain_run, reference_run
from torch import Tensor
from torch.fx import Graph

import hwbp_compile.backend
from hwbp_compile import _compat
from hwbp_compile.passes.pipeline import Record


def gradients(case: Case, forward: Callable[..., Tensor], weight: Tensor | None = None) -> list[Tensor]:
    """Gradients of all parameters and inputs of a fixed, non-linear function of the output."""
    for p in case.model.parameters():
        p.grad = None
    inputs = [i.detach().clone().requires_grad_() if i.is_floating_point() else i for i in case.inputs]
    out = forward(*inputs)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    (out * direction + 0.5 * out.square()).sum().backward()
    values = [i for i in inputs if i.requires_grad] + list(case.model.parameters())
    return [torch.zeros_like(v) if v.grad is None else v.grad.clone() for v in values]


def exact(case: Case) -> list[Tensor]:
    case.model.run = plain_run
    return gradients(case, case.model)


def reference(case: Case, settings: Settings) -> list[Tensor]:
    case.model.run = reference_run(settings)
    try:
        return gradients(case, case.model)
    finally:
        case.model.run = plain_run


@contextmanager
def recorded() -> Iterator[list[Record]]:
    """Collect what the passes did while the context lasts."""
    records: list[Record] = []
    original = hwbp_compile.backend.rewrite

    def rewrite(*args: Any, **kwargs: Any) -> Record:
        records.append(original(*args, **kwargs))
        return records[-1]

    with mock.patch.object(hwbp_compile.backend, "rewrite", rewrite):
        yield records


@contextmanager
def joint_graphs() -> Iterator[list[Graph]]:
    """Collect the joint graphs as they are compiled while the context lasts."""
    graphs: list[Graph] = []
    original = hwbp_compile.backend.HighwayPass.__call__

    def call(self: hwbp_compile.backend.HighwayPass, graph: Graph) -> None:
        original(self, graph)
        graphs.append(_compat.copy_graph(graph))

    with mock.patch.object(hwbp_compile.backend.HighwayPass, "__call__", call):
        yield graphs


@contextmanager
def kept_beside(*given: Tensor) -> Iterator[dict[int, Tensor]]:
    """Collect, by address, what autograd keeps for the backward pass, but what is ``given``."""
    known = {tensor.data_ptr() for tensor in given}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """How many functions are called by the passes, for each graph that is rewritten."""
    calls: list[int] = []
    original = hwbp_compile.backend.rewrite

    def counted(*args: Any, **kwargs: Any) -> Record:
        profile = cProfile.Profile()
        result = profile.runcall(original, *args, **kwargs)
        calls.append(sum(entry.callcount for entry in profile.getstats()))
        return result

    with mock.patch.object(hwbp_compile.backend, "rewrite", counted):
        yield calls


def highway(case: Case, **options: Any) -> tuple[list[Tensor], list[Record]]:
    torch._dynamo.reset()
    options = {"codegen": "eager", "min_blocks": 2} | options
    compiled = torch.compile(case.model, backend="highway", options=options, fullgraph=True)
    # With a warm cache the passes do not run, and nothing is recorded.
    with recorded() as records, torch._inductor.config.patch(force_disable_caches=True):
        return gradients(case, compiled), records


def rewritten(records: list[Record]) -> list[tuple[int, str]]:
    """Length and kind of each chain that was rewritten."""
    return [
        (len(o.found.blocks), o.found.residual) for r in records for o in r.outcomes if o.schedule is not None
    ]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of any one gradient; a gradient that must be zero counts absolutely."""
    assert len(found) == len(expected)
    scale = max(float(e.norm()) for e in expected)
    return max(
        float((f - e).norm()) / max(float(e.norm()), 1e-3 * scale)
        for f, e in zip(found, expected, strict=True)
    )


def float64(case: Case) -> Case:
    """The case in double precision, in place."""
    case.model.double()
    case.inputs = tuple(i.double() if i.is_floating_point() else i for i in case.inputs)
    return case
