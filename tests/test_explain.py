"""``explain``: what it says, and that nobody notices that it was there."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hwbp_compile.backend as backend_module
from hwbp_compile import OptionError, Options, explain
from hwbp_compile._compat import compiled_parts
from hwbp_compile.passes.pipeline import Record
from hwbp_compile.report.capture import capture
from hwbp_compile.report.explain import explain_capture
from hwbp_compile.report.explanation import ChainReport, Explanation
from hwbp_compile.report.where import Names, readable, shorten, shorten_lines

SHORT = {"iterations": 2}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Mlp(nn.Module):
    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.h = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.h:
            x = block(x)
        return self.head(x)


class Layer(nn.Module):
    """A transformer layer: two residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, layers: int = 2, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class ConvBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1, *, project: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(outside)
        self.short = (
            nn.Conv2d(inside, outside, 1, stride, bias=False) if project or stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.bn(self.conv(x)))


def resnet(stride: int) -> nn.Module:
    """Two stages of four blocks, with a block between them whose shortcut is a convolution."""
    after = 4 * stride
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1),
        *(ConvBlock(4, 4) for _ in range(4)),
        ConvBlock(4, after, stride, project=True),
        *(ConvBlock(after, after) for _ in range(4)),
    )


class Inlined(nn.Module):
    """Residual code in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.up = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.down = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x


class Breaking(Mlp):
    """A graph break after the second block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.h[1](self.h[0](self.embed(x)))
        torch._dynamo.graph_break()
        for block in self.h[2:]:
            x = block(x)
        return self.head(x)


class BreakingInLoop(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8)


@functools.cache
def standard() -> Explanation:
    """The explanation that several tests look at."""
    return explain(Mlp(), inputs(), options={"iterations": 2, "gamma": 0.5})


# What it says


def test_a_chain_is_described() -> None:
    explanation = standard()
    (chain,) = explanation.chains
    assert (chain.blocks, chain.classes, chain.residual) == (4, (4,), "identity")
    assert (chain.shape, chain.dtype) == ((4, 8), "float32")
    assert chain.modules == tuple(f"h.{i}" for i in range(4))
    line = Block.forward.__code__.co_firstlineno + 1
    assert chain.lines == (f"{__file__}:{line}",)
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
    captured = capture(Mlp(), [inputs()], {})

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
    assert f"test_explain.py:{line}" in note
    assert explanation.graphs[0].graph_break
    assert not explanation.graphs[1].graph_break


def test_a_frame_that_runs_for_every_block_is_told_once() -> None:
    explanation = explain(BreakingInLoop(), inputs().requires_grad_())
    (chain,) = explanation.chains
    assert chain.modules == ("h.0",)
    assert explanation.graphs[0].calls == 4
    assert any("graph break" in n for n in explanation.notes)


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


# What was compiled before


def compiled_with(**settings: Any) -> Callable[[nn.Module], Any]:
    return lambda model: torch.compile(model, backend="highway", **settings)


def compiled_in_place(model: nn.Module) -> Any:
    model.compile(backend="highway", options={"iterations": 1})
    return model


@pytest.mark.parametrize(
    "compile_",
    [compiled_with(options={"iterations": 1}), compiled_in_place],
    ids=["torch.compile", "Module.compile"],
)
def test_a_compiled_model_brings_its_options(compile_: Callable[[nn.Module], Any]) -> None:
    compiled = compile_(Mlp())
    explanation = explain(compiled, inputs())
    assert explanation.options.iterations == 1
    assert explanation.chains[0].modules == tuple(f"h.{i}" for i in range(4))
    assert explain(compiled, inputs(), options={"iterations": 3}).options.iterations == 3


def test_a_compiled_function_brings_its_options() -> None:
    model = Mlp()

    @torch.compile(backend="highway", options={"iterations": 1})
    def loss(x: Tensor) -> Tensor:
        return model(x).sum()

    explanation = explain(loss, inputs())
    assert explanation.options.iterations == 1
    assert explanation.chains[0].blocks == 4


def test_another_backend_is_mentioned() -> None:
    compiled = torch.compile(Mlp(), options={"max_autotune": True})
    explanation = explain(compiled, inputs())
    assert explanation.chains[0].applied
    assert any('backend="inductor"' in n for n in explanation.notes)


def test_parts_that_are_compiled_on_their_own() -> None:
    model = Mlp()
    for i in range(4):
        model.h[i] = torch.compile(model.h[i], backend="highway")
    explanation = explain(model, inputs(), options=SHORT)
    assert explanation.chains[0].modules == tuple(f"h.{i}" for i in range(4))
    assert any("compiled on their own" in n for n in explanation.notes)


def test_compiled_parts() -> None:
    model = Mlp()
    parts = compiled_parts(torch.compile(model, backend="highway", mode="max-autotune", dynamic=False))
    assert parts.original is model
    assert (parts.backend, parts.options, parts.mode, parts.dynamic) == (
        "highway",
        None,
        "max-autotune",
        False,
    )
    assert compiled_parts(model).backend is None
    assert compiled_parts(compiled_parts).original is compiled_parts


# Nobody notices


def entries(function: Any) -> int:
    return len(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__))


@pytest.mark.parametrize("kind", [Mlp, Breaking, BreakingInLoop])
def test_the_users_compiled_code_is_left_alone(kind: type[Mlp]) -> None:
    check_compiled_code(kind, explanations=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Mlp, Breaking, BreakingInLoop])
def test_twenty_times_in_a_row(kind: type[Mlp]) -> None:
    check_compiled_code(kind, explanations=10)


def check_compiled_code(kind: type[Mlp], explanations: int) -> None:
    model, x = kind(blocks=3), inputs().requires_grad_()
    compiled = torch.compile(model, backend="highway", options={"codegen": "eager", "min_blocks": 3})
    compiled(x).sum().backward()
    before = entries(kind.forward), entries(Block.forward)
    code = kind.forward.__code__
    for k in range(explanations):
        assert explain(model, x, options={"iterations": k}).options.iterations == k
        assert explain(compiled, x).chains
    assert kind.forward.__code__ is code
    assert (entries(kind.forward), entries(Block.forward)) == before
    assert sum(before) > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x).sum().backward()


def test_a_function_that_breaks_the_graph_gets_one_entry_however_often() -> None:
    model = Mlp(blocks=2)

    def helper(x: Tensor) -> Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return helper(self.inner(x))

    outer, x = Calls(), inputs()
    counts = set()
    for _ in range(2):
        assert explain(outer, x).chains
        counts.add(entries(helper))
    assert counts == {1}


def test_an_exhausted_recompile_limit_hinders_nothing() -> None:
    model = Mlp()
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        compiled = torch.compile(model, backend="eager")
        for batch in (1, 2, 3):
            compiled(inputs(batch))
        assert explain(model, inputs(5)).chains[0].applied


def test_shapes_that_were_explained_do_not_make_a_model_dynamic() -> None:
    model = Mlp(blocks=2)
    for batch in (2, 3):
        (chain,) = explain(model, inputs(batch), options={"min_blocks": 2}).chains
        assert chain.shape == (batch, 8)
    seen: list[Any] = []

    def look(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.extend(type(s) for x in example_inputs if isinstance(x, Tensor) for s in x.shape)
        return gm.forward

    torch.compile(model, backend=look)(inputs(5))
    assert set(seen) == {int}


class Restless(Mlp):
    """Changes whatever a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.calls = 0

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache.add_(1)
        x.mul_(2)
        self.calls += 1
        self.steps += 1
        self.replaced = self.replaced + 1
        torch._dynamo.graph_break()
        self.noise = torch.rand(2)
        torch._dynamo.graph_break()
        return super().forward(self.drop(self.bn(x)) + random.random() + float(np.random.rand()))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_nothing_is_changed() -> None:
    model, x, cache = Restless(), inputs(), torch.zeros(3)
    model.head.eval()
    model.embed.weight.grad = gradient = torch.ones(8, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    given = x.clone(), cache.clone()
    random.seed(1)
    np.random.seed(1)
    dice = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    settings = torch.is_grad_enabled(), torch._dynamo.config.get_config_copy()
    assert explain(model, x, cache).chains
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(x, given[0])
    assert torch.equal(cache, given[1])
    assert model.embed.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(8, 8))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "embed.weight")
    assert model.calls == 0
    assert not hasattr(model, "noise")
    assert torch.equal(torch.get_rng_state(), dice[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == dice[1:]
    assert (torch.is_grad_enabled(), torch._dynamo.config.get_config_copy()) == settings


def test_gradients_of_a_function_that_goes_backward_are_put_back() -> None:
    model = Mlp()

    def step(x: Tensor) -> None:
        model(x).sum().backward()

    model.head.bias.grad = torch.ones(3)
    explain(step, inputs())
    assert torch.equal(model.head.bias.grad, torch.ones(3))
    assert model.embed.weight.grad is None


def test_an_error_of_the_model_is_not_hidden_and_changes_nothing() -> None:
    class Failing(Restless):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            self.steps += 1
            torch._dynamo.graph_break()
            raise RuntimeError("on purpose")

    model = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        explain(model, inputs(), torch.zeros(3))
    assert model.steps == 0


# Names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].h.0.attn", "h.0.attn"),
        ("L['self']", ""),
        ("L['self']._modules['h']._modules['3'].mlp", "h.3.mlp"),
        ("getattr(L['self'].h, '3').mlp", "h.3.mlp"),
        ("L['self'].h[3].mlp", "h.3.mlp"),
        ("L['self']._orig_mod.h.1", "h.1"),
        ("L['self'].h.1._checkpoint_wrapped_module.attn", "h.1.attn"),
        ("L['function'].h.1", "h.1"),
        ("G['model'].h.1", "model.h.1"),
        ("L['self']._original_module.h", "_original_module.h"),
    ],
)
def test_readable(path: str, name: str) -> None:
    assert readable(path) == name


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["h.0", "h.1", "h.2"], "h.0 ... h.2"),
        (["h.0.mlp", "h.1.mlp"], "h.0.mlp ... h.1.mlp"),
        (["h.0.a", "h.0.b", "h.1.a", "h.1.b"], "h.0 ... h.1 (a, b)"),
        (["cell", "cell", "cell"], "cell (x 3)"),
        (["left", "right"], "left, right"),
        (["", ""], "(the model itself)"),
        (["1", "2"], "1 ... 2"),
        ([], ""),
    ],
)
def test_shorten(names: list[str], short: str) -> None:
    assert shorten(names) == short


def test_shorten_lines() -> None:
    assert shorten_lines(["/a/m.py:3", "/a/m.py:4", "/a/m.py:9", "/b/n.py:1"]) == "m.py:3-4, 9; n.py:1"
