"""``stack_parameters``: the same model in fewer tensors, both ways, and the same gradients without copies."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import joint_graphs
from explained_models import Mlp, Transformer
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compile import stack_parameters, unstack_parameters
from hwbp_compile.passes.linear_ops import op_name
from hwbp_compile.passes.restack import restack

WIDTH = 8


def trained(model: nn.Module, x: Tensor, forward: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The gradients by the names that the parameters have without stacks."""
    model.zero_grad()
    (forward or model)(x).square().sum().backward()
    plain = copy.deepcopy(model)
    for own, p in zip(plain.parameters(), model.parameters(), strict=True):
        own.grad = p.grad
    unstack_parameters(plain)
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)


def compiled_with_counts(model: nn.Module, **options: Any) -> tuple[Any, Counter[str]]:
    """The compiled model; once it has run, how often each operator is in the rewritten joint graphs."""
    counts: Counter[str] = Counter()
    forward = torch.compile(model, backend="highway", options={"codegen": "eager", **options})

    def run(x: Tensor) -> Any:
        with joint_graphs() as graphs:
            y = forward(x)
        for graph in graphs:
            calls = [n for n in graph.nodes if n.op == "call_function"]
            counts.update(map(op_name, calls))
            stacks = [n for n in calls if op_name(n) == "hwbp_compile::stack"]
            counts["of parameters"] += sum(
                all(x.op == "placeholder" for x in n.all_input_nodes) for n in stacks
            )
        return y

    return run, counts


@pytest.mark.parametrize("make", [Mlp, Transformer])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"apply": "never"}, marks=pytest.mark.slow),
        pytest.param({"iterations": 1}, marks=pytest.mark.slow),
        {"iterations": 2, "group_size": 2},
    ],
)
def test_gradients(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    """Those that the model has without stacks, of which no copy is made."""
    plain = make().double()
    x = torch.randn(3, 5, WIDTH).double()
    forward, plain_counts = compiled_with_counts(plain, **options)
    expected = trained(plain, x, forward)
    torch._dynamo.reset()
    model = copy.deepcopy(plain)
    stack_parameters(model)
    forward, counts = compiled_with_counts(model, **options)
    assert_equal(trained(model, x, forward), expected)
    assert counts["of parameters"] == counts["aten::select_scatter"] == 0
    assert (plain_counts["of parameters"] > 0) == (options.get("apply") != "never")


def test_the_exact_gradient() -> None:
    model = Mlp(6).double()
    x = torch.randn(3, WIDTH).double()
    expected = trained(model, x)
    stack_parameters(model)
    assert_equal(trained(model, x), expected)
    assert_equal(trained(model, x, compiled_with_counts(model, iterations=6)[0]), expected)


def test_there_and_back() -> None:
    model = Mlp().double()
    x = torch.randn(3, WIDTH).double()
    expected = model(x)
    expected.sum().backward()
    before = copy.deepcopy(model)
    names, gradients = dict(model.named_parameters()), [p.grad for p in model.parameters()]
    done = stack_parameters(model)
    assert len(done.stacks) == 6
    assert not done.left_out
    assert done.stacks["stacked_h_up_weight"] == tuple(f"h.{i}.up.weight" for i in (3, 2, 1, 0))
    assert "stacked_h_up_weight: 4 rows, h.3.up.weight to h.0.up.weight" in str(done)
    assert len(list(model.parameters())) == 4 + 6
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert list(model.state_dict()) == list(names) == list(before.state_dict())
    unstack_parameters(model)
    assert list(dict(model.named_parameters())) == list(names)
    assert type(model) is Mlp
    assert type(model.h[0].up) is nn.Linear
    assert vars(model).keys() == vars(before).keys()
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert g is not None
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_state_dictionaries() -> None:
    model, other = Mlp(), Mlp()
    stack_parameters(model)
    assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    fresh = Mlp()
    model.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(model(x), fresh(x), rtol=0, atol=0)
    state = nn.Sequential(model).state_dict()
    assert list(state) == [f"0.{name}" for name in fresh.state_dict()]
    nn.Sequential(model).load_state_dict(state)
    del state["0.h.1.up.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.h.1.up.weight\"\."):
        nn.Sequential(model).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for h.2.up.bias: \[5\] in the checkpoint, \[16\]"):
        model.load_state_dict(fresh.state_dict() | {"h.2.up.bias": torch.zeros(5)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict(fresh.state_dict() | {"h.2.up.other": torch.zeros(5)})


def test_copies() -> None:
    model = Mlp()
    stack_parameters(model)
    x = torch.randn(3, WIDTH)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            other.h[1].up.weight.zero_()
        assert not other.stacked_h_up_weight[2].any()
        assert model.h[1].up.weight.any()
    assert model.double().h[0].up.weight.dtype == torch.float64


def test_optimizers() -> None:
    model = Mlp().double()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"SGD optimizer has parameters that stack_parameters would replace"):
        stack_parameters(model)
    assert len(list(model.parameters())) == 4 + 4 * 6
    del optimizer
    plain = copy.deepcopy(model)
    stack_parameters(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (plain, model)]
    for x in torch.randn(4, 3, WIDTH).double():
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            each.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    with pytest.raises(ValueError, match="unstack_parameters would replace"):
        unstack_parameters(model)
    assert_equal(model.state_dict(), plain.state_dict())


def test_left_out() -> None:
    model = Mlp().double()
    model.h[1].norm.weight = model.h[0].norm.weight
    model.h[2].norm.bias.requires_grad_(False)
    model.h[3].up.bias.register_hook(lambda g: g)
    for block in model.h[1:]:
        block.down.bias.requires_grad_(False)
    x = torch.randn(3, WIDTH).double()
    expected = trained(model, x)
    names = list(model.state_dict())
    done = stack_parameters(model)
    assert {name: [row.split(".")[1] for row in rows] for name, rows in done.stacks.items()} == {
        "stacked_h_norm_weight": ["3", "2"],
        "stacked_h_norm_bias": ["3", "1", "0"],
        "stacked_h_up_weight": ["3", "2", "1", "0"],
        "stacked_h_up_bias": ["2", "1", "0"],
        "stacked_h_down_weight": ["3", "2", "1", "0"],
    }
    assert done.left_out == {
        "h.0.norm.weight": "is shared",
        "h.1.norm.weight": "is shared",
        "h.2.norm.bias": "does not require gradients",
        "h.3.up.bias": "has hooks",
        "h.0.down.bias": "has no other to share a stack with",
        **{f"h.{i}.down.bias": "does not require gradients" for i in (1, 2, 3)},
    }
    assert_equal(trained(model, x), expected)
    assert sorted(model.state_dict()) == sorted(names)
    again = stack_parameters(model)
    assert not again.stacks
    assert again.left_out["h.0.norm.weight"] == "belongs to a module with parameters in stacks"
    unstack_parameters(model)
    assert list(model.state_dict()) == names
    assert_equal(trained(model, x), expected)
    recurrent = stack_parameters(nn.Sequential(nn.GRU(2, 2), nn.GRU(2, 2)))
    assert set(recurrent.left_out.values()) == {"belongs to a GRU"}
    assert str(stack_parameters(nn.Linear(2, 2))).startswith("nothing is stacked")


def test_frozen_blocks() -> None:
    """The blocks that are trained have stacks, which the backward pass reads without copies."""
    model = Mlp(6).double()
    for block in model.h[:2]:
        block.requires_grad_(False)
    model.embed.requires_grad_(False)
    x = torch.randn(3, WIDTH).double()
    expected = trained(model, x)
    done = stack_parameters(model)
    assert all([row.split(".")[1] for row in rows] == ["5", "4", "3", "2"] for rows in done.stacks.values())
    forward, counts = compiled_with_counts(model, iterations=4)
    assert_equal(trained(model, x, forward), expected)
    assert counts["of parameters"] == counts["aten::select_scatter"] == 0


def test_a_compiled_model_is_compiled_anew() -> None:
    model = Mlp().double()
    x = torch.randn(3, WIDTH).double()
    expected = trained(model, x)
    forward = torch.compile(
        model, backend="highway", options={"codegen": "eager", "iterations": 4, "apply": "always"}
    )
    for change in (lambda _: None, stack_parameters, unstack_parameters, stack_parameters):
        change(forward)
        assert_equal(trained(model, x, lambda x: forward(x)), expected)


def test_what_is_refused() -> None:
    model = Mlp()
    with pytest.raises(ValueError, match="call the model once before"):
        stack_parameters(nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="call the model once before"):
        stack_parameters(nn.Sequential(*(nn.LazyBatchNorm1d(affine=False) for _ in range(2))))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stack_parameters(model)
    for value in (nn.Parameter(torch.zeros(16, 8)), None):
        with pytest.raises(AttributeError, match=r"a Linear is a row of a stack .* unstack_parameters first"):
            model.h[1].up.weight = value
    with pytest.raises(RuntimeError, match=r"h\.1\.up\.weight is a row of a stack and cannot be assigned"):
        model.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="cannot be frozen by themselves"):
        model.h[1].up.requires_grad_(False)


def test_containers_side_by_side() -> None:
    """Blocks in several containers of one kind are one class; blocks of two kinds are two."""
    blocks = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)]
    found = stack_parameters(nn.Sequential(*blocks)).stacks
    assert list(found) == ["stacked_weight", "stacked_bias"]
    stages = nn.Sequential(*(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for _ in range(2)))
    expected, x = copy.deepcopy(stages), torch.randn(2, 4)
    assert [len(rows) for rows in stack_parameters(stages).stacks.values()] == [6, 6]
    torch.testing.assert_close(stages(x), expected(x), rtol=0, atol=0)


class Rows(nn.Module):
    """Uses rows of one parameter: some twice, one never, and all of it besides."""

    def __init__(self, rest: bool) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 2, -1, 2, 1):
            x = x * self.rows[i].sin()
        return x + self.rows.sum() if self.rest else x


@pytest.mark.parametrize("rest", [False, True])
def test_gradients_of_rows(rest: bool) -> None:
    model, x = Rows(rest), torch.randn(3, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = model.rows.grad
    model.zero_grad()
    forward, counts = compiled_with_counts(model, apply="never")
    forward(x).square().sum().backward()
    torch.testing.assert_close(model.rows.grad, expected)
    assert counts["aten::select_scatter"] == 0


class Returned(nn.Module):
    """Rows of a parameter put together again are what it returns, and they are the gradient of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([self.rows[i] for i in range(3)]), sum(x[i] @ self.rows[i] for i in range(3))


def test_nothing_returned_shares_memory() -> None:
    model, x = Returned(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    stacked, value = compiled_with_counts(model, apply="always")[0](x)
    value.backward(retain_graph=True)
    memory = {t.untyped_storage().data_ptr() for t in (model.rows, model.rows.grad, x.grad, stacked)}
    assert len(memory) == 4
    torch.testing.assert_close(x.grad, model.rows)


def graph_of(rows: Tensor, returned: str) -> tuple[torch.fx.GraphModule, Tensor]:
    """A backward pass in which rows of a product are put together, and returned alone or with the product."""

    def backward(w: Tensor, g: Tensor) -> list[Tensor]:
        product = g * 2
        base = {"product": product, "input": w}.get(returned, product)
        together = torch.cat([r.unsqueeze(0) for r in base.unbind(0)])
        return [together, product] if returned == "both" else [together]

    traced = make_fx(backward, tracing_mode="fake")(rows, rows)
    for node in traced.graph.nodes:
        if node.op == "call_function":
            node.meta["partitioner_tag"] = "is_backward"
    return traced, rows


@pytest.mark.parametrize(("returned", "expected"), [("product", 1), ("both", 0), ("input", 0)])
def test_copies_that_are_needed(returned: str, expected: int) -> None:
    traced, rows = graph_of(torch.randn(3, 4), returned)
    before = traced(rows, rows)
    assert restack(traced.graph) == expected
    traced.recompile()
    after = traced(rows, rows)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b)
    assert len({t.untyped_storage().data_ptr() for t in (rows, *after)}) == 1 + len(after)


class Parts(nn.Module):
    """The gradients of ``x`` and ``y`` are two shapes of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.y = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
        self.chain = nn.Sequential(*Mlp(6).h).double()

    def forward(self, z: Tensor) -> Tensor:
        rows = torch.stack([self.x[i].clone() for i in range(4)])
        return (rows.view(2, 6) + self.y).square().sum() + self.chain(z).sum()


def test_accumulated_gradients() -> None:
    model, z = Parts(), torch.randn(3, WIDTH).double()
    forward = compiled_with_counts(model, apply="always", iterations=2)[0]
    forward(z).backward()
    once = model.x.grad.clone()
    forward(z).backward()
    torch.testing.assert_close(model.x.grad, 2 * once)


def test_parts_of_models() -> None:
    model = nn.ModuleList([Mlp(), Mlp()])
    for part in model:
        stack_parameters(part)
    done = stack_parameters(model)
    assert done.left_out["0.stacked_h_up_weight"] == "is a stack"
    model[0](torch.randn(3, WIDTH))
    with pytest.raises(ValueError, match="not a part"):
        unstack_parameters(model[0].h[0])
    with pytest.raises(RuntimeError, match="call unstack_parameters on the model"):
        model[0].h[0].up.requires_grad_(False)
    model.requires_grad_(False)
    unstack_parameters(model)
    assert not model[0].h[0].up.weight.requires_grad


def test_keys_renamed_while_loading() -> None:
    model, other = Mlp(), Mlp()

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [k for k in state if k.startswith("old.")]:
            state[key.removeprefix("old.")] = state.pop(key)

    model.register_load_state_dict_pre_hook(rename)
    stack_parameters(model)
    model.load_state_dict({f"old.{k}": v for k, v in other.state_dict().items()})
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)


def test_a_few_rows_of_many() -> None:
    """Of a large table with few rows used, the sum stays a sum; rows of any length are joined."""
    table = torch.randn(50, 4, requires_grad=True)
    forward, counts = compiled_with_counts(lambda x: (table[0] * table[7] * x).sin(), apply="never")
    forward(torch.randn(4)).sum().backward()
    assert counts["aten::select_scatter"] == 2
    for n in (5, 6):
        rows = torch.randn(4, n, requires_grad=True)
        torch.compile(
            lambda x: (x[0] * x[2]).sin().sum(), backend="highway", options={"codegen": "eager"}, dynamic=True
        )(rows).backward()
        expected = (rows[0] * rows[2]).cos() * rows[2]
        torch.testing.assert_close(rows.grad[0], expected)
        assert not rows.grad[1].any()
