"""Triton kernels of recurrences without a GPU: interpreted against torch, compiled for one, and refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from step_programs import STEP_CASES, of_library

from hwbp_compile.errors import CannotRewrite
from hwbp_compile.recurrent.step_triton import TritonRecurrence

INTERPRETED = """
import sys
import torch
from compare import relative_error
from step_programs import STEP_CASES, arguments, run_steps
from hwbp_compile.recurrent.step_triton import TritonRecurrence
# The interpreter knows no products of bfloat16; one row is multiplied in float32.
PRECISIONS = [
    (torch.float64, 1, 1e-11, 4, 5), (torch.float32, 16, 5e-6, 2, 17),
    (torch.float32, 1, 5e-6, 1, 1), (torch.float16, 16, 1e-2, 3, 2), (torch.bfloat16, 1, 5e-2, 3, 2),
]
for name in sys.argv[1:]:
    case = STEP_CASES[name]
    for dtype, rows, tolerance, steps, batch in PRECISIONS if case.hidden == 6 else PRECISIONS[:2]:
        if case.hidden > 100 and rows == 1:
            continue
        torch.manual_seed(0)
        for program, reverse in case.programs(dtype):
            kernel = TritonRecurrence(program, dtype, reverse=reverse, rows=rows)
            given = arguments(program, steps, batch)
            found = kernel(*given)
            expected = run_steps(program, given, batch, reverse=reverse)
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape, (name, dtype)
                error = relative_error([a.double()], [b.double()])
                assert error <= tolerance, (name, dtype, rows, reverse, steps, batch, error)
print("done")
"""

COMPILED = """
import torch, triton
from step_programs import of_library, STEP_CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hwbp_compile.recurrent.step_triton import TritonRecurrence
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64", "bool": "i1", "int64": "i64"}
cases = [("gru 6", STEP_CASES["gru 6"], torch.float64), ("s lstm", STEP_CASES["s lstm"], torch.float32),
         ("gru 64", of_library("gru", 64), torch.float32),
         ("lstm 128", of_library("lstm", 128), torch.bfloat16),
         ("block gru", STEP_CASES["block gru"], torch.bfloat16)]
for name, case, dtype in cases:
    for program, reverse in case.programs(dtype):
        kernel = TritonRecurrence(program, dtype, reverse=reverse).kernel
        nodes = [*program.inputs, *program.shared, *program.carry, *program.carry, *program.results[1]]
        signature = {a: "*" + TYPES[str(n.meta["val"].dtype)[6:]] for a, n in zip(kernel.arg_names, nodes)}
        signature.update(dict.fromkeys(kernel.arg_names[len(nodes):], "i32"))
        source = ASTSource(fn=kernel, signature=signature)
        options = dict(num_warps=8, num_stages=1)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"], name
print("done")
"""


CHAINED = """
import torch
from hwbp_compile.recurrent import recurrence
from hwbp_compile.recurrent.backward import EXACT, Settings
from hwbp_compile.recurrent.cells import STEPS
from hwbp_compile.recurrent.function import recurrent_cell, understand
recurrence._is_for_cpp = lambda device: False
H, B, T = 6, 5, 4

def softmax(h, x, w, c):
    z = h @ w.t() * 0.9 + x
    return torch.exp(z - z.amax(-1, keepdim=True)) * 0.5 + 0.3 * h

def widened(h, x, w, c):
    far = h.detach().double() * 1e8
    return torch.tanh(h @ w.t()) + ((far + x.double()) - far).to(h.dtype)

def spread(h, x, w, c):
    each = h.view(-1, 3, 2).sum(-1, keepdim=True).expand(-1, -1, 2)
    return torch.tanh(h @ w.t() + each.sum(1).sum(-1, keepdim=True) * x)

all_, single, half = [torch.float64], [torch.float32], [torch.float16, torch.bfloat16]
CELLS = {  # of one state: dtypes, whether there is a kernel
    "plain": (lambda h, x, w, c: torch.tanh(h @ w.t() + x), all_ + single, True),
    "first row kept": (lambda h, x, w, c: torch.tanh(h @ w.t() + h[:1] + x), all_, False),
    "first row": (lambda h, x, w, c: torch.tanh(h @ w.t() + 0.3 * h[0] + x), all_, False),
    "first input": (lambda h, x, w, c: torch.tanh(h @ w.t() + h * x[:1]), all_, False),
    "rows moved": (lambda h, x, w, c: torch.tanh(torch.cat([w[:1], h], 0)[:-1] * x + h), all_, False),
    "extremum": (softmax, all_ + single + half, False),
    "widened": (widened, single, False),
    "narrowed": (lambda h, x, w, c: torch.tanh((h @ w.t() * 100).half().to(h.dtype) + x), single, False),
    "both": (lambda h, x, w, c: ((h > 0.3) + (x > 0.4)) * torch.tanh(h @ w.t()) + x, all_, False),
    "either": (lambda h, x, w, c: ((h > 0.3) | (x > 0.4)) * torch.tanh(h @ w.t()) + x, all_, True),
    "any number": (lambda h, x, w, c: torch.logical_and(h, x > 0) * torch.tanh(h @ w.t()) + x, all_, True),
    "no input": (lambda h, x, w, c: torch.tanh(h @ w.t()), all_, True),
    "linear": (lambda h, x, w, c: 0.5 * h + x, all_, True),
    "of each sample": (lambda h, x, w, c: torch.tanh(h @ w.t() + c * x), all_, True),
    "spread": (spread, all_ + single, True),
    "scaled": (lambda h, x, w, c: torch.add(torch.addcmul(x, h, h, value=0.3), h, alpha=-0.5), all_, True),
}

for name, (cell, dtypes, has_kernel) in CELLS.items():
    STEPS[name] = lambda carry, inputs, weights, cell=cell: (cell(carry[0], inputs[0], *weights),)
    for dtype in dtypes:
        torch.manual_seed(0)
        shapes = ((T, B, H), (B, H), (H, H), (B, H))
        x, h, w, c = leaves = [(0.4 * torch.randn(s)).to(dtype).requires_grad_() for s in shapes]
        loop = understand(name, [x[0].detach()], [h.detach()], [w.detach(), c.detach()])[1]
        assert has_kernel != bool(loop), (name, loop)
        for over_time in (True, False):
            (states,), (last,) = recurrent_cell([x], [h], [w, c], name, Settings(EXACT))
            state, expected = h, [h]
            for each in x:
                state = cell(state, each, w, c)
                expected.append(state)
            expected = torch.stack(expected)
            results = (states, expected) if over_time else (last, expected[-1])
            direction = torch.randn_like(results[0])
            found, exact = (
                torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True) for y in results
            )
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 5e-2)
            for a, b in zip((states, *found), (expected, *exact)):
                a, b = (torch.zeros(()) if t is None else t.double() for t in (a, b))
                torch.testing.assert_close(a.expand_as(b), b, rtol=tolerance, atol=tolerance, msg=name)
print("done")
"""

FEW = ["s lstm", "gru 40"]
"""One with several states and maxima, one with gates and tiles that are filled up."""


def run(script: str, *arguments: str, interpret: bool) -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton", minversion="3.9", reason="Triton's interpreter needs 3.9 for today's NumPy")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.path.dirname(__file__)} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "done", done.stderr[-2000:]


@pytest.mark.parametrize(
    "names",
    [FEW, pytest.param([n for n in STEP_CASES if n not in FEW], marks=pytest.mark.slow)],
    ids=["few", "others"],
)
def test_interpreted(names: list[str]) -> None:
    run(INTERPRETED, *names, interpret=True)


@pytest.mark.slow
def test_from_forward_to_backward() -> None:
    """Also of cells that no kernel may be made for."""
    run(CHAINED, interpret=True)


def test_compiled() -> None:
    run(COMPILED, interpret=False)


@pytest.mark.parametrize(
    ("hidden", "dtype", "reason"),
    [
        (600, torch.float32, "too large"),
        (160, torch.float64, "float64"),
        (6, torch.complex64, "no kernel for"),
    ],
)
def test_what_has_no_kernel(hidden: int, dtype: torch.dtype, reason: str) -> None:
    program, _ = next(of_library("gru", hidden).programs(torch.float32))
    with pytest.raises(CannotRewrite, match=reason):
        TritonRecurrence(program, dtype, reverse=False)


def test_a_product_with_one_column_goes_to_no_matrix_unit() -> None:
    program, _ = next(of_library("rnn_tanh", 1).programs(torch.float32))
    with pytest.raises(CannotRewrite, match="single column"):
        TritonRecurrence(program, torch.float32, reverse=False, rows=16)


def test_a_value_is_cut_where_it_is_taken_apart() -> None:
    program, _ = next(STEP_CASES["gru 16"].programs(torch.float32))
    source = TritonRecurrence(program, torch.float32, reverse=False).source
    # Three gates, each a product of its own, and no copy between them.
    assert source.count("tl.sum(k_") == 3


def test_what_is_too_large_for_some_numbers_of_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = next(STEP_CASES["gru 6"].programs(torch.float32))
    kernel = TritonRecurrence(program, torch.float32, reverse=False)
    monkeypatch.setattr("hwbp_compile.recurrent.step_triton._TRIED_STEPS", 1)

    def run(self: TritonRecurrence, *_: object) -> None:
        if self._warps < 4:
            raise RuntimeError("out of registers")

    monkeypatch.setattr(TritonRecurrence, "__call__", run)
    kernel._try(torch.device("cpu"), (1, 2, 4))
    assert kernel._warps == 4
    with pytest.raises(RuntimeError, match="out of registers"):
        kernel._try(torch.device("cpu"), (1, 2))
