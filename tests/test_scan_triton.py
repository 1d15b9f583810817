"""The Triton kernel of the linear recurrence without a GPU: interpreted, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.9", reason="Triton's interpreter needs 3.9 for today's NumPy")

INTERPRETED = """
import torch
from hwbp_compile.scan import triton
from hwbp_compile.scan.naive import linear_scan_naive
kernel = triton.kernel()
triton._MANY_TILES = 3  # of more the interpreter takes long
tolerances = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
torch.manual_seed(0)
for dtype, tolerance in tolerances.items():
    # Less than a tile, several, a whole number of them, so many that all are worked on at once; one column,
    # more than a program's.
    more = [(1, 1), (64, 16), (150, 5)] if ALL else [(64, 3), (150, 2)] if dtype.itemsize == 4 else []
    for rows, columns in ((3, 20), *more, *([(200, 2)] * (dtype == torch.float32))):
        for scalar in (False, True) if ALL or rows == 3 else (rows == 150,):
            for reverse in (False, True):
                v = torch.randn(2 * rows, columns).to(dtype)[::2]
                a = torch.rand(rows, 1 if scalar else columns).to(dtype)
                for initial in (None, torch.randn(columns).to(dtype)):
                    whole = initial is not None and not reverse
                    found = kernel(v, a, initial, reverse, whole)
                    expected = linear_scan_naive(v, a, initial, reverse)
                    if whole:
                        expected = torch.cat([initial.unsqueeze(0), expected])
                    assert found.dtype == dtype and found.is_contiguous()
                    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
# Without coefficients all are one.
v, first = torch.randn(70, 3), torch.randn(3)
expected = torch.cat([first.unsqueeze(0), first + v.cumsum(0)])
torch.testing.assert_close(kernel(v, None, first, False, True), expected, rtol=1e-5, atol=1e-5)
# The products of coefficients overflow, what they multiply is zero.
for rows in (130, 210):
    v, a = torch.zeros(rows, 3), torch.full((rows, 3), 8.0)
    v[-1] = 1
    torch.testing.assert_close(kernel(v, a, None, False, False), linear_scan_naive(v, a))
# Half precision would stay at a quarter: what is added is less than half of its last place there.
v, a = torch.full((512, 1), 1e-3, dtype=torch.bfloat16), torch.ones(512, 1, dtype=torch.bfloat16)
assert abs(float(kernel(v, a, None, False, False)[-1]) / (512 * float(v[0])) - 1) < 0.01
print("done")
"""

COMPILED = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hwbp_compile.scan.triton import kernel
kernels = [c.cell_contents for c in kernel().__closure__ if isinstance(c.cell_contents, triton.JITFunction)]
assert len(kernels) == 2
single, double = tl.float32, tl.float64
for element, wide, whole in (
    ("fp32", single, True), ("bf16", single, False), ("fp64", double, False), ("mixed", single, True)
):
    for uniform in (True, False):
        for each in kernels:
            constants = dict(UNIFORM=uniform, HAS_INITIAL=True, REVERSE=not whole, WHOLE=whole, WIDE=wide)
            constants.update(TILE=64, COLUMNS=16)
            constants = {n: c for n, c in constants.items() if n in each.arg_names}
            signature = {n: "constexpr" if n in constants else "i32" for n in each.arg_names}
            pointers = {n for n in ("v", "a", "initial", "u", "products", "totals") if n in signature}
            # What tiles begin with is wide, from an initial row that may be narrow.
            kinds = {"initial": "bf16"} if element == "mixed" else {}
            named = "fp32" if element == "mixed" else element
            signature.update({n: "*" + kinds.get(n, named) for n in pointers})
            places = {(each.arg_names.index(n),): value for n, value in constants.items()}
            source = ASTSource(fn=each, signature=signature, constexprs=places)
            assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print("done")
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("ALL = False" + INTERPRETED, id="interpreted"),
        pytest.param("ALL = True" + INTERPRETED, id="interpreted, all", marks=pytest.mark.slow),
        pytest.param(COMPILED, id="compiled"),
    ],
)
def test_kernel(script: str, request: pytest.FixtureRequest) -> None:
    if "compiled" in request.node.name:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    else:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # Triton wants a kernel's source in a file, and decides at import whether it interprets.
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "done", done.stderr[-2000:]
