"""Products with weights where they lie: the operators, and the pass that makes use of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from compare import float64, joint_graphs, relative_error
from families import FAMILIES, Residual, Size, mlp
from small_models import LENGTH, D, check_exact, compiled, grads, model
from test_unusual_models import Changing
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, Node

from hwbp_compile import _compat, products_cpp, stack_parameters
from hwbp_compile.passes import unstacked, worth
from hwbp_compile.passes.linear_ops import op_name

products: Callable[[Tensor, list[Tensor]], Tensor] = torch.ops.hwbp_compile.products.default


pytestmark = pytest.mark.skipif(
    not products_cpp.has_kernel(torch.float32), reason="there is no kernel for this processor"
)


@pytest.fixture(autouse=True)
def _no_pass_is_left_out(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, "hwbp_compile"):
        yield
    assert not [r for r in caplog.get_records("call") if "internal error" in r.getMessage()]


@pytest.fixture(autouse=True)
def _matrices_may_be_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of small models are."""
    monkeypatch.setattr(unstacked, "VECTOR", 1)


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
    torch.testing.assert_close(products(x, matrices), x @ torch.stack(matrices))


@pytest.mark.parametrize("threads", [1, 2])
def test_products_of_several_threads(threads: int) -> None:
    """As many as there is work for: large enough for two here."""
    matrices = [torch.randn(64, 200) for _ in range(7)]
    x = torch.randn(7, 6, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(products(x, matrices), x @ torch.stack(matrices))
    finally:
        torch.set_num_threads(before)


def test_sums_of_many_terms_are_as_exact_as_the_librarys() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(1 << 14, 16) for _ in range(4)]
    x = torch.randn(4, 3, 1 << 14)
    exact = x.double() @ torch.stack(matrices).double()
    error = float((products(x, matrices) - exact).norm() / exact.norm())
    assert error < 1e-6  # 2e-6 if all are added up one after the other


def operands() -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Left factors and matrices as they may lie in memory."""
    many = [torch.randn(4, 16) for _ in range(6)]
    yield torch.randn(6, 3, 4), many
    yield torch.randn(5, 3, 4), many[1:]
    yield torch.randn(3, 3, 4), many[::-2]
    yield torch.randn(3, 3, 4), [many[0]] * 3
    yield torch.randn(3, 6, 4).transpose(0, 1), many
    yield torch.randn(6, 4, 3).transpose(1, 2), many
    yield torch.randn(7, 3, 9)[1:, :, 2:6], many
    yield torch.randn(1, 3, 4).expand(6, 3, 4), many
    yield torch.randn(6, 3, 4), [*many[:5], many[5].T.contiguous().T]
    yield torch.randn(6, 3, 4), list(torch.randn(6, 4, 16).unbind())
    yield torch.randn(6, 300, 4), many
    yield torch.randn(6, 0, 4), many
    yield torch.randn(6, 3, 0), [torch.randn(0, 16) for _ in range(6)]


@pytest.mark.usefixtures("_with_and_without_kernel")
@pytest.mark.parametrize("number", range(13))
def test_operands_in_memory(number: int) -> None:
    x, matrices = list(operands())[number]
    found = products(x, matrices)
    torch.testing.assert_close(found, x @ torch.stack(matrices))
    assert found.is_contiguous()


@pytest.mark.usefixtures("_with_and_without_kernel")
@pytest.mark.parametrize(
    "matrices",
    [
        [torch.randn(4, 16)] * 5,
        [torch.randn(5, 16)] * 6,
        [torch.randn(4, 16).bfloat16()] * 6,
        [torch.randn(4, 16)] * 5 + [torch.randn(4, 15)],
    ],
)
def test_operands_that_do_not_fit(matrices: list[Tensor]) -> None:
    """An error, and nothing is read past an end."""
    with pytest.raises(RuntimeError):
        products(torch.randn(6, 3, 4), matrices)


def test_the_operator_is_registered_right() -> None:
    arguments = torch.randn(6, 2, 4), [torch.randn(4, 16) for _ in range(6)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hwbp_compile.products.default, arguments, test_utils=tests)


def test_a_kernel_that_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Products are a library's then, and models take stacks of their weights."""

    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_compat, "load_cpp_kernel", fail)
    products_cpp.kernel.cache_clear()
    try:
        matrices = [torch.randn(4, 16) for _ in range(3)]
        x = torch.randn(3, 2, 4)
        torch.testing.assert_close(products(x, matrices), x @ torch.stack(matrices))
        graph = graph_of(model(), X, iterations=1)
    finally:
        products_cpp.kernel.cache_clear()
    assert (count(graph), copied(graph)) == (0, 2 * LENGTH)
    assert "cannot be compiled, so weights are copied (RuntimeError: no compiler)" in caplog.text


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512", "NEON"])
def test_processors(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products_cpp.has_kernel(torch.float32) == capability.startswith("AVX")
    assert not products_cpp.has_kernel(torch.bfloat16)


def graph_of(m: nn.Module, *inputs: Tensor, dynamic: bool | None = None, **options: Any) -> Graph:
    """The joint graph as it is compiled."""
    torch._dynamo.reset()
    options = {"apply": "always"} | options
    with joint_graphs() as seen:
        compiled(m, dynamic, **options)(*inputs).square().sum().backward()
    (graph,) = seen
    return graph


def named(graph: Graph, name: str) -> list[Node]:
    return [n for n in graph.nodes if n.op == "call_function" and op_name(n) == name]


def count(graph: Graph) -> int:
    """How many products there are with matrices where they are."""
    return len(named(graph, "hwbp_compile::products"))


def copied(graph: Graph) -> int:
    """How many matrices among the inputs are copied into stacks."""
    stacks = named(graph, "hwbp_compile::stack")
    return sum(n.op == "placeholder" and n.meta["val"].dim() == 2 for s in stacks for n in s.args[0])


X = torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_are_read_where_they_are(dynamic: bool) -> None:
    """Two products in each iteration, and one for what is inside of the blocks in the end."""
    graph = graph_of(model(), X, dynamic=dynamic, iterations=2)
    assert count(graph) == 2 * 2 + 2
    assert copied(graph) == 0
    check_exact(model(), X, dynamic=dynamic, apply="always")


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param({"group_size": n}, marks=pytest.mark.slow) for n in (2, 4)), {"exact_tail": 2}],
)
def test_some_of_the_blocks(options: dict[str, Any]) -> None:
    """Groups take every other block's weights, from the first or the second on."""
    graph = graph_of(model(), X, iterations=1, **options)
    assert count(graph) > 0
    assert copied(graph) == 0
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


CHUNK = unstacked.VECTOR // 8
"""Numbers in what the rows of matrices are multiples of, in float64."""


@pytest.mark.parametrize(
    ("inside", "width", "dtype", "rows", "is_read"),
    [
        (lambda: mlp(CHUNK, 2 * CHUNK), CHUNK, torch.float64, 5, True),
        (lambda: mlp(2 * CHUNK, 4 * CHUNK), 2 * CHUNK, torch.float32, 5, True),
        (lambda: mlp(CHUNK, 2 * CHUNK), CHUNK, torch.bfloat16, 5, False),
        (lambda: mlp(CHUNK, 2 * CHUNK), CHUNK, torch.float64, unstacked.MOST_ROWS, True),
        (lambda: mlp(CHUNK, 2 * CHUNK), CHUNK, torch.float64, unstacked.MOST_ROWS + 1, False),
        (lambda: mlp(D, 2 * D), D, torch.float64, 5, False),
        (Transposed, D, torch.float64, 5, False),
        (Shared, D, torch.float64, 5, False),
        (lambda: mlp(D, 0), D, torch.float64, 5, False),
    ],
    ids=[
        "float64", "float32", "bfloat16", "many rows", "too many rows", "narrow", "transposed", "another use",
        "nothing inside",
    ],
)  # fmt: skip
def test_where_it_pays(
    inside: Callable[[], nn.Module],
    width: int,
    dtype: torch.dtype,
    rows: int,
    is_read: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if inside not in (Transposed, Shared):
        monkeypatch.setattr(unstacked, "VECTOR", 64)
    m = nn.Sequential(*(Residual(nn.LayerNorm(width), inside()) for _ in range(LENGTH))).to(dtype)
    x = torch.randn(rows, width, dtype=dtype)
    graph = graph_of(m, x, iterations=2)
    assert (count(graph) > 0) == is_read
    if is_read:
        assert copied(graph) == 0
    if dtype != torch.bfloat16:
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        check_exact(m, x, chains=None, tolerance=tolerance, apply="always")


def test_a_copy_that_something_else_reads_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products, or none: a copy that is there anyway is what products read fastest."""
    graph = graph_of(model(), X, iterations=2)
    monkeypatch.setattr(unstacked, "_are_few", lambda product: product.meta["val"].shape[-1] == D)
    some = graph_of(model(), X, iterations=2)
    assert (count(graph), copied(graph)) == (6, 0)
    assert (count(some), copied(some)) == (3, LENGTH)


def test_parameters_in_stacks_are_no_copies() -> None:
    m = model()
    stack_parameters(m)
    graph = graph_of(m, X, iterations=2)
    assert (count(graph), copied(graph)) == (0, 0)


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
    assert sum(map(count, seen)) > 0


def test_in_generated_code() -> None:
    m = model()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = grads(m, m, x)
    c = compiled(m, codegen="inductor", apply="always")
    with torch._inductor.config.patch(force_disable_caches=True):
        found, code = run_and_get_code(lambda: grads(m, c, x))
    assert relative_error(found, expected) <= 1e-10
    assert any("hwbp_compile.products" in text for text in code)


@pytest.mark.parametrize(
    "hooks",
    [None, (lambda t: t.detach() * 2, lambda t: t * 0.5)],
    ids=["as saved", "computed again"],
)
@pytest.mark.slow
def test_a_backward_pass_that_is_compiled_again(hooks: Any) -> None:
    """Inductor knows how long the matrices are read, also where it has computed them itself."""
    torch.manual_seed(0)
    blocks = [Residual(nn.LayerNorm(64), mlp(64, 128)) for _ in range(LENGTH)]
    m = nn.Sequential(nn.Linear(4, 64), *blocks, nn.Linear(64, 3)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    expected = grads(m, m, x)
    m.zero_grad()
    around = nullcontext() if hooks is None else torch.autograd.graph.saved_tensors_hooks(*hooks)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="inductor")), joint_graphs() as seen:
        with around:
            loss = compiled(m, apply="always")(x).square().sum()
        loss.backward()
    assert sum(map(count, seen)) > 0
    assert relative_error([p.grad for p in m.parameters() if p.grad is not None], expected) <= 1e-10


class Tied(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        pairs = [mlp(D, 2 * D) for _ in range(blocks // 2)]
        self.blocks = nn.Sequential(*(Residual(nn.LayerNorm(D), f) for f in pairs + pairs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


class Twice(nn.Module):
    """Multiplies with a weight and with its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) @ self.weight.T


@pytest.mark.measured
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (model, {"iterations": 2}),
        (model, {"iterations": 1, "group_size": 2}),
        (lambda: nn.Sequential(*(Residual(nn.LayerNorm(D), Twice()) for _ in range(LENGTH))).double(), {}),
        (lambda: Tied(LENGTH).double(), {}),
    ],
    ids=["plain", "groups", "transposed", "tied"],
)
def test_what_is_expected_is_what_is_done(
    make: Callable[[], nn.Module], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost model counts the products that read weights where they are."""
    expected: list[int] = []
    original = worth.unstacked_products

    def counted(*args: Any) -> Any:
        found = original(*args)
        expected.append(sum(map(len, found.values())))
        return found

    monkeypatch.setattr(worth, "unstacked_products", counted)
    monkeypatch.setattr(worth.Comparison, "reason", "")
    m = make()
    x = X if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Linear) else torch.randn(5, D).double()
    graph = graph_of(m, x, **{"apply": "auto", "iterations": 2} | options)
    assert expected == [count(graph)]


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_matrices_that_the_backward_pass_reads_and_then_changes(codegen: str) -> None:
    m = nn.Sequential(*(Residual(nn.LayerNorm(D), Changing(forward=True)) for _ in range(LENGTH))).double()
    before = {name: buffer.clone() for name, buffer in m.named_buffers()}
    x = torch.randn(5, D, dtype=torch.float64)
    expected = grads(m, m, x)
    after = {name: buffer.clone() for name, buffer in m.named_buffers()}
    m.load_state_dict(before, strict=False)
    with joint_graphs() as seen:
        found = grads(m, compiled(m, codegen=codegen, apply="always"), x)
    assert sum(map(count, seen)) > 0
    assert relative_error(found, expected) <= 1e-10
    for name, buffer in m.named_buffers():
        torch.testing.assert_close(buffer, after[name])
