"""On a CUDA device: the same checks as on a CPU, on one family of each kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compare import exact, float64, highway, reference, relative_error, rewritten
from families import FAMILIES, Size
from reference import Settings
from scan_cells import CELLS
from small_models import compiled, grads, model, settled
from step_programs import STEP_CASES, arguments, of_library, run_steps
from test_scans import Model, data, gradients, loop
from test_scans import highway as scan_highway
from test_scans import reference as scan_reference
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from hwbp_compile import explain, monitor, stack_parameters, unstack_parameters
from hwbp_compile.errors import CannotRewrite
from hwbp_compile.recurrent.layer import recurrent_layer
from hwbp_compile.recurrent.step_triton import TritonRecurrence
from hwbp_compile.scan import linear_scan
from hwbp_compile.scan.naive import linear_scan_naive
from hwbp_compile.scan.states import states

pytestmark = pytest.mark.gpu

# Loops over nn.GRUCell and nn.LSTMCell are missing: their fused backward on CUDA is left exact.
ON_GPU = [
    "residual_mlp",
    "resnet",
    "pre_ln_transformer",
    "post_ln_transformer",
    "gated_loop",
    "encoder_decoder",
]


@pytest.mark.parametrize("family", ON_GPU)
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_families(family: str, codegen: str) -> None:
    torch.manual_seed(0)
    case = FAMILIES[family](Size(depth=5))
    tolerance = 1e-10 if codegen == "eager" else 1e-4
    case.model.cuda()
    case.inputs = tuple(i.cuda() for i in case.inputs)
    if codegen == "eager":
        float64(case)
    for iterations, expected in ((2, reference(case, Settings(2))), (max(case.blocks), exact(case))):
        found, records = highway(case, iterations=iterations, codegen=codegen)
        assert sorted(n for n, _ in rewritten(records)) == sorted(case.blocks)
        assert relative_error(found, expected) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", [300, 2100])  # walked through, and all tiles at once
def test_scan(dtype: torch.dtype, reverse: bool, rows: int) -> None:
    v, a = torch.randn(rows, 5, 7, device="cuda").to(dtype), torch.rand(rows, 1, 7, device="cuda").to(dtype)
    found = linear_scan(v, a, v[0], reverse)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    expected = linear_scan_naive(v, a, v[0], reverse)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if not reverse:
        torch.testing.assert_close(states(v[0], v, a), torch.cat([v[:1], found]))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_recurrent_modules(kind: str) -> None:
    module = getattr(nn, kind.upper())(3, 5, num_layers=2, bidirectional=True).cuda().double()
    x = torch.randn(12, 4, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    weights = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x)[0].square().sum(), weights)
    for iterations in (12, "exact"):
        options = {"iterations": iterations, "apply": "always", "group_size": 1, "codegen": "eager"}
        compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
        found = torch.autograd.grad(compiled(x)[0].square().sum(), weights)
        assert relative_error(list(found), list(expected)) <= 1e-10


def test_a_layer_gives_what_it_gives_on_a_cpu() -> None:
    module = nn.GRU(3, 5).double()
    x, h = torch.randn(12, 4, 3).double(), torch.randn(4, 5).double()
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.detach().to(device).requires_grad_() for t in (x, h, *module.parameters())]
        y, *_ = recurrent_layer(leaves[0], leaves[1:2], leaves[2:], "gru", 2)
        results.append([g.cpu() for g in torch.autograd.grad(y.square().sum(), leaves)])
    assert relative_error(*results) <= 1e-10


def test_records_come_though_the_backward_passes_are_late() -> None:
    m = model().cuda()
    c = compiled(m, apply="always", iterations=2)
    inputs = [torch.randn(5, 4, dtype=torch.float64, device="cuda") for _ in range(3)]
    losses = [c(x).square().sum() for x in inputs]
    for loss in reversed(losses):
        loss.backward()
    c(inputs[0])
    torch.cuda.synchronize()
    seen = monitor(m)
    assert [s.step for s in seen.history] == [0, 1, 2]
    assert all(0 < s.chains[0].estimate < 10 for s in seen.history)


def test_k_is_chosen_from_records_that_nothing_waited_for() -> None:
    m = settled().cuda()
    c = compiled(m, apply="always", iterations="auto")
    for _ in range(8):
        c(torch.randn(5, 4, dtype=torch.float64, device="cuda")).square().sum().backward()
        torch.cuda.synchronize()
    assert {s.iterations for s in monitor(m).history[-4:]} <= {1, 2, 3, 4}
    assert not monitor(m).history[-1].watched


@pytest.mark.parametrize("name", [*STEP_CASES, "gru 64", "lstm 128", "gru 256"])
@pytest.mark.parametrize(
    ("dtype", "exact_products", "tolerance"),
    [
        (torch.float64, True, 1e-11),
        (torch.float32, True, 1e-5),
        (torch.float32, False, 5e-3),
        (torch.bfloat16, True, 6e-2),
        (torch.float16, True, 1e-2),
    ],
)
def test_kernels_of_steps(name: str, dtype: torch.dtype, exact_products: bool, tolerance: float) -> None:
    """Against torch in the same precision, or in float64, step after step."""
    kind, _, width = name.partition(" ")
    case = STEP_CASES.get(name) or of_library(kind, int(width))
    for program, reverse in case.programs(dtype, "cuda"):
        reason = ""
        try:
            kernel = TritonRecurrence(
                program, dtype, reverse=reverse, exact_products=exact_products, device=torch.device("cuda")
            )
        except CannotRewrite as refusal:
            reason = refusal.reason
        if reason:
            assert "float64" in reason
            pytest.skip(reason)
        for steps, batch in ((7, 5), (1, 1), (3, 33)):
            given = arguments(program, steps, batch, "cuda")
            poisoned = torch.full((1 << 20,), float("nan"), device="cuda")
            del poisoned  # what is not written shows
            found = kernel(*given)
            expected = run_steps(program, given, batch, reverse=reverse)
            for a, b in zip(found, expected, strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert relative_error([a.double()], [b.double()]) <= tolerance


@pytest.mark.parametrize("name", CELLS)
def test_cells_of_scans(name: str) -> None:
    model = Model(CELLS[name]).cuda()
    inputs = [t.detach().cuda().requires_grad_() for t in data(model.cell, 6, 5)]
    expected = gradients(model, lambda *a: model(*a, over_time=loop), inputs)
    for iterations in (6, "exact"):
        found = scan_highway(model, inputs, iterations=iterations)
        assert relative_error(found, expected) <= 1e-10
    splits = {"group_size": 2, "gamma": 0.2}
    found = scan_highway(model, inputs, iterations=1, **splits)
    assert relative_error(found, scan_reference(model, inputs, Settings(1, **splits))) <= 1e-10


@pytest.mark.parametrize(("kind", "hidden"), [("gru", 64), ("lstm", 64), ("gru", 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrent_modules_under_inductor(kind: str, hidden: int, dtype: torch.dtype) -> None:
    """Against float64, as is torch's own layer."""
    module = getattr(nn, kind.upper())(8, hidden).cuda()
    x = torch.randn(50, 4, 8, device="cuda")
    doubled = getattr(nn, kind.upper())(8, hidden).cuda().double()
    module.to(dtype)
    doubled.load_state_dict(module.state_dict())

    def found(m: nn.Module, run: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        wanted = [leaf, *m.parameters()]
        return [g.double() for g in torch.autograd.grad(run(leaf)[0].double().sin().sum(), wanted)]

    expected = found(doubled, doubled, x.to(dtype).double())
    library = relative_error(found(module, module, x.to(dtype)), expected)
    for iterations in (50, "exact"):
        options = {"iterations": iterations, "apply": "always", "group_size": 1}
        compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
        ours = relative_error(found(module, compiled, x.to(dtype)), expected)
        assert ours <= max(1.5 * library, 1e-4)


def test_a_wide_cell_runs_in_a_loop() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of_h, self.of_x = nn.Linear(700, 700), nn.Linear(4, 700)

        def forward(self, x: torch.Tensor, over_time: object = None) -> torch.Tensor:
            def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                h = 0.5 * h + torch.tanh(self.of_h(h) + self.of_x(x))
                return h, h.clone()

            from torch._higher_order_ops.scan import scan

            return (over_time or scan)(step, x.new_zeros(x.shape[1], 700), x)[1]

    model = Wide().cuda().double()
    x = torch.randn(4, 3, 4, device="cuda", dtype=torch.float64)
    expected = gradients(model, lambda x: model(x, over_time=loop).sin().sum(), [x.requires_grad_()])
    torch._dynamo.reset()
    options = {"iterations": "exact", "apply": "always", "codegen": "eager"}
    compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
    found = gradients(model, lambda x: compiled(x).sin().sum(), [x])
    assert relative_error(found, expected) <= 1e-10
    (record,) = explain(model, x, options=options).chains
    assert "its steps run in a loop of torch's operators" in record.notes[0]


def test_a_step_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    m = model().cuda()
    c = compiled(m, apply="always", iterations=2)
    x = torch.randn(5, 4, dtype=torch.float64, device="cuda")

    def step() -> None:
        m.zero_grad()
        c(x).square().sum().backward()

    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        expected = [p.grad.clone() for p in m.parameters() if p.grad is not None]
        m.zero_grad()
    with torch.cuda.graph(graph, stream=stream):
        step()
    found = [p.grad for p in m.parameters() if p.grad is not None]
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("options", [{"apply": "never"}, {"apply": "always", "iterations": 2}])
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_stacked_parameters(options: dict[str, Any], codegen: str) -> None:
    torch.manual_seed(0)
    m, x = model(8).cuda(), torch.randn(5, 4, dtype=torch.float64, device="cuda")
    expected = grads(m, compiled(m, **options), x)
    m.zero_grad()
    stack_parameters(m)
    compiled(m, codegen=codegen, **options)(x).square().sum().backward()
    unstack_parameters(m)
    assert relative_error([p.grad for p in m.parameters() if p.grad is not None], expected) <= 1e-10


@pytest.mark.parametrize("stacked", [False, True])
def test_autocast(stacked: bool) -> None:
    """Against plain torch under autocast."""
    torch.manual_seed(0)
    case = FAMILIES["pre_ln_transformer"](Size(depth=5))
    m, inputs = case.model.cuda(), [i.cuda() for i in case.inputs]

    def found(forward: Any) -> list[torch.Tensor]:
        m.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = forward(*inputs)
        y.double().sin().sum().backward()
        plain = copy.deepcopy(m)
        for own, p in zip(plain.parameters(), m.parameters(), strict=True):
            own.grad = p.grad
        if stacked:
            unstack_parameters(plain)
        return [p.grad.double() for p in plain.parameters() if p.grad is not None]

    plain = found(m)
    if stacked:
        stack_parameters(m)
    ours = found(compiled(m, codegen="inductor", apply="always", iterations=max(case.blocks)))
    assert relative_error(ours, plain) <= 5e-2


@pytest.mark.parametrize("options", [{"apply": "always", "iterations": 2}, {"apply": "always"}])
def test_mode_with_cuda_graphs(options: dict[str, Any]) -> None:
    """Nothing is left out of the graphs or recorded anew each step, and the records of k still come."""
    torch._dynamo.reset()
    counters.clear()
    m = settled().cuda()
    same = copy.deepcopy(m)
    plain = compiled(same, **{"iterations": 2} | options)
    c = compiled(m, **{"codegen": "inductor", "triton.cudagraphs": True, "iterations": "auto"} | options)
    steps = 16
    for _ in range(steps):
        x = torch.randn(5, 4, dtype=torch.float64, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        found = grads(m, c, x)
        if "iterations" in options:
            assert relative_error(found, grads(same, plain, x)) <= 1e-10
        torch.cuda.synchronize()
    assert counters["inductor"]["cudagraph_skips"] == 0
    from torch._inductor.cudagraph_trees import get_manager

    assert get_manager(0).new_graph_id().id <= 8
    seen = monitor(m).history
    assert len(seen) == steps
    assert all(s.chains and 0 < s.chains[0].estimate < 10 for s in seen[2 : steps - 1])
    if "iterations" not in options:
        assert not seen[-1].watched


def test_k_is_chosen_in_a_checkpoint() -> None:
    m = settled().cuda()
    c = compiled(m, iterations="auto", apply="always")
    x = torch.randn(5, 4, dtype=torch.float64, device="cuda")
    for _ in range(16):
        found = grads(m, lambda x: checkpoint(c, x, use_reentrant=False), x)
        torch.cuda.synchronize()
    seen = monitor(m).history
    assert [s.step for s in seen] == list(range(16))
    last = seen[-1]
    assert not last.watched
    torch._dynamo.reset()
    same = compiled(m, iterations=last.iterations, apply="always")
    assert relative_error(found, grads(m, same, x)) <= 1e-10
