"""The forward pass of equal blocks as one kernel: where it is found, whether it is right, and its limits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import joint_graphs, recorded
from equal_blocks import (
    BLOCKS,
    HIDDEN,
    MORE_VARIANTS,
    VARIANTS,
    Added,
    AllStates,
    Attending,
    Block,
    Branches,
    Checkpointed,
    Columns,
    Conditioned,
    D,
    Detached,
    Masked,
    MaskedWeights,
    OneIsDifferent,
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
from hwbp_compile.blocks import limits, op
from hwbp_compile.blocks.kernel_cpp import BlocksKernel
from hwbp_compile.blocks.step_text import encoded, program_of
from hwbp_compile.errors import CannotRewrite
from hwbp_compile.passes import kernels
from hwbp_compile.passes.pipeline import Record
from hwbp_compile.recurrent.step_program import ROWS

pytestmark = pytest.mark.usefixtures("kernels_op_by_op")


def reasons(records: Sequence[Record]) -> list[str]:
    """Of each run of blocks why it is not one kernel; empty if it is."""
    return [f.reason for r in records for f in r.forward]


def check(m: nn.Module, *inputs: Tensor, runs: int = 1, tolerance: float = 1e-11, **options: Any) -> None:
    """Output and gradients are those of eager torch, and so many runs of blocks are one kernel each."""
    expected = results(m, m, *inputs)
    with recorded() as records:
        found = results(m, compiled(m, **options), *inputs)
    assert reasons(records) == [""] * runs
    equal(found, expected, tolerance)


def reason(m: nn.Module, *inputs: Tensor) -> str:
    """Why the blocks are not one kernel; gradients are right all the same."""
    expected = results(m, m, *inputs)
    with recorded() as records:
        found = results(m, compiled(m), *inputs)
    equal(found, expected, 1e-10)
    (why,) = set(reasons(records))
    assert why
    return why


@pytest.mark.parametrize(
    "how",
    [
        *(pytest.param(how, id=name) for name, how in VARIANTS.items()),
        *(pytest.param(how, id=name, marks=pytest.mark.slow) for name, how in MORE_VARIANTS.items()),
    ],
)
def test_output_and_gradients_are_right(how: dict[str, Any]) -> None:
    check(model(**how), x_of())


@pytest.mark.parametrize("batch", some_slow([1, 2, 3, 8, 32], {2, 8}))
def test_any_batch(batch: int) -> None:
    """One and several rows a thread, whole and partial tiles."""
    check(model(act=torch.tanh, norm="none"), x_of(batch))


def test_batch_as_large_as_the_state_is_wide() -> None:
    """Then shapes alone do not tell the batch from what weights have."""
    check(model(act=torch.tanh), x_of(D))


def test_single_precision() -> None:
    m = model(act=F.gelu).float()
    check(m, x_of().float(), tolerance=2e-5)


@pytest.mark.parametrize("k", some_slow([0, 1, 3], {0}))
def test_fewer_iterations_have_the_same_gradients_as_without_the_kernel(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model(act=F.gelu)
    found = results(m, compiled(m, iterations=k), x_of())
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "uses_kernels", lambda options: False)
    expected = results(m, compiled(m, iterations=k), x_of())
    equal(found, expected)


def test_blocks_read_rows_of_stacked_parameters() -> None:
    m, plain = model(act=F.gelu), model(act=F.gelu)
    expected = results(plain, plain, x_of())[1:2]
    hwbp_compile.stack_parameters(m)
    with recorded() as records, joint_graphs() as graphs:
        found = results(m, compiled(m), x_of())[1:2]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert reasons(records) == [""]
    (node,) = [n for n in graphs[0].nodes if "hwbp_compile.blocks" in str(n.target)]
    assert len(node.args[1]) == 6  # weights, biases, and those of the norm
    hwbp_compile.unstack_parameters(m)
    for p, q in zip(m.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", some_slow([1, 4, D], {4}))
def test_blocks_read_tensors_with_rows_and_shared_ones(batch: int) -> None:
    torch.manual_seed(0)
    check(Conditioned().double(), x_of(batch, D), torch.randn(batch, D).double())


def test_blocks_read_an_input_of_the_model() -> None:
    torch.manual_seed(0)
    check(Shared().double(), x_of(4, D), torch.randn(4, D).double())


@pytest.mark.parametrize("batch", some_slow([1, 4], {1}))
def test_blocks_read_computed_weights_and_masks(batch: int) -> None:
    torch.manual_seed(0)
    check(Masked().double(), x_of(batch, D), torch.randn(batch, D).double())


def test_computed_weights_as_tall_as_the_batch() -> None:
    torch.manual_seed(0)
    check(MaskedWeights().double(), x_of(D, D))


@pytest.mark.parametrize("wide", [True, False])
def test_columns_are_not_taken_for_rows(wide: bool) -> None:
    torch.manual_seed(0)
    check(Columns(wide).double(), x_of(4, D))


def test_truth_values_of_numbers() -> None:
    torch.manual_seed(0)
    check(nn.Sequential(*(Truths() for _ in range(BLOCKS))).double(), x_of(4, D))


def test_sums_of_truth_values_are_left_to_the_compiler() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(*(Added() for _ in range(BLOCKS))).double()
    assert "truth values" in reason(m, x_of(4, D))


def test_signs_of_states_are_computed_of_the_states() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(9, D), *(Branches() for _ in range(BLOCKS))).double()
    check(m, x_of())


class Summing(nn.Module):
    """Adds the sum of all of a state, over no dimension in particular, without a gradient."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.block, self.how = Block(act=torch.tanh), how

    def forward(self, x: Tensor) -> Tensor:
        still = x.detach()
        total = still.sum(dim=()) if self.how == "sum" else still.mean(dim=())
        return self.block(x) + 0.01 * total


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_a_sum_over_rows_without_dimensions_stays_as_it_is(how: str) -> None:
    torch.manual_seed(0)
    assert "mixes the rows" in reason(
        nn.Sequential(*(Summing(how) for _ in range(BLOCKS))).double(), x_of(4, D)
    )


def test_two_chains() -> None:
    torch.manual_seed(0)
    check(Towers().double(), x_of(4, D), runs=2)


@pytest.mark.parametrize("blocks", [pytest.param((6, 8), marks=pytest.mark.slow), (8, 6)])
def test_two_chains_one_after_the_other(blocks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    first, second = ([Block(d=d) for _ in range(n)] for d, n in zip((D, 16), blocks, strict=True))
    m = nn.Sequential(*first, nn.Linear(D, 16), *second).double()
    check(m, x_of(4, D), runs=2, iterations=8)


def test_a_chain_that_begins_inside_of_another() -> None:
    torch.manual_seed(0)
    m, x = Trunk().double(), x_of(4, D)
    expected = results(m, m, x)
    with recorded() as records:
        found = results(m, compiled(m, iterations=20), x)
    assert [(f.blocks, f.reason) for r in records for f in r.forward] == [(10, ""), (BLOCKS, "")]
    equal(found, expected, 1e-10)


def test_a_chain_that_reads_the_states_of_another() -> None:
    torch.manual_seed(0)
    check(Reading().double(), x_of(4, D), x_of(4, D).cos(), runs=2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("other", some_slow([0, -1], {0}))
def test_a_block_at_an_end_is_different(frozen: bool, other: int) -> None:
    """Gradients of its weights are computed with those of the others, from one stack."""
    torch.manual_seed(0)
    blocks = [Block(torch.tanh) for _ in range(BLOCKS + 2)]
    blocks[other] = Block(F.silu)
    blocks[0].down.weight.requires_grad_(not frozen)
    m = nn.Sequential(*blocks).double()
    expected = results(m, m, x_of(4, D))
    with recorded() as records:
        found = results(m, compiled(m, iterations=BLOCKS + 2), x_of(4, D))
    assert reasons(records) == [""]
    equal(found, expected, 1e-10)


def test_states_that_are_returned_have_memory_of_their_own() -> None:
    """They may be written to before the backward pass, and one after the other."""
    torch.manual_seed(0)
    m = AllStates().double()
    x = x_of(4, D)
    expected = [s.clone() for s in m(x)]
    loss = sum((i + 1) * s.square().sum() for i, s in enumerate(m(x)))
    wanted = torch.autograd.grad(loss, list(m.parameters()))
    with recorded() as records:
        states = compiled(m)(x)
    assert reasons(records) == [""]
    for s, e in zip(states, expected, strict=True):
        torch.testing.assert_close(s, e, rtol=1e-11, atol=1e-11)
    assert len({s.untyped_storage().data_ptr() for s in states}) == BLOCKS
    loss = sum((i + 1) * s.square().sum() for i, s in enumerate(states))
    with torch.no_grad():
        for s in compiled(m)(x):
            s.zero_()
    found = torch.autograd.grad(loss, list(m.parameters()))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-10)


def test_what_is_returned_without_a_gradient_may_be_written_to() -> None:
    torch.manual_seed(0)
    m = Detached().double()
    x = x_of(4, D)

    def last(run: Callable[..., Any], write: bool) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            y, inside = run(x)
            for h in inside if write else ():
                h.zero_()
            return y

        return call

    expected = results(m, last(m, write=False), x)
    with recorded() as records:
        found = results(m, last(compiled(m), write=True), x)
    assert reasons(records) == [""]
    equal(found, expected)


def test_output_may_be_written_to_before_the_backward_pass() -> None:
    m = nn.Sequential(*list(model(act=F.gelu))[1:-1])
    x = x_of(4, D)

    def scaled(run: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: run(x).mul_(2.0).sin_()

    expected = results(m, scaled(m), x)
    with recorded() as records:
        found = results(m, scaled(compiled(m)), x)
    assert reasons(records) == [""]
    equal(found, expected)


def test_dropout_has_one_mask_in_both_passes() -> None:
    """The gradient is the slope of the very function that was computed."""
    m = model(act=torch.tanh, dropout=0.3)
    run, x, direction = compiled(m), x_of(), x_of().cos()

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return run(x).sin().sum()

    with recorded() as records:
        (gradient,) = torch.autograd.grad(value(x.requires_grad_()), x)
    assert reasons(records) == [""]
    step = 1e-5 * direction
    with torch.no_grad():
        assert not torch.equal(run(x), run(x))
    slope = (value(x + step) - value(x - step)).detach() / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_rows_that_depend_on_one_another_are_left_to_the_compiler() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(*(Attending() for _ in range(BLOCKS))).double()
    assert reason(m, 0.1 * x_of(4, D))


def test_norms_over_the_batch_are_left_to_the_compiler() -> None:
    m = model(norm="batch")
    torch.manual_seed(0)
    assert reason(m, x_of())


def test_blocks_whose_states_have_a_sequence_are_left_to_the_compiler() -> None:
    m = nn.Sequential(*list(model())[1:-1])
    assert reason(m, torch.randn(2, 3, D).double())


def test_many_rows_are_left_to_the_compiler() -> None:
    assert "rows" in reason(model(), x_of(limits.MOST_ROWS + 1))


def test_large_weights_and_few_rows_are_left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_BYTES", 8 * (2 * D * HIDDEN + HIDDEN + 3 * D) - 1)
    monkeypatch.setattr(limits, "threads_for", lambda rows: torch.get_num_threads() - 1)
    assert "weights are large" in reason(model(), x_of())
    torch._dynamo.reset()
    monkeypatch.setattr(limits, "MOST_BYTES", limits.MOST_BYTES + 1)
    check(model(), x_of())


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_checkpointed_is_not_kept(every: int) -> None:
    torch.manual_seed(0)
    m = Checkpointed(every).double()
    expected = results(m, m, x_of(4, D))
    with recorded() as records:
        found = results(m, compiled(m), x_of(4, D))
    assert all(reasons(records))
    equal(found, expected, 1e-10)


def test_blocks_that_differ_are_not_taken_for_equal() -> None:
    torch.manual_seed(0)
    m = OneIsDifferent().double()
    expected = results(m, m, x_of(4, D))
    found = results(m, compiled(m, iterations=2 * BLOCKS), x_of(4, D))
    equal(found, expected, 1e-10)


def test_constants_that_differ_are_not_taken_for_equal() -> None:
    torch.manual_seed(0)
    slopes = [0.1 * i for i in range(1, BLOCKS + 1)]
    acts = [lambda x, s=s: F.leaky_relu(x, s) for s in slopes]
    m = nn.Sequential(*(Block(act) for act in acts)).double()
    expected = results(m, m, x_of(4, D))
    found = results(m, compiled(m), x_of(4, D))
    equal(found, expected, 1e-10)


def test_without_a_compiler_operators_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a process that finds the compiled model in a cache, but has no compiler."""
    m = model(act=F.gelu)
    expected = results(m, m, x_of())
    run = compiled(m)
    results(m, run, x_of())

    monkeypatch.setattr(op._Blocks, "kernel", "the kernel cannot be compiled: no compiler")
    op._of.cache_clear()
    for _ in range(2):
        found = results(m, run, x_of())
        equal(found, expected)
    (said,) = [r.getMessage() for r in caplog.records if "one operator after the other" in r.getMessage()]
    assert "no compiler" in said


def test_without_a_compiler_blocks_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise CannotRewrite("the kernel cannot be compiled: no compiler")

    op._of.cache_clear()
    monkeypatch.setattr(BlocksKernel, "__init__", none)
    assert "no compiler" in reason(model(act=F.gelu), x_of())


def test_explain_names_the_kernel() -> None:
    found = hwbp_compile.explain(model(), x_of(), options={"apply": "always", "codegen": "eager"})
    assert f"the forward pass of {BLOCKS} blocks is one kernel" in " ".join(str(found).split())
    assert found.graphs[0].fused == (BLOCKS,)
    assert "hwbp_compile.blocks" in found.after[0]


def test_explain_of_half_precision() -> None:
    m, x = model().bfloat16(), x_of().bfloat16()
    found = hwbp_compile.explain(m, x, options={"apply": "always"})
    assert found.graphs[0].fused == ()


def test_a_step_is_the_same_after_it_was_text() -> None:
    with joint_graphs() as graphs:
        results(m := model(act=F.gelu), compiled(m), x_of())
    (node,) = [n for n in graphs[0].nodes if "hwbp_compile.blocks" in str(n.target)]
    known = op._of(node.args[2])
    program = known.program
    again = program_of(encoded(program.graph, len(program.emitted), program.keep))
    assert [str(n.target) for n in again.graph.nodes] == [str(n.target) for n in program.graph.nodes]
    assert program.shape(program.carry[0]) == (ROWS, D)
    assert known.blocks == BLOCKS


@pytest.mark.slow
def test_inductor_runs_it_and_finds_it_in_its_cache(tmp_path: Any) -> None:
    """Compiled code of another process finds the kernel by its text."""
    options = {"iterations": 6, "apply": "always"}
    assert said_by_two_processes(tmp_path, options, "[f.reason for r in calls for f in r.forward]") == [
        "passes 1 ['']",
        "passes 0 []",
    ]


def test_modules_are_not_changed() -> None:
    m = model()
    before = copy.deepcopy(m.state_dict())
    check(m, x_of())
    for name, value in m.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
