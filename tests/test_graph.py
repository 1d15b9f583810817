"""The rewritten graph: its size, its operators, and where they stand."""

from __future__ import annotations

import pytest
import torch
from compare import counted_calls, exact, float64, highway, rewritten
from families import FAMILIES, Size
from marks import some_slow
from torch import nn

from hwbp_compile.passes.pipeline import Record

CHAINS_OF_FEW_CLASSES = [
    "residual_mlp",
    "preact_resnet",
    "resnet",
    "pre_ln_transformer",
    "post_ln_transformer",
    "mixer",
    "highway_layers",
    "gru_loop",
    "lstm_loop",
    "layer_scale",
]


def new_nodes(family: str, depth: int, iterations: int) -> tuple[int, Record]:
    torch.manual_seed(0)
    case = float64(FAMILIES[family](Size(depth=depth)))
    _, records = highway(case, iterations=iterations)
    assert len(rewritten(records)) == len(case.blocks)
    return sum(len(o.new) for o in records[0].outcomes), records[0]


LARGE = {"resnet", "preact_resnet", "pre_ln_transformer", "post_ln_transformer", "mixer"}
LIKE_OTHERS = {"layer_scale", "highway_layers", "gru_loop", "lstm_loop"}


@pytest.mark.parametrize("family", some_slow(CHAINS_OF_FEW_CLASSES, LARGE | LIKE_OTHERS))
def test_an_iteration_adds_as_many_nodes_whatever_the_depth(family: str) -> None:
    """Also the proof that no batched operator is a loop over the layers."""
    added = {depth: new_nodes(family, depth, 3)[0] - new_nodes(family, depth, 2)[0] for depth in (3, 7)}
    assert added[3] == added[7]
    assert 0 < added[3] < 160


@pytest.mark.parametrize("family", ["residual_mlp", "pre_ln_transformer", "gru_loop"])
def test_blocks_of_one_structure_share_a_class(family: str) -> None:
    _, record = new_nodes(family, 6, 1)
    (outcome,) = record.outcomes
    classes = outcome.found.classes  # type: ignore[union-attr]
    assert len(classes) == (2 if family == "pre_ln_transformer" else 1)


def test_shared_weights_are_not_stacked() -> None:
    _, record = new_nodes("gru_loop", 6, 1)
    stacked = [n for n in record.outcomes[0].new if "stack" in str(n.target) or "cat" in str(n.target)]
    weights = {(18, 6), (6, 18)}
    for node in stacked:
        for operand in node.all_input_nodes:
            assert tuple(operand.meta["val"].shape[-2:]) not in weights
    products = [n for n in record.outcomes[0].new if n.target is torch.ops.aten.mm.default]
    assert products, "the blocks' products are one large product"


def test_new_nodes_are_marked_as_backward() -> None:
    _, record = new_nodes("residual_mlp", 5, 2)
    assert all(n.meta["partitioner_tag"] == "is_backward" for n in record.outcomes[0].new)


def test_passes_are_linear() -> None:
    """Twice the blocks take about twice the calls of functions, or less."""
    with counted_calls() as calls:
        for depth in (2, 4, 8, 16):
            new_nodes("residual_mlp", depth, 2)
    _, first, second, third = calls  # the first time modules are imported
    assert third - second < 2.4 * (second - first), calls


def test_a_permuted_residual_path_is_not_taken_for_the_identity() -> None:
    """With as many tokens as channels a transposed stream has the same shape, but is no diagonal."""

    class Turn(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.f = nn.Linear(d, d)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2) + torch.tanh(self.f(x))

    from families import Case, Plain

    torch.manual_seed(0)
    model = Plain(nn.Linear(4, 4), [Turn(4) for _ in range(5)], nn.Linear(4, 2))
    case = float64(Case(model, (torch.randn(2, 4, 4),), []))
    expected = exact(case)
    found, records = highway(case, iterations=5)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    found, records = highway(case, iterations=0)
    if not rewritten(records):
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)
