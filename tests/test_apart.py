"""Rows of stacked parameters that are copied, so that equal layers share their kernels."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from compare import relative_error
from small_models import compiled, grads, model
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph

from hwbp_compile import _compat, stack_parameters, unstack_parameters
from hwbp_compile.backend import HighwayPass
from hwbp_compile.passes.linear_ops import op_name

BLOCKS = 6
SETTINGS: list[dict[str, Any]] = [{"apply": "never"}, {"apply": "always", "iterations": 2}]


def graph_of(m: nn.Module, x: Tensor, **options: Any) -> Graph:
    """The joint graph as it is compiled."""
    seen: list[Graph] = []
    original = HighwayPass.__call__

    def call(self: HighwayPass, graph: Graph) -> None:
        original(self, graph)
        seen.append(_compat.copy_graph(graph))

    with mock.patch.object(HighwayPass, "__call__", call):
        compiled(m, **options)(x).square().sum().backward()
    (graph,) = seen
    return graph


def named(graph: Graph, name: str) -> list[torch.fx.Node]:
    """The operators of this name that read an input."""
    calls = [n for n in graph.nodes if n.op == "call_function" and op_name(n) == name]
    return [n for n in calls if n.all_input_nodes[0].op == "placeholder"]


@pytest.mark.parametrize("options", SETTINGS)
def test_norms_read_copies(options: dict[str, Any]) -> None:
    """Their weights and biases, in the forward pass, and with exact backpropagation the weights in both."""
    m, x = model(BLOCKS), torch.randn(5, 4, dtype=torch.float64)
    expected = grads(m, compiled(m, **options), x)
    m.zero_grad()
    stack_parameters(m)
    graph = graph_of(m, x, **options)
    apart = named(graph, "hwbp_compile::rows")
    late = [n for n in apart if n.meta.get("partitioner_tag") == "must_be_in_backward"]
    assert (len(apart), len(late)) == ((3, 1) if options["apply"] == "never" else (2, 0))
    norms, rows = {n.all_input_nodes[0] for n in apart}, named(graph, "aten::select")
    assert not any(n.all_input_nodes[0] in norms for n in rows)
    assert len(rows) == 4 * BLOCKS, "weights and biases of products stay where they are"
    unstack_parameters(m)
    found = [p.grad for p in m.parameters() if p.grad is not None]
    assert relative_error(found, expected) <= 1e-10


@pytest.mark.slow
def test_equal_layers_share_their_kernels() -> None:
    counts = []
    for depth in (BLOCKS, 2 * BLOCKS):
        torch._dynamo.reset()
        m = model(depth)
        stack_parameters(m)
        c = compiled(m, codegen="inductor", apply="never")
        with torch._inductor.config.patch(force_disable_caches=True):
            _, code = run_and_get_code(lambda m=m, c=c: grads(m, c, torch.randn(5, 4, dtype=torch.float64)))
        counts.append(sorted(text.count("async_compile.cpp_pybinding(") for text in code))
    assert counts[0] == counts[1]
    assert all(counts[0])


class Rows(nn.Module):
    """Reads rows of one tensor, from both ends."""

    def __init__(self, rows: Tensor, learned: bool) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows) if learned else rows

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, -1, 1, -2, 1):
            x = (x * self.rows[i].unsqueeze(0)).sin()
        return x


@pytest.mark.parametrize(
    ("rows", "learned", "copied"),
    [
        (torch.randn(5, 3), True, True),
        (torch.randn(5, 3), False, True),
        (torch.randn(3, 5).T, True, False),
        (torch.ones(5, 3, dtype=torch.int64), False, False),
        (torch.randn(5, 1 << 13), True, False),
        (torch.randn(3, 3), True, False),
    ],
    ids=["parameter", "constant", "strided", "integers", "large", "few"],
)
def test_what_is_copied(rows: Tensor, learned: bool, copied: bool) -> None:
    m, x = Rows(rows, learned), torch.randn(2, rows.shape[1], requires_grad=True)
    (expected,) = torch.autograd.grad(m(x).sum(), x)
    graph = graph_of(m, x, apply="never")
    assert bool(named(graph, "hwbp_compile::rows")) is copied
    torch._dynamo.reset()
    (found,) = torch.autograd.grad(compiled(m, apply="never")(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_the_operator() -> None:
    for stack in (torch.randn(4, 3), torch.randn(3, 4, dtype=torch.bfloat16).T, torch.randn(2, 3, 5)):
        rows = torch.ops.hwbp_compile.rows(stack)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(rows, stack, strict=True))
        assert len({r.untyped_storage().data_ptr() for r in rows} | {stack.data_ptr()}) == len(rows) + 1
        torch.library.opcheck(torch.ops.hwbp_compile.rows.default, (stack,))
