"""Products with weights where they lie: the operators, and the pass that makes use of them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import float64, joint_graphs, relative_error
from families import FAMILIES, Residual, Size, mlp
from small_models import LENGTH, D, check_exact, compiled, grads, model
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph

from hwbp_compile import products_cpp, stack_parameters
from hwbp_compile.passes import addresses
from hwbp_compile.passes.linear_ops import op_name

table_of: Callable[[list[Tensor]], Tensor] = torch.ops.hwbp_compile.addresses.default
products: Callable[..., Tensor] = torch.ops.hwbp_compile.products.default


@pytest.fixture(autouse=True)
def _no_pass_is_left_out(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, "hwbp_compile"):
        yield
    assert "internal error" not in caplog.text


@pytest.fixture(params=["kernel", "no compiler"])
def _with_and_without_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no compiler":
        monkeypatch.setattr(products_cpp, "kernel", lambda dtype: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 17])
@pytest.mark.parametrize("columns", [1, 7, 8, 15, 16, 33, 64, 100, 128, 129, 300])
def test_products(dtype: torch.dtype, rows: int, columns: int) -> None:
    torch.manual_seed(rows * columns)
    inner = 1 + columns // 3
    matrices = [torch.randn(inner, columns, dtype=dtype) for _ in range(5)]
    x = torch.randn(5, rows, inner, dtype=dtype)
    torch.testing.assert_close(products(x, table_of(matrices), columns), x @ torch.stack(matrices))


@pytest.mark.parametrize("threads", [1, 2])
def test_products_of_several_threads(threads: int) -> None:
    """As many as there is work for: large enough for two here."""
    matrices = [torch.randn(64, 200) for _ in range(7)]
    x = torch.randn(7, 6, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(products(x, table_of(matrices), 200), x @ torch.stack(matrices))
    finally:
        torch.set_num_threads(before)


def operands() -> Iterator[tuple[Tensor, list[Tensor], tuple[int, ...]]]:
    """Left factors and matrices as they may lie in memory, and which of the matrices are meant."""
    many = [torch.randn(4, 16) for _ in range(6)]
    yield torch.randn(6, 3, 4), many, ()
    yield torch.randn(5, 3, 4), many, (1,)
    yield torch.randn(3, 3, 4), many, (0, 2)
    yield torch.randn(2, 3, 4), many, (1, 3)
    yield torch.randn(3, 6, 4).transpose(0, 1), many, ()
    yield torch.randn(6, 4, 3).transpose(1, 2), many, ()
    yield torch.randn(7, 3, 9)[1:, :, 2:6], many, ()
    yield torch.randn(1, 3, 4).expand(6, 3, 4), many, ()
    yield torch.randn(6, 3, 4), [m.T.contiguous().T for m in many], ()
    yield torch.randn(6, 0, 4), many, ()
    yield torch.randn(6, 3, 0), [torch.randn(0, 16) for _ in range(6)], ()


@pytest.mark.usefixtures("_with_and_without_kernel")
@pytest.mark.parametrize("number", range(11))
def test_operands_in_memory(number: int) -> None:
    x, matrices, run = list(operands())[number]
    first, step = (*run, *(0, 1)[len(run) :])
    chosen = torch.stack(matrices)[first::step][: x.shape[0]]
    found = products(x, table_of(matrices), 16, *run)
    torch.testing.assert_close(found, x @ chosen)
    assert found.is_contiguous()


@pytest.mark.usefixtures("_with_and_without_kernel")
def test_matrices_live_as_long_as_their_table() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(64, 64) for _ in range(8)]
    x, expected = torch.randn(8, 2, 64), torch.stack(matrices)
    table = table_of([m.clone() for m in matrices])
    gc.collect()
    others = [torch.full((64, 64), float("nan")) for _ in range(32)]  # where they were, had they been freed
    torch.testing.assert_close(products(x, table, 64), x @ expected)
    assert len(others) == 32


def test_operators_are_registered_right() -> None:
    matrices = [torch.randn(4, 16) for _ in range(6)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hwbp_compile.addresses.default, (matrices,), test_utils=tests)
    arguments = (torch.randn(3, 2, 4), table_of(matrices), 16, 1, 2)
    torch.library.opcheck(torch.ops.hwbp_compile.products.default, arguments, test_utils=tests)


def test_a_kernel_that_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(products_cpp._compat, "load_cpp_kernel", fail)
    products_cpp.kernel.cache_clear()
    try:
        matrices = [torch.randn(4, 16) for _ in range(3)]
        x = torch.randn(3, 2, 4)
        torch.testing.assert_close(products(x, table_of(matrices), 16), x @ torch.stack(matrices))
    finally:
        products_cpp.kernel.cache_clear()
    assert "cannot be compiled, so weights are copied (RuntimeError: no compiler)" in caplog.text


def graph_of(m: nn.Module, *inputs: Tensor, dynamic: bool | None = None, **options: Any) -> Graph:
    """The joint graph as it is compiled."""
    torch._dynamo.reset()
    options = {"apply": "always"} | options
    with joint_graphs() as seen:
        compiled(m, dynamic, **options)(*inputs).square().sum().backward()
    (graph,) = seen
    return graph


def counts(graph: Graph) -> tuple[int, int]:
    """How many tables of addresses there are, and products that use them."""
    names = [op_name(n) for n in graph.nodes if n.op == "call_function"]
    return names.count("hwbp_compile::addresses"), names.count("hwbp_compile::products")


def copied(graph: Graph) -> int:
    """How many matrices among the inputs are copied into stacks."""
    stacks = [n for n in graph.nodes if n.op == "call_function" and op_name(n) == "hwbp_compile::stack"]
    return sum(n.op == "placeholder" and n.meta["val"].dim() == 2 for s in stacks for n in s.args[0])


def run_of(graph: Graph) -> set[tuple[Any, ...]]:
    """Which matrices are multiplied with."""
    return {
        n.args[3:] for n in graph.nodes if n.op == "call_function" and op_name(n) == "hwbp_compile::products"
    }


X = torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_are_read_where_they_are(dynamic: bool) -> None:
    """Two products in each iteration, and one for what is inside of the blocks in the end."""
    graph = graph_of(model(), X, dynamic=dynamic, iterations=2)
    assert counts(graph) == (2, 2 * 2 + 2)
    assert copied(graph) == 0
    check_exact(model(), X, dynamic=dynamic, apply="always")


@pytest.mark.parametrize(("options", "runs"), [({}, 1), ({"group_size": 2}, 2), ({"exact_tail": 2}, 1)])
def test_some_of_the_blocks(options: dict[str, Any], runs: int) -> None:
    """Groups take every other block's weights, from the first or the second on."""
    graph = graph_of(model(), X, iterations=1, **options)
    assert counts(graph)[0] == 2
    assert copied(graph) == 0
    assert len(run_of(graph)) >= runs
    check_exact(model(), X, apply="always", **options)


class Transposed(nn.Module):
    """``x @ weight`` with a weight as GPT-2 has it: its transpose is what cotangents are multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class Shared(nn.Module):
    """A product with a weight that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.linear(x))
        return y * self.linear.weight.sin().sum(0)


@pytest.mark.parametrize(
    ("inside", "dtype", "rows", "tables"),
    [
        (lambda: mlp(D, 2 * D), torch.float64, 5, 2),
        (lambda: mlp(D, 2 * D), torch.float32, 5, 2),
        (lambda: mlp(D, 2 * D), torch.bfloat16, 5, 0),
        (lambda: mlp(D, 2 * D), torch.float64, addresses.MOST_ROWS, 2),
        (lambda: mlp(D, 2 * D), torch.float64, addresses.MOST_ROWS + 1, 0),
        (Transposed, torch.float64, 5, 0),
    ],
    ids=["float64", "float32", "bfloat16", "many rows", "too many rows", "transposed"],
)
def test_where_it_pays(inside: Callable[[], nn.Module], dtype: torch.dtype, rows: int, tables: int) -> None:
    m = nn.Sequential(*(Residual(nn.LayerNorm(D), inside()) for _ in range(LENGTH))).to(dtype)
    x = torch.randn(rows, D, dtype=dtype)
    graph = graph_of(m, x, iterations=2)
    assert counts(graph)[0] == tables
    if dtype == torch.float64:
        check_exact(m, x, apply="always")


def test_other_uses_take_copies() -> None:
    m = nn.Sequential(*(Residual(nn.LayerNorm(D), Shared()) for _ in range(LENGTH))).double()
    check_exact(m, torch.randn(5, D, dtype=torch.float64), apply="always")


def test_a_copy_that_something_else_reads_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products, or none: a copy that is there anyway is what products read fastest."""
    graph = graph_of(model(), X, iterations=2)
    monkeypatch.setattr(addresses, "_are_few", lambda product: product.meta["val"].shape[-1] == D)
    some = graph_of(model(), X, iterations=2)
    assert counts(graph)[0] == 2
    assert counts(some)[0] == 1
    assert copied(some) == LENGTH


def test_parameters_in_stacks_are_no_copies() -> None:
    m = model()
    stack_parameters(m)
    graph = graph_of(m, X, iterations=2)
    assert counts(graph) == (0, 0)
    assert copied(graph) == 0


def test_saved_weights_that_are_copied_on_the_way() -> None:
    """Such as those that are offloaded: nobody else holds what the backward pass is given."""
    m = model()
    expected = grads(m, m, X)
    m.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        loss = compiled(m, apply="always")(X).square().sum()
    loss.backward()
    assert relative_error([p.grad for p in m.parameters() if p.grad is not None], expected) <= 1e-10


@pytest.mark.parametrize("family", ["pre_ln_transformer", "mixer"])
def test_families(family: str) -> None:
    """Their weights are read where they are, too."""
    case = float64(FAMILIES[family](Size()))
    torch._dynamo.reset()
    with joint_graphs() as seen:
        options = {"codegen": "eager", "iterations": 2, "apply": "always", "min_blocks": 2}
        torch.compile(case.model, backend="highway", options=options)(*case.inputs).sum().backward()
    assert sum(counts(g)[0] for g in seen) > 0


def test_in_generated_code() -> None:
    m = model()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = grads(m, m, x)
    c = compiled(m, codegen="inductor", apply="always")
    with torch._inductor.config.patch(force_disable_caches=True):
        found, code = run_and_get_code(lambda: grads(m, c, x))
    assert relative_error(found, expected) <= 1e-10
    assert any("hwbp_compile.products" in text for text in code)
