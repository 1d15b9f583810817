"""``explain``: what it says."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from explained_models import SHORT, Block, Breaking, BreakingInLoop, Inlined, Mlp, Transformer, inputs, resnet
from torch import Tensor, nn

import hwbp_compile.backend as backend_module
from hwbp_compile import OptionError, Options, explain
from hwbp_compile.passes import kernels, worth
from hwbp_compile.passes.pipeline import Record
from hwbp_compile.passes.record import new_records
from hwbp_compile.report.capture import capture
from hwbp_compile.report.explain import explain_capture
from hwbp_compile.report.explanation import ChainReport, Explanation
from hwbp_compile.report.where import Names


@functools.cache
def standard() -> Explanation:
    """The explanation that several tests look at."""
    return explain(Mlp(), inputs(), options={"iterations": 2, "gamma": 0.5})


def test_a_chain_is_described() -> None:
    explanation = standard()
    (chain,) = explanation.chains
    assert (chain.blocks, chain.classes, chain.residual) == (4, (4,), "identity")
    assert (chain.shape, chain.dtype) == ((4, 8), "float32")
    assert chain.modules == tuple(f"h.{i}" for i in range(4))
    code = Block.forward.__code__
    assert chain.lines == (f"{code.co_filename}:{code.co_firstlineno + 1}",)
    assert (chain.applied, chain.reason, chain.iterations) == (True, "", 2)
    assert chain.new_nodes > 0
    assert chain.options.gamma == 0.5
    (graph,) = explanation.graphs
    assert graph.depth_before == 2 * 4 + 2, "two products a block, one in the head, one weight's gradient"
    assert graph.depth_after < graph.depth_before
    assert set(graph.seconds) >= {"find", "trace", "insert"}
    assert not explanation.notes


def test_the_report_is_what_compilation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Transformer(), torch.randn(2, 4, 8)
    records: list[Record] = []
    monkeypatch.setattr(backend_module, "log_record", lambda record, graph: records.append(record))
    options = {"iterations": 3, "codegen": "eager"}
    torch.compile(model, backend="highway", options=options)(x)
    (outcome,) = (o for record in records for o in record.outcomes)
    (chain,) = explain(model, x, options=options).chains
    assert (chain.blocks, chain.new_nodes) == (len(outcome.found.blocks), len(outcome.new))


def test_two_blocks_a_layer() -> None:
    explanation = explain(Transformer(), torch.randn(2, 4, 8), options=SHORT)
    (chain,) = explanation.chains
    assert chain.modules == tuple(f"layers.{i}.{part}" for i in range(2) for part in ("attn", "mlp"))
    assert chain.classes == (2, 2)
    text = str(explanation)
    assert "layers.0 ... layers.1 (attn, mlp)" in text
    assert "2 kinds of blocks (2, 2 of each)" in text


def test_residual_code_in_the_models_own_forward() -> None:
    (chain,) = explain(Inlined(), inputs(), options=SHORT).chains
    assert chain.modules == tuple(f"up.{i}" for i in range(5))


@pytest.mark.parametrize(("stride", "reason"), [(2, "shape change"), (1, "mixing shortcut")])
def test_a_block_between_two_chains(stride: int, reason: str) -> None:
    explanation = explain(resnet(stride), torch.randn(2, 3, 8, 8), options=SHORT)
    first, between, second = explanation.chains
    assert (first.modules, first.applied) == (("1", "2", "3", "4"), True)
    assert (between.modules, between.applied) == (("5",), False)
    assert between.reason.startswith(reason)
    assert (second.modules, second.applied) == (("6", "7", "8", "9"), True)
    assert first.residual == "mask"
    assert "2 of 2 residual chains are rewritten" in str(explanation)


def test_too_short() -> None:
    explanation = explain(Mlp(blocks=3), inputs())
    (chain,) = explanation.chains
    assert (chain.applied, chain.iterations, chain.new_nodes) == (False, None, 0)
    assert chain.reason.startswith("too short: 3 blocks")
    assert chain.reason in str(explanation)
    assert explanation.graphs[0].depth_after == explanation.graphs[0].depth_before


def test_an_operator_that_is_not_known_to_be_linear_is_named() -> None:
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.sign()

    class OddBlock(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + Odd.apply(self.up(x))[:, :8] @ self.down.weight[:, :8]

    explanation = explain(nn.Sequential(nn.Linear(8, 8), *(OddBlock(8) for _ in range(5))), inputs())
    assert explanation.chains
    assert not any(c.applied for c in explanation.chains)
    assert all("aten.sign" in c.reason for c in explanation.chains)


def test_more_iterations_than_blocks() -> None:
    captured = capture(Mlp(), [inputs()], {}, Options())

    def chain(**options: Any) -> ChainReport:
        return explain_capture(captured, Options(**options), Names(), []).chains[0]

    assert chain(iterations=9).iterations == 4
    assert "exact, but costs more" in chain(iterations=9).notes[0]
    assert chain(iterations=2, group_size=2).iterations == 2
    assert "2 groups of 2 blocks" in chain(iterations=2, group_size=2).notes[0]
    assert chain(iterations=3).notes == ()
    assert chain(iterations=3, exact_tail=1).notes != ()
    assert chain(iterations="exact").reason.startswith('iterations="exact"')


def test_no_residual_connection() -> None:
    explanation = explain(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), inputs())
    assert explanation.chains == ()
    assert explanation.notes == ("no residual connection found",)


def test_no_gradient_needed() -> None:
    frozen = explain(Mlp().requires_grad_(False), inputs())
    assert frozen.chains == ()
    assert [n for n in frozen.notes if n.startswith("no gradient needed") and "requires a gradient" in n]
    with torch.no_grad():
        disabled = explain(Mlp(), inputs())
    assert [n for n in disabled.notes if n.startswith("no gradient needed") and "disabled" in n]
    assert explain(Mlp().eval(), inputs()).chains[0].applied


def test_a_graph_break_and_its_line() -> None:
    explanation = explain(Breaking(blocks=6), inputs(), options=SHORT)
    short, long = explanation.chains
    assert short.modules == ("h.0", "h.1")
    assert "too short: 2 blocks" in short.reason
    assert "graph break" in short.reason
    assert (long.modules, long.applied) == (tuple(f"h.{i}" for i in range(2, 6)), True)
    assert (short.graph, long.graph) == (0, 1)
    line = Breaking.forward.__code__.co_firstlineno + 2
    (note,) = explanation.notes
    assert note.startswith("graph break: ")
    assert f"explained_models.py:{line}" in note
    assert explanation.graphs[0].graph_break
    assert not explanation.graphs[1].graph_break


def test_a_frame_that_runs_for_every_block_is_told_once() -> None:
    explanation = explain(BreakingInLoop(), inputs().requires_grad_())
    (chain,) = explanation.chains
    assert chain.modules == ("h.0",)
    assert explanation.graphs[0].calls == 4
    assert any("graph break" in n for n in explanation.notes)


@pytest.mark.parametrize("apply", ["never", "always"])
def test_saved_tensors_are_those_that_autograd_keeps(apply: str) -> None:
    model, x = Mlp(), inputs()
    options = {"iterations": 2, "apply": apply, "codegen": "eager"}
    (graph,) = explain(model, x, options=options | {"apply": "always"}).graphs
    expected = graph.saved_before if apply == "never" else graph.saved_after
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    compiled = torch.compile(model, backend="highway", options=options)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(x)
    if apply == "always":  # memory for what the iterations record
        kept.remove(new_records(torch.device("cpu"), False).nbytes)
    assert sorted(kept) == sorted(tensor.bytes for tensor in expected)
    assert f"saved for it {len(graph.saved_before)} tensors of " in str(
        explain(model, x, options=options | {"apply": "always"})
    )


@pytest.mark.measured
def test_costs_are_told_where_they_were_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "prefers_kernels", lambda: False)
    monkeypatch.setattr(worth, "operator_seconds", lambda *_: 1e-30)
    monkeypatch.setattr(worth, "product_rate", lambda *_: 1e6)
    monkeypatch.setattr(worth, "bandwidth", lambda *_, **__: 1e30)
    model, x = Mlp(), inputs()
    assert explain(model, x, options={"iterations": 2, "apply": "always"}).chains[0].costs is None
    explanation = explain(model, x, options={"iterations": 2, "apply": "auto"})
    (chain,) = explanation.chains
    assert chain.costs is not None
    exact, iterated = chain.costs
    assert exact.seconds == pytest.approx(int(exact.flops) / 1e6)
    assert not chain.applied
    assert exact.depth > iterated.depth
    text = " ".join(str(explanation).split())
    assert f"expected to be {exact.seconds / iterated.seconds:.2f}x as fast" in text
    assert f"{int(exact.flops) / 1e3:.3g} kFLOP in {exact.products} products" in text
    json.dumps(explanation.to_dict())


def test_the_graphs_as_text() -> None:
    explanation = standard()
    (before,), (after,) = explanation.before, explanation.after
    assert "tangents_1" in before
    assert "aten.bmm" in after
    assert "aten.bmm" not in before


def test_json() -> None:
    explanation = standard()
    told = explanation.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["chains"][0]["modules"] == list(explanation.chains[0].modules)
    assert told["graphs"][0]["depth_after"] == explanation.graphs[0].depth_after


def test_a_dynamic_shape_is_json_too() -> None:
    compiled = torch.compile(Mlp(blocks=2), backend="highway", dynamic=True)
    explanation = explain(compiled, inputs())
    (chain,) = explanation.chains
    assert isinstance(chain.shape[0], str)
    assert chain.shape[1] == 8
    json.dumps(explanation.to_dict())


def test_a_wrong_option_is_refused_before_the_model_runs() -> None:
    def model(x: Tensor) -> Tensor:
        raise AssertionError("the model must not run")

    with pytest.raises(OptionError, match="iterations"):
        explain(model, inputs(), options={"iteration": 2})


def test_keyword_arguments_and_functions() -> None:
    model = Mlp()

    def loss(x: Tensor, *, scale: float) -> Tensor:
        return model(x).square().sum() * scale

    (chain,) = explain(loss, inputs(), scale=2.0).chains
    assert chain.blocks == 4
    assert chain.modules[0].endswith("h.0")
