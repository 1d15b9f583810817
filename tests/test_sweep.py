"""The exact backward pass of a chain as one kernel: where it is found, if it is right, its limits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import counted_calls, joint_graphs, recorded
from equal_blocks import (
    BLOCKS,
    HIDDEN,
    MORE_VARIANTS,
    VARIANTS,
    AllStates,
    Attending,
    Block,
    Checkpointed,
    Columns,
    Conditioned,
    D,
    Masked,
    MaskedWeights,
    Reading,
    Shared,
    Towers,
    Trunk,
    Truths,
    compiled,
    equal,
    model,
    results,
    said_by_two_processes,
    x_of,
)
from marks import some_slow
from torch import Tensor, nn

import hwbp_compile
from hwbp_compile import backend
from hwbp_compile.blocks import limits, op
from hwbp_compile.blocks.kernel_cpp import BlocksKernel
from hwbp_compile.errors import CannotRewrite
from hwbp_compile.passes import kernels, pipeline, worth
from hwbp_compile.passes import outcomes as decisions
from hwbp_compile.passes.outcomes import Outcome

pytestmark = pytest.mark.usefixtures("kernels_op_by_op")

EXACT = {"iterations": "exact", "apply": "auto"}


def outcomes(m: nn.Module, *inputs: Tensor, tolerance: float = 1e-11, **options: Any) -> list[Outcome]:
    """What became of the chains; output and gradients are those of eager torch."""
    expected = results(m, m, *inputs)
    with recorded() as records:
        found = results(m, compiled(m, **EXACT | options), *inputs)
    equal(found, expected, tolerance)
    return [outcome for record in records for outcome in record.outcomes]


def check(m: nn.Module, *inputs: Tensor, chains: int = 1, **options: Any) -> None:
    """So many chains are swept, each by one kernel."""
    found = outcomes(m, *inputs, **options)
    assert [o.no_sweep for o in found] == [""] * chains
    assert all(o.is_swept and not o.is_iterated for o in found)


def reason(m: nn.Module, *inputs: Tensor, **options: Any) -> str:
    """Why no chain is swept."""
    found = outcomes(m, *inputs, tolerance=1e-10, **options)
    assert not any(o.is_swept for o in found)
    (why,) = {o.no_sweep for o in found}
    return why


@pytest.mark.parametrize(
    "how",
    [
        *(pytest.param(how, id=name) for name, how in VARIANTS.items()),
        *(pytest.param(how, id=name, marks=pytest.mark.slow) for name, how in MORE_VARIANTS.items()),
    ],
)
def test_gradients_are_right(how: dict[str, Any]) -> None:
    check(model(**how), x_of())


@pytest.mark.parametrize("batch", some_slow([1, 2, 3, 8, 32, D], {2, 8}))
def test_any_batch(batch: int) -> None:
    check(model(act=torch.tanh), x_of(batch))


def test_single_precision() -> None:
    check(model(act=F.gelu).float(), x_of().float(), tolerance=2e-5)


def test_both_passes_are_one_operator_each() -> None:
    m = model(act=F.gelu)
    with recorded() as records, joint_graphs() as graphs:
        results(m, compiled(m, **EXACT), x_of())
    assert [f.reason for f in records[0].forward] == [""]
    kernels = [n for n in graphs[0].nodes if "hwbp_compile.blocks" in str(n.target)]
    assert len(kernels) == 2
    # What is left of products are the layers at both ends, and the gradients of two weights, batched.
    products = [str(n.target) for n in graphs[0].nodes if "mm" in str(n.target)]
    assert sum("bmm" in p for p in products) == 2
    assert len(products) <= 2 + 6


def test_rows_of_stacked_parameters() -> None:
    m, plain = model(act=F.gelu), model(act=F.gelu)
    expected = results(plain, plain, x_of())[1:2]
    hwbp_compile.stack_parameters(m)
    with recorded() as records, joint_graphs() as graphs:
        found = results(m, compiled(m, **EXACT), x_of())[1:2]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert records[0].outcomes[0].is_swept
    assert not [n for n in graphs[0].nodes if "hwbp_compile.stack" in str(n.target)]
    hwbp_compile.unstack_parameters(m)
    for p, q in zip(m.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-11)


class Heads(nn.Module):
    """Gradients join the residual stream at every state."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(act=F.gelu) for _ in range(BLOCKS))
        self.heads = nn.ModuleList(nn.Linear(D, 2) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            total = total + head(x).sin().sum()
        return total + x


class Tied(nn.Module):
    """One block, applied several times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(act=torch.tanh)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(BLOCKS):
            x = self.block(x)
        return x


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "tensors with rows and shared ones": (Conditioned, 2),
    "an input of the model": (Shared, 2),
    "computed weights": (MaskedWeights, 1),
    "computed weights and masks": (Masked, 2),
    "columns": (lambda: Columns(wide=True), 1),
    "truth values": (lambda: nn.Sequential(*(Truths() for _ in range(BLOCKS))), 1),
    "shared weights": (Tied, 1),
}


class _Summed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(i + 1) * s for i, s in enumerate(self.inner(x))])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_what_blocks_read(name: str, batch: int) -> None:
    make, count = MODELS[name]
    torch.manual_seed(0)
    m = make().double()
    check(m, x_of(batch, D), *[torch.randn(batch, D).double()] * (count - 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_batch_as_large_as_the_state_is_wide(name: str) -> None:
    """Then shapes alone do not tell the batch from what weights have; what is not certain stays as it is."""
    make, count = MODELS[name]
    torch.manual_seed(0)
    m = make().double()
    (outcome,) = outcomes(m, x_of(D, D), *[torch.randn(D, D).double()] * (count - 1))
    is_certain = name in ("tensors with rows and shared ones", "truth values", "shared weights")
    assert outcome.is_swept == is_certain
    assert ("any size" in outcome.no_sweep) == (not is_certain)


@pytest.mark.parametrize("make", [Heads, lambda: _Summed(AllStates())])
def test_gradients_that_join_at_states(make: Callable[[], nn.Module]) -> None:
    """The last block, whose state the loss reads in another way, is of another kind."""
    torch.manual_seed(0)
    (outcome,) = [o for o in outcomes(make().double(), x_of(4, D)) if len(o.found.blocks) >= BLOCKS - 1]
    assert outcome.is_swept
    assert outcome.swept == len(outcome.found.blocks) - 1


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(Tensor.sum, id="sum"),
        pytest.param(lambda x: x.T, id="transposed"),
        pytest.param(lambda x: x.mean(0), id="mean of rows", marks=pytest.mark.slow),
        pytest.param(lambda x: x.sum(-1), id="sum of columns", marks=pytest.mark.slow),
        pytest.param(lambda x: x[:, ::2], id="columns", marks=pytest.mark.slow),
    ],
)
def test_a_last_state_whose_cotangent_is_a_view(loss: Callable[[Tensor], Tensor]) -> None:
    """Such as one number, expanded."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model(act=F.gelu)[:-1]

        def forward(self, x: Tensor) -> Tensor:
            return loss(self.blocks(x))

    check(Model(), x_of())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="swept"),
        pytest.param({"apply": "always", "iterations": 2}, id="iterated", marks=pytest.mark.slow),
    ],
)
def test_passes_are_linear(options: dict[str, Any]) -> None:
    """Twice the blocks take about twice the calls of functions, or less; those of the forward kernel too."""
    with counted_calls() as calls:
        for blocks in (4, 6, 12, 24):
            torch._dynamo.reset()
            with recorded() as records:
                results(m := model(blocks=blocks), compiled(m, **EXACT | options), x_of())
            assert [o.schedule is not None for o in records[0].outcomes] == [True]
            assert [f.blocks for f in records[0].forward] == [blocks]
    _, first, second, third = calls  # the first time modules are imported
    assert third - second < 2.4 * (second - first), calls


def test_two_chains_side_by_side() -> None:
    torch.manual_seed(0)
    check(Towers().double(), x_of(4, D), chains=2)


class Added(nn.Module):
    """Two chains that begin with one cotangent, on which gradients of both hang."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.left = model(act=F.gelu, norm="none")[1:-1]
        self.right = self.left if shared else model(act=F.gelu, norm="none")[1:-1]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x) + self.right(y)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"apply": "always", "iterations": BLOCKS}], ids=["swept", "iterated"]
)
def test_two_chains_that_are_added(shared: bool, options: dict[str, Any]) -> None:
    found = outcomes(Added(shared=shared), x_of(4, D), x_of(4, D).cos(), **options)
    assert [(o.is_swept, o.is_iterated) for o in found] == [(not options, bool(options))] * 2


def test_a_chain_that_begins_inside_of_another() -> None:
    torch.manual_seed(0)
    check(Trunk().double(), x_of(4, D), chains=2)


def test_a_chain_that_reads_another() -> None:
    torch.manual_seed(0)
    check(Reading().double(), x_of(4, D), x_of(4, D).cos(), chains=2)


def test_frozen_weights() -> None:
    m = model(act=F.gelu)
    for i in (1, 3):
        m[i].up.weight.requires_grad_(False)
    check(m, x_of())


def test_dropout_has_one_mask_in_both_passes() -> None:
    m = model(act=torch.tanh, dropout=0.3)
    run, x, direction = compiled(m, **EXACT), x_of(), x_of().cos()

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return run(x).sin().sum()

    with recorded() as records:
        (gradient,) = torch.autograd.grad(value(x.requires_grad_()), x)
    assert records[0].outcomes[0].is_swept
    step = 1e-5 * direction
    slope = (value(x + step) - value(x - step)).detach() / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_two_backward_passes_of_one_step_accumulate() -> None:
    m, x = model(act=F.gelu), x_of()
    y = m(x)
    expected = torch.autograd.grad(y.sum() + y.square().sum(), list(m.parameters()))
    run = compiled(m, **EXACT)
    with recorded() as records:
        y = run(x)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
    assert records[0].outcomes[0].is_swept
    equal([p.grad for p in m.parameters() if p.grad is not None], expected)


class Kinds(nn.Module):
    """Blocks of several kinds, some of which are next to each other."""

    def __init__(self, *kinds: int) -> None:
        super().__init__()
        widths = (HIDDEN, 2 * HIDDEN, D)
        self.blocks = nn.Sequential(*(Block(act=F.gelu, hidden=widths[kind]) for kind in kinds))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class OneNorm(Kinds):
    """All blocks have one norm, whose gradient is a sum over those that are swept and those that are not."""

    def __init__(self, *kinds: int) -> None:
        super().__init__(*kinds)
        for block in self.blocks:
            block.norm = self.blocks[0].norm


class Several(nn.Module):
    """Two chains, one after the other."""

    def __init__(self, *kinds: int) -> None:
        super().__init__()
        self.first, self.between, self.second = Kinds(*kinds), nn.Linear(D, D), Kinds(*kinds[::-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)).tanh())


def _frozen(*kinds: int) -> nn.Module:
    m = Kinds(*kinds)
    for i, block in enumerate(m.blocks):
        block.down.weight.requires_grad_(i % 2 > 0)
    return m


def _in_stacks(*kinds: int) -> nn.Module:
    m = Kinds(*kinds)
    assert hwbp_compile.stack_parameters(m).stacks
    return m


@pytest.mark.parametrize(
    ("make", "swept"), [(OneNorm, [4]), (Several, [4, 4]), (_frozen, [4]), (_in_stacks, [4])]
)
def test_what_is_beside_the_run(make: Callable[..., nn.Module], swept: list[int]) -> None:
    torch.manual_seed(0)
    m = make(0, 0, 1, 0, 0, 0, 0, 2, 0).double()
    assert [o.swept for o in outcomes(m, x_of(4, D))] == swept


@pytest.mark.slow
def test_a_run_in_generated_code() -> None:
    torch.manual_seed(0)
    m = Kinds(0, 0, 1, 0, 0, 0, 0).double()
    assert [o.swept for o in outcomes(m, x_of(4, D), codegen="inductor")] == [4]


@pytest.mark.parametrize(
    ("kinds", "swept"),
    [
        pytest.param([0, 0, 0, 0, 1, 0, 0], 4, id="next to the input", marks=pytest.mark.slow),
        pytest.param([0, 0, 1, 0, 0, 0, 0], 4, id="next to the loss", marks=pytest.mark.slow),
        ([0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0], 4),
    ],
)
def test_of_blocks_of_several_kinds_the_longest_run_is_swept(kinds: list[int], swept: int) -> None:
    torch.manual_seed(0)
    (outcome,) = outcomes(Kinds(*kinds).double(), x_of(4, D))
    assert outcome.swept == swept


def test_blocks_of_kinds_that_alternate_stay_as_they_are() -> None:
    torch.manual_seed(0)
    assert "several kinds" in reason(Kinds(0, 0, 1, 1, 0, 0, 1, 1).double(), x_of(4, D))


@pytest.mark.measured
@pytest.mark.parametrize(
    ("kinds", "is_preferred"), [([0, 1, 0, 0, 0, 0, 0, 0], True), ([0, 0, 1, 0, 0, 0, 0], False)]
)
def test_a_kernel_for_most_blocks_is_preferred(
    kinds: list[int], is_preferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth.Comparison, "reason", "")
    torch.manual_seed(0)
    m, x = Kinds(*kinds).double(), x_of(4, D)
    expected = results(m, m, x)
    with recorded() as records:
        found = results(m, compiled(m, apply="auto", iterations=len(kinds)), x)
    equal(found, expected)
    assert [(o.is_swept, o.is_iterated) for r in records for o in r.outcomes] == [
        (is_preferred, not is_preferred)
    ]


def test_rows_that_depend_on_one_another_stay_as_they_are() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(*(Attending() for _ in range(BLOCKS))).double()
    assert reason(m, 0.1 * x_of(4, D))
    torch._dynamo.reset()
    assert reason(model(norm="batch"), x_of())


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_checkpointed_is_not_kept(every: int) -> None:
    torch.manual_seed(0)
    assert "checkpointed" in reason(Checkpointed(every).double(), x_of(4, D))


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rows" in reason(model(), x_of(limits.MOST_ROWS + 1))
    torch._dynamo.reset()
    monkeypatch.setattr(limits, "MOST_BYTES", 8 * 2 * D * HIDDEN - 1)
    assert "weights are large" in reason(model(), x_of())


def test_open_sizes_stay_as_they_are() -> None:
    m, x = model(), x_of()
    expected = results(m, m, x)
    options = EXACT | {"codegen": "eager"}
    run = torch.compile(m, backend="highway", options=options, dynamic=True)
    with recorded() as records:
        equal(results(m, run, x), expected)
    assert "open" in records[0].outcomes[0].no_sweep


def test_short_chains_stay_as_they_are() -> None:
    assert not reason(model(blocks=3), x_of())
    torch._dynamo.reset()
    check(model(blocks=2), x_of(), min_blocks=2)
    torch._dynamo.reset()
    assert not reason(model(), x_of(), min_blocks=BLOCKS + 1)


def test_never_is_never() -> None:
    m = model()
    expected = results(m, m, x_of())
    with recorded() as records, joint_graphs() as graphs:
        equal(results(m, compiled(m, apply="never"), x_of()), expected)
    assert not any(o.schedule for r in records for o in r.outcomes)
    assert not any("hwbp_compile.blocks" in str(n.target) for g in graphs for n in g.nodes)


def test_always_iterates() -> None:
    found = outcomes(model(), x_of(), apply="always", iterations=BLOCKS)
    assert [o.is_iterated for o in found] == [True]


@pytest.mark.measured
@pytest.mark.parametrize("k", [1, 2, "auto"])
def test_a_kernel_is_preferred_to_iterations(k: int | str) -> None:
    """Gradients are exact although few iterations were allowed."""
    check(model(act=F.gelu), x_of(), iterations=k)


@pytest.mark.measured
def test_nothing_is_watched_where_a_kernel_is_preferred(programs: list[Any]) -> None:
    m, x = model(act=F.gelu), x_of()
    expected = results(m, m, x)
    run = compiled(m, iterations="auto", apply="auto")
    for _ in range(4):
        equal(results(m, run, x), expected)
    assert len(programs) == 1


def test_without_a_compiler_blocks_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise CannotRewrite("the kernel cannot be compiled: no compiler")

    op._of.cache_clear()
    monkeypatch.setattr(BlocksKernel, "__init__", none)
    assert "no compiler" in reason(model(act=F.gelu), x_of())


def test_without_a_compiler_operators_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that finds the compiled model in a cache, but has no compiler."""
    m = model(act=F.gelu)
    expected = results(m, m, x_of())
    run = compiled(m, **EXACT)
    results(m, run, x_of())
    monkeypatch.setattr(op._Blocks, "kernel", "the kernel cannot be compiled: no compiler")
    op._of.cache_clear()
    applied: list[int] = []

    def by_operators(known: Any, *arguments: Any) -> Any:
        applied.append(known.blocks)
        return original(known, *arguments)

    original = op._by_operators
    monkeypatch.setattr(op, "_by_operators", by_operators)
    equal(results(m, run, x_of()), expected)
    assert applied == [BLOCKS, BLOCKS]


def test_an_internal_error_leaves_the_chain_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(decisions, "trace_sweep", fail)
    with caplog.at_level(logging.CRITICAL, "hwbp_compile"):
        assert "ZeroDivisionError" in reason(model(), x_of())
    caplog.clear()


def test_explain_says_so() -> None:
    found = hwbp_compile.explain(model(), x_of(), options=EXACT)
    (chain,) = found.chains
    assert chain.swept == chain.blocks
    assert not chain.applied
    assert chain.iterations is None
    assert chain.new_nodes > 0
    assert found.to_dict()["chains"][0]["swept"] == chain.blocks
    text = " ".join(str(found).split())
    assert "is iterated, 1 swept exactly by one kernel; the backward pass is exact" in text
    assert "exact, by one kernel" in text
    assert f"the forward pass of {BLOCKS} blocks is one kernel" in text


def test_explain_says_why_not() -> None:
    torch.manual_seed(0)
    found = hwbp_compile.explain(Kinds(0, 0, 1, 1, 0, 0).double(), x_of(4, D), options=EXACT)
    assert not found.chains[0].swept
    assert "nor does one kernel compute it: its blocks are of several kinds" in " ".join(str(found).split())


def test_explain_says_of_how_many_blocks(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    m, x = Kinds(0, 0, 1, 0, 0, 0, 0).double(), x_of(4, D).requires_grad_()
    found = hwbp_compile.explain(m, x, options=EXACT)
    assert found.chains[0].swept == 4
    assert "exact, 4 of 7 blocks by one kernel" in " ".join(str(found).split())
    with caplog.at_level(logging.INFO, "hwbp_compile"):
        results(m, compiled(m, **EXACT), x.detach())
    assert "swept by one kernel (4 of the blocks)" in caplog.text


@pytest.mark.parametrize(("kinds", "said"), [([0] * 4, "all"), ([0, 0, 1, 0, 0, 0, 0], "many")])
def test_drawing(kinds: list[int], said: str, tmp_path: Path) -> None:
    """Of blocks that are not swept, it shows what it shows of exact chains."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    found = hwbp_compile.explain(Kinds(*kinds).double(), x_of(4, D).requires_grad_(), options=EXACT)
    text = found.draw(tmp_path / "swept.svg").read_text()
    assert "exact sweep" in text
    assert f"one kernel for {said} blocks" in text
    assert text.count("<!-- blocks.2 -->") == (2 if said == "many" else 1)


def test_a_failure_of_the_passes_leaves_the_graph_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph: torch.fx.Graph, *_: object, **__: object) -> None:
        for node in reversed(graph.nodes):
            graph.erase_node(node)
        raise ZeroDivisionError("a bug")

    m = model()
    expected = results(m, m, x_of())
    monkeypatch.setattr(backend, "rewrite", fail)
    found = results(m, compiled(m, **EXACT), x_of())
    equal(found, expected)
    assert "left out after an internal error" in caplog.text
    caplog.clear()


def test_a_sweep_that_cannot_be_inserted_is_not_said_to_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "closes_a_cycle", lambda *_: True)
    (exact,) = outcomes(model(), x_of())
    assert 'iterations="exact"' in exact.reason
    assert "depends on its own result" in exact.no_sweep
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "prefers_kernels", lambda: True)
    (preferred,) = outcomes(model(), x_of(), iterations=2)
    assert not preferred.is_swept
    assert "depends on its own result" in preferred.reason
    assert not preferred.no_sweep


@pytest.mark.slow
def test_inductor_runs_it_and_finds_it_in_its_cache(tmp_path: Path) -> None:
    """With options at their defaults; compiled code of another process finds the kernels by their text."""
    assert said_by_two_processes(tmp_path, {}, "[o.is_swept for r in calls for o in r.outcomes]") == [
        "passes 1 [True]",
        "passes 0 []",
    ]
