"""``explain`` on what was compiled before, and that nobody notices that it was there."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from explained_models import SHORT, Block, Breaking, BreakingInLoop, Mlp, inputs
from torch import Tensor, nn

from hwbp_compile import explain
from hwbp_compile._compat import compiled_parts

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
