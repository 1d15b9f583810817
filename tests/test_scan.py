"""The linear recurrence against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwbp_compile.residual import ResidualPath
from hwbp_compile.scan import linear_scan, scan_path
from hwbp_compile.scan.naive import linear_scan_naive

dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", dtypes)
@given(
    length=st.integers(0, 9),
    width=st.integers(0, 4),
    initial=st.booleans(),
    scalar=st.booleans(),
    strided=st.booleans(),
)
def test_against_the_definition(
    dtype: torch.dtype, length: int, width: int, initial: bool, scalar: bool, strided: bool
) -> None:
    v = torch.randn(width, length).to(dtype).t() if strided else torch.randn(length, width).to(dtype)
    a = torch.rand(length, 1 if scalar else width).to(dtype)
    start = torch.randn(width).to(dtype) if initial else None
    found, expected = linear_scan(v, a, start), linear_scan_naive(v, a, start)
    assert found.dtype == dtype
    assert found.shape == v.shape
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_half_precision_accumulates_in_single() -> None:
    v, a = torch.full((4096, 1), 1e-3, dtype=torch.bfloat16), torch.ones(4096, 1, dtype=torch.bfloat16)
    assert abs(float(linear_scan(v, a)[-1]) / (4096 * float(v[0])) - 1) < 0.01


@pytest.mark.parametrize("initial", [False, True])
def test_operator_checks(initial: bool) -> None:
    start = torch.randn(3) if initial else None
    torch.library.opcheck(
        torch.ops.hwbp_compile.linear_scan.default,
        (torch.randn(5, 3), torch.rand(5, 1), start),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("coefficient", [1.0, 0.5, None, "tensor"])
@pytest.mark.parametrize("terms", [False, True])
def test_one_component(coefficient: object, terms: bool) -> None:
    blocks, first = 6, torch.randn(3).double()
    later = torch.randn(blocks, 3).double() if terms else None
    entry = torch.rand(blocks, 3).double() if coefficient == "tensor" else coefficient
    (found,) = scan_path(ResidualPath(((entry,),)), (0,), (first,), (later,), blocks)  # type: ignore[arg-type]
    row, expected = first, [first]
    for p in range(blocks):
        k = entry[p] if isinstance(entry, torch.Tensor) else 0.0 if entry is None else entry
        row = k * row + (later[p] if later is not None else 0.0)
        expected.append(row)
    torch.testing.assert_close(found, torch.stack(expected))
