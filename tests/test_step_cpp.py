"""Kernels for CPUs, one program at a time, against the same steps by torch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from step_programs import STEP_CASES, StepCase, arguments, of_library, run_steps
from torch import Tensor

from hwbp_compile import _compat
from hwbp_compile.recurrent.step_cpp import CppRecurrence
from hwbp_compile.recurrent.step_cpp_gates import GATES
from hwbp_compile.recurrent.step_program import NARROWEST

ULP = 2.0**-23


@pytest.mark.parametrize("name", ["lstm 6", "gru 16", "block gru", "layer norm lstm", "s lstm"])
def test_programs(name: str) -> None:
    check_programs(STEP_CASES[name])


def check_programs(case: StepCase) -> None:
    """Sums over rows of one step, of several, and of a last group that is not full; also on two threads."""
    for program, reverse in case.programs(torch.float64, on_the_way=True):
        kernel = CppRecurrence(program, torch.float64, reverse=reverse)
        for steps, batch, threads in ((1, 1, 1), (7, 40, 1), (37, 3, 2), (70, 1, 2)):
            given = arguments(program, steps, batch)
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                found = kernel(*given)
            finally:
                torch.set_num_threads(before)
            expected = run_steps(program, given, batch, reverse=reverse)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_truth_values_of_numbers() -> None:
    """Numbers that are neither 0 nor 1 are true."""

    def step(carry: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        (h,), (x,), (w, u) = carry, inputs, weights
        g = x @ w
        some = torch.logical_or(torch.relu(g).bool(), torch.logical_not(torch.relu(g - 0.2)))
        return [0.5 * h + torch.tanh(h @ u) * torch.logical_and(some, torch.relu(g + 0.3))]

    check_programs(StepCase(step, 1, 6, ((3, 6), (6, 6))))


def test_a_kernel_multiplies_narrow_inputs_by_itself() -> None:
    for inputs, own in ((NARROWEST, True), (NARROWEST + 1, False)):
        program, _ = next(of_library("lstm", 6, inputs).programs(torch.float64, on_the_way=True))
        assert [program.shape(n)[-1] for n in program.inputs] == [inputs if own else 24]


def test_gates_are_accurate() -> None:
    """Also far from zero, next to it, and of what is no number."""
    text = """
    using Real = float;
    using Vec = at::vec::Vectorized<Real>;
    """
    kernel = """
    extern "C" void kernel(const float* x, float* first, float* second, int64_t n) {
        for (int64_t i = 0; i < n; i += Vec::size()) {
            sigmoid(Vec::loadu(x + i)).store(first + i);
            hyperbolic_tangent(Vec::loadu(x + i)).store(second + i);
        }
    }
    """
    source = "#include <torch/csrc/inductor/cpp_prefix.h>\n" + text + GATES + kernel
    run = _compat.load_cpp_kernel(["const float*", "float*", "float*", "int64_t"], source)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-30, -1e-8, 3e38, -3e38])
    x = torch.cat([torch.linspace(-86, 100, 1 << 18), torch.randn(1 << 16) / 10, special.repeat(8)])
    found = torch.empty(2, x.numel())
    run(x, *found, x.numel())
    for result, function in zip(found, (torch.sigmoid, torch.tanh), strict=True):
        exact = function(x.double())
        torch.testing.assert_close(result.double(), exact, rtol=2 * ULP, atol=1e-37, equal_nan=True)
    zero = x == 0
    assert (found[0][zero] == 0.5).all()
    assert (found[1][zero] == 0).all()
