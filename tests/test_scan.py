"""The linear recurrence against its definition."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compile import _compat
from hwbp_compile.residual import ResidualPath
from hwbp_compile.scan import cpp, linear_scan, loop, scan_path
from hwbp_compile.scan.naive import linear_scan_naive
from hwbp_compile.scan.path import _running_sum
from hwbp_compile.scan.states import states

dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


IMPLEMENTATIONS = {
    "kernel": linear_scan,
    "loop": lambda v, a, initial=None, reverse=False: loop.linear_scan(v, a, initial, reverse, False),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", dtypes)
@given(
    length=st.integers(0, 9),
    width=st.integers(0, 70),
    initial=st.booleans(),
    scalar=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "every other row", "every other column"]),
    reverse=st.booleans(),
)
def test_against_the_definition(
    implementation: str,
    dtype: torch.dtype,
    length: int,
    width: int,
    initial: bool,
    scalar: bool,
    layout: str,
    reverse: bool,
) -> None:
    def rows(width: int) -> Tensor:
        if layout == "transposed":
            return torch.rand(width, length).to(dtype).t()
        if layout == "every other row":
            return torch.rand(2 * length, width).to(dtype)[::2]
        if layout == "every other column":
            return torch.rand(length, 2 * width).to(dtype)[:, ::2]
        return torch.rand(length, width).to(dtype)

    v, a = rows(width) - 0.5, rows(1 if scalar else width)
    start = torch.randn(width).to(dtype) if initial else None
    found = IMPLEMENTATIONS[implementation](v, a, start, reverse)
    expected = linear_scan_naive(v, a, start, reverse)
    assert found.dtype == dtype
    assert found.shape == v.shape
    assert found.is_contiguous()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(7, 3, 5), (7, 5000), (3, 2, 1, 4), (5,)])
@pytest.mark.parametrize("coefficient", ["full", "row", "all", "last"])
def test_shapes_of_the_coefficients(shape: tuple[int, ...], coefficient: str) -> None:
    v = torch.randn(shape, dtype=torch.float64)
    ones = (1,) * (len(shape) - 1)
    a = {
        "full": torch.rand(shape, dtype=torch.float64),
        "row": torch.rand(shape[0], *ones, dtype=torch.float64),
        "all": torch.rand(1, *ones, dtype=torch.float64).expand(shape[0], *ones),
        "last": torch.rand(shape[0], *ones, dtype=torch.float64)
        if len(shape) == 1
        else torch.rand(shape[0], *ones[:-1], shape[-1], dtype=torch.float64),
    }[coefficient]
    torch.testing.assert_close(linear_scan(v, a), linear_scan_naive(v, a))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    v, a = torch.randn(6, 6001), torch.rand(6, 6001)
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(linear_scan(v, a), linear_scan_naive(v, a))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_accumulates_in_single(implementation: str, dtype: torch.dtype) -> None:
    v, a = torch.full((4096, 1), 1e-3, dtype=dtype), torch.ones(4096, 1, dtype=dtype)
    u = IMPLEMENTATIONS[implementation](v, a)
    assert abs(float(u[-1]) / (4096 * float(v[0])) - 1) < 0.01


def test_a_very_long_scan() -> None:
    """More rows than any stack of frames or any 32-bit offset times a width would allow by accident."""
    u = linear_scan(torch.ones(3_000_000, 2, dtype=torch.float64), torch.full((3_000_000, 1), 0.5).double())
    torch.testing.assert_close(u[-1], torch.full((2,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_gradients(initial: bool, reverse: bool, width: int) -> None:
    v = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    a = torch.rand(5, width, dtype=torch.float64, requires_grad=True)
    start = torch.randn(3, dtype=torch.float64, requires_grad=True) if initial else None
    inputs = (v, a, start, reverse)
    assert torch.autograd.gradcheck(linear_scan, inputs)
    assert torch.autograd.gradgradcheck(linear_scan, inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_operator_checks(initial: bool, reverse: bool) -> None:
    start = torch.randn(3, requires_grad=True) if initial else None
    v, a = torch.randn(5, 3, requires_grad=True), torch.rand(5, 1, requires_grad=True)
    torch.library.opcheck(torch.ops.hwbp_compile.linear_scan.default, (v, a, start, reverse))


def test_operands_that_do_not_fit() -> None:
    v = torch.randn(4, 3)
    for a, initial in (
        (torch.rand(4), None),
        (torch.rand(1, 3), None),
        (torch.rand(3, 1), None),
        (torch.rand(4, 2), None),
        (torch.rand(4, 3), torch.rand(1)),
        (torch.rand(4, 3), torch.rand(1, 3)),
    ):
        with pytest.raises(ValueError, match="broadcasts to it"):
            linear_scan(v, a, initial)
        with pytest.raises(ValueError, match="broadcasts to it"):
            torch.ops.hwbp_compile.linear_scan(v, a, initial)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        linear_scan(v, torch.rand(4, 3).double())
    with pytest.raises(ValueError, match="one floating-point dtype"):
        linear_scan(v.int(), torch.ones(4, 3).int())


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(_compat, "load_cpp_kernel", broken)
    cpp.kernel.cache_clear()
    try:
        v, a = torch.randn(6, 3), torch.rand(6, 3)
        torch.testing.assert_close(linear_scan(v, a), linear_scan_naive(v, a))
        linear_scan(v, a)
    finally:
        cpp.kernel.cache_clear()
    assert [r for r in caplog.records if "slow loop" in r.message and "no compiler here" in r.message]
    assert len(caplog.records) == 1, "said once"


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("coefficient", ["one", "number", "row", "all rows", "full"])
@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize(("length", "width"), [(0, 3), (1, 1), (7, 3000), (90, 5000)])
def test_states(
    dtype: torch.dtype,
    coefficient: str,
    compiler: bool,
    length: int,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several threads each has a stretch of its own; of few elements one has them all."""
    if not compiler:
        monkeypatch.setattr(cpp, "kernel", lambda _: None)
    terms, first = (torch.randn(2 * length, width) / 8).to(dtype)[::2], torch.randn(width).to(dtype)
    ones = torch.ones(length, 1, dtype=dtype)
    given, same = {
        "one": (1.0, ones),
        "number": (0.75, 0.75 * ones),
        "row": (a := torch.rand(length, 1).to(dtype), a),
        "all rows": (a := torch.rand(1, width).to(dtype).expand(length, width), a),
        "full": (a := torch.rand(length, width).to(dtype), a),
    }[coefficient]
    found = states(first, terms, given)
    assert found.is_contiguous()
    assert torch.equal(found[0], first)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    expected = linear_scan_naive(terms, same, first)
    torch.testing.assert_close(found[1:], expected, rtol=tolerance, atol=tolerance)


def test_states_as_an_operator() -> None:
    first, terms = torch.randn(3), torch.randn(5, 3)
    for a in (None, torch.rand(5, 1)):
        torch.library.opcheck(torch.ops.hwbp_compile.states.default, (first, terms, a))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_states_that_do_not_fit(device: str) -> None:
    first, terms = torch.randn(3, device=device), torch.randn(5, 3, device=device)
    with pytest.raises(ValueError, match="broadcasts to it"):
        states(first[:2], terms, 1.0)
    with pytest.raises(ValueError, match="broadcasts to it"):
        states(first, terms, torch.rand(4, 1, device=device))
    with pytest.raises(ValueError, match="one floating-point dtype"):
        states(first.double(), terms, 0.5)


@pytest.mark.parametrize(
    ("coefficient", "dtype"),
    [
        *((coefficient, dtype) for coefficient in (1.0, 0.5, None, "tensor") for dtype in dtypes),
        (1.0, torch.complex128),  # kernels have no complex numbers
        (None, torch.complex128),
    ],
)
@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_one_component(coefficient: object, terms: bool, traced: bool, dtype: torch.dtype) -> None:
    blocks, first = 6, torch.randn(3).to(dtype)
    later = torch.randn(blocks, 3).to(dtype) if terms else None
    entry = torch.rand(blocks, 3).to(dtype) if coefficient == "tensor" else coefficient

    def scanned(*tensors: Tensor) -> Tensor:
        path = ResidualPath(((entry,),))  # type: ignore[arg-type]
        (found,) = scan_path(path, (0,), tensors[:1], (tensors[1] if terms else None,), blocks)
        return found

    inputs = (first,) if later is None else (first, later)
    found = (make_fx(scanned)(*inputs) if traced else scanned)(*inputs)
    row, expected = first, [first]
    for p in range(blocks):
        k = entry[p] if isinstance(entry, torch.Tensor) else 0.0 if entry is None else entry
        row = k * row + (later[p] if later is not None else 0.0)
        expected.append(row)
    tolerance = 2e-2 if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(found, torch.stack(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("coefficient", [1.0, 0.5, "tensor"])
def test_gradients_of_a_path(coefficient: float | str) -> None:
    """Of a solver on its own: in graphs nothing is differentiated."""
    first, later, tensor = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3,), (5, 3), (5, 3))
    )

    def scanned(first: Tensor, later: Tensor, tensor: Tensor) -> Tensor:
        path = ResidualPath(((tensor if coefficient == "tensor" else coefficient,),))  # type: ignore[arg-type]
        return scan_path(path, (0,), (first,), (later,), 5)[0]

    assert torch.autograd.gradcheck(scanned, (first, later, tensor))


@pytest.mark.parametrize("dtype", dtypes)
def test_running_sum(dtype: torch.dtype) -> None:
    """What stands for the recurrence in graphs for GPUs, with a number of rows that is not known."""
    traced = make_fx(lambda u, v: _running_sum(u, v, v.shape[0]), tracing_mode="symbolic")
    graph = traced(torch.randn(3).to(dtype), torch.randn(4, 3).to(dtype))
    first, terms = torch.randn(3).to(dtype), torch.randn(9, 3).to(dtype)
    expected = states(first, terms, 1.0)
    tolerance = 2e-2 if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(graph(first, terms), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_scans_of_all_iterations_read_the_same_coefficients() -> None:
    """An LSTM's are its forget gates the other way round: made once, not anew for each scan."""
    m = torch.nn.LSTM(3, 8)
    options = {"iterations": 2, "apply": "always", "group_size": 1}
    c = torch.compile(m, backend="highway", options=options, dynamic=False)
    with fresh_cache():
        _, code = run_and_get_code(lambda: c(torch.randn(64, 2, 3))[0].sum().backward())
    calls = re.findall(r"hwbp_compile\.states\.default\((.*)\)", code[-1])
    read = [re.findall(r"\bbuf\d+", arguments)[-1] for arguments in calls]
    assert len(read) == 3
    assert len(set(read)) == 1
