"""Gradients of parameters: right, and computed for all blocks at once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from compare import exact, float64, highway, recorded, reference, relative_error, rewritten
from families import FAMILIES, Case, Plain, Size
from marks import some_slow
from reference import Settings
from torch import Tensor, nn

from hwbp_compile.passes import chains
from hwbp_compile.passes.linear_ops import is_heavy
from hwbp_compile.passes.pipeline import Record
from hwbp_compile.stage import GRADIENTS, stage_of

TOLERANCE = 1e-10


def gradient_nodes(record: Record) -> list[torch.fx.Node]:
    return [n for o in record.outcomes for n in o.new if stage_of(n) == GRADIENTS]


def check(case: Case, iterations: int = 1) -> Record:
    found, records = highway(case, iterations=iterations)
    assert rewritten(records)
    assert relative_error(found, reference(case, Settings(iterations))) <= TOLERANCE
    found, _ = highway(case, iterations=max(case.blocks))
    assert relative_error(found, exact(case)) <= TOLERANCE
    return records[0]


FEW_CLASSES = [
    "residual_mlp", "preact_resnet", "resnet", "pre_ln_transformer", "mixer", "gru_loop", "gated_loop",
]  # fmt: skip


@pytest.mark.parametrize(
    "family", some_slow(FEW_CLASSES, {"resnet", "mixer", "gated_loop", "preact_resnet", "pre_ln_transformer"})
)
def test_as_many_products_whatever_the_depth(family: str) -> None:
    """Also those that are left of the original backward pass."""
    counts = []
    for depth in (5, 9):
        torch.manual_seed(0)
        case = float64(FAMILIES[family](Size(depth=depth)))
        _, records = highway(case, iterations=1)
        graph = records[0].outcomes[0].new[0].graph
        backward = [n for n in graph.nodes if n.meta.get("partitioner_tag") == "is_backward"]
        counts.append(sum(map(is_heavy, backward)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("batch", [1, 2])
def test_products_of_one_row_are_products(batch: int) -> None:
    """As a multiplication, each element of a weight's gradient would compute its factors again."""
    case = float64(FAMILIES["residual_mlp"](Size(depth=5, width=32, batch=batch)))
    record = check(case)
    products = [n for n in gradient_nodes(record) if n.target is torch.ops.aten.bmm.default]
    assert len(products) == 4  # with two weights, and of two weights


@pytest.mark.parametrize("family", ["gru_loop", "gated_loop"])
def test_the_gradient_of_a_shared_weight_is_one_product(family: str) -> None:
    """No gradient for each step is ever stored."""
    torch.manual_seed(0)
    case = float64(FAMILIES[family](Size(depth=7, batch=5)))
    record = check(case, 2)
    matrices = {tuple(p.shape) for p in case.model.parameters() if p.dim() == 2}
    nodes = [n for n in gradient_nodes(record) if isinstance(n.meta["val"], Tensor)]
    assert any(tuple(n.meta["val"].shape) in matrices for n in nodes)
    for node in nodes:
        shape = tuple(node.meta["val"].shape)
        turned = (shape[0], *shape[:0:-1])
        assert not any(s[0] > 1 and s[1:] in matrices for s in (shape, turned)), (node.target, shape)


class Attentionlike(nn.Module):
    """Three weights of one shape, of which one is used twice."""

    def __init__(self, d: int, *, twice: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)) * self.v(x)
        return x + (self.q(y) if self.twice else y)


@pytest.mark.parametrize("twice", [False, True])
def test_weights_of_one_shape_are_told_apart(twice: bool) -> None:
    torch.manual_seed(0)
    blocks = [Attentionlike(6, twice=twice) for _ in range(5)]
    case = float64(Case(Plain(nn.Linear(4, 6), blocks, nn.Linear(6, 2)), (torch.randn(3, 4),), [5]))
    record = check(case)
    products = filter(is_heavy, gradient_nodes(record))
    matrices = [n for n in products if tuple(n.meta["val"].shape) == (5, 6, 6)]
    assert len(matrices) >= 3


def test_a_gradient_that_reads_the_next_state() -> None:
    """Cut inside of its blocks, the state has two tensors, and a weight's gradient reads the second."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.f(x)) + torch.sigmoid(self.g(x))

    torch.manual_seed(0)
    blocks = [Two() for _ in range(5)]
    model = nn.Sequential(*blocks).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    options = {"iterations": 20, "min_blocks": 2, "codegen": "eager"}
    with (
        recorded() as records,
        mock.patch.object(chains, "_covered", lambda found: 3 ** chains._longest(found)),
    ):
        compiled = torch.compile(model, backend="highway", options=options)
        found = torch.autograd.grad(compiled(x).sin().sum(), list(model.parameters()))
    ((length, kind),) = rewritten(records)
    assert length > 5
    assert kind == "identity on a state of 2 tensors"
    assert gradient_nodes(records[0])
    assert relative_error(list(found), list(expected)) <= TOLERANCE


def test_a_view_of_a_weight_that_only_the_gradient_reads() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(x @ self.w) @ self.w.t() @ self.w

    torch.manual_seed(0)
    case = Case(
        Plain(nn.Linear(4, 6), [Turned() for _ in range(5)], nn.Linear(6, 2)), (torch.randn(3, 4),), [5]
    )
    record = check(float64(case))
    assert gradient_nodes(record)


def test_parameters_frozen_in_some_blocks() -> None:
    torch.manual_seed(0)
    blocks = [Attentionlike(6, twice=False) for _ in range(6)]
    for block in blocks[1:4]:
        block.k.requires_grad_(False)
    case = float64(Case(Plain(nn.Linear(4, 6), blocks, nn.Linear(6, 2)), (torch.randn(3, 4),), [6]))
    check(case)


def test_a_weight_shared_by_some_blocks_and_the_head() -> None:
    torch.manual_seed(0)
    blocks = [Attentionlike(6, twice=False) for _ in range(6)]
    for block in blocks[2:5]:
        block.v = blocks[1].v
    head = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 2))
    head[0].weight = blocks[1].v.weight
    case = float64(Case(Plain(nn.Linear(4, 6), blocks, head), (torch.randn(3, 4),), [6]))
    check(case)


def test_a_weight_shared_with_another_chain() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList(Attentionlike(6, twice=False) for _ in range(5))
            self.second = nn.ModuleList(Attentionlike(6, twice=False) for _ in range(4))
            for a, b in zip(self.first, self.second, strict=False):
                b.q = a.q
            self.between = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.first:
                x = block(x)
            x = torch.tanh(self.between(x))
            for block in self.second:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Two().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    options = {"iterations": 5, "min_blocks": 2, "codegen": "eager"}
    torch.compile(model, backend="highway", options=options)(x).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert relative_error(found, expected) <= TOLERANCE


def test_an_operator_that_cannot_be_batched_leaves_only_its_gradients_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hwbp_compile.errors import CannotRewrite
    from hwbp_compile.passes import replay

    original = replay.batched_call

    def refuse(target, args, kwargs, blocks, node):  # type: ignore[no-untyped-def]
        if is_heavy(node):
            raise CannotRewrite("unsupported operator", node)
        return original(target, args, kwargs, blocks, node)

    monkeypatch.setattr(replay, "batched_call", refuse)
    torch.manual_seed(0)
    case = float64(FAMILIES["residual_mlp"](Size(depth=5)))
    record = check(case)
    assert not any(map(is_heavy, gradient_nodes(record)))
    assert gradient_nodes(record), "what needs no product is still computed at once"
