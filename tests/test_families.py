"""Every family: highway equals exact autograd at k = L and the reference at every k, in float64."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from compare import exact, float64, highway, reference, relative_error, rewritten
from families import FAMILIES, Case, Size
from hypothesis import given
from hypothesis import strategies as st
from marks import some_slow
from reference import Settings

TOLERANCE = 1e-10

LARGE = {"resnet"}
"""Left to the slow tests; there is a smaller one of the same kind."""
LONG = {"mixer", "pre_ln_transformer", "two_towers", "two_towers_sum", "parallel_branches", "layer_scale"}
"""Those that take longest to compile of the others, but for one of several chains."""
SEVERAL = {"encoder_decoder", "two_towers", "two_towers_sum", "parallel_branches"}
"""Those of several chains, which take long."""
SPLIT_IN_CI = {"residual_mlp", "lstm_last_step"}
LIKE_OTHERS = {"lstm_loop", "lstm_last_step", "gated_loop", "gated_last_step", "encoder_decoder"}
"""Those that others are built like, of the recurrent ones."""

sizes = st.builds(
    Size,
    depth=st.integers(3, 6),
    width=st.sampled_from([4, 6, 8]),
    batch=st.integers(1, 4),
    length=st.integers(2, 5),
)


def build(family: str, size: Size, seed: int) -> Case:
    torch.manual_seed(seed)
    case = FAMILIES[family](size)
    if (
        any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in case.model.modules())
        and size.batch == 1
    ):
        case.inputs = tuple(torch.cat([i, torch.randn_like(i)]) for i in case.inputs)
    return float64(case)


def check_found(case: Case, records: list) -> None:
    found = rewritten(records)
    assert sorted(n for n, _ in found) == sorted(case.blocks), [o.reason for r in records for o in r.outcomes]
    for kind in case.kinds:
        assert any(kind in name for _, name in found), found


@pytest.mark.parametrize("family", some_slow(FAMILIES, LARGE | LONG | {"encoder_decoder"}))
@given(size=sizes, seed=st.integers(0, 2**31))
def test_exact_at_the_length_of_the_chain(family: str, size: Size, seed: int) -> None:
    case = build(family, size, seed)
    found, records = highway(case, iterations=max(case.blocks))
    check_found(case, records)
    assert relative_error(found, exact(case)) <= TOLERANCE


@pytest.mark.parametrize("family", some_slow(FAMILIES, LARGE | LONG | LIKE_OTHERS | {"preact_resnet"}))
@given(size=sizes, seed=st.integers(0, 2**31), more=st.integers(1, 3))
def test_reference_at_few_iterations(family: str, size: Size, seed: int, more: int) -> None:
    check_iterations(build(family, size, seed), [0, more])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@given(size=sizes, seed=st.integers(0, 2**31))
def test_reference_at_every_k(family: str, size: Size, seed: int) -> None:
    case = build(family, size, seed)
    check_iterations(case, range(max(case.blocks) + 2))


def check_iterations(case: Case, iterations: Iterable[int]) -> None:
    errors, expected = [], exact(case)
    for k in iterations:
        found, records = highway(case, iterations=k)
        check_found(case, records)
        assert relative_error(found, reference(case, Settings(k))) <= TOLERANCE, k
        errors.append(relative_error(found, expected))
    assert max(errors) > 1e-8, "with few iterations the gradient must differ from the exact one"


@pytest.mark.parametrize("family", some_slow(FAMILIES, set(FAMILIES) - SPLIT_IN_CI))
@given(
    size=sizes,
    seed=st.integers(0, 2**31),
    gamma=st.sampled_from([0.0, 0.2, 0.8, 1.0]),
    group_size=st.integers(1, 4),
    exact_tail=st.integers(0, 2),
    iterations=st.integers(0, 2),
)
def test_splits(
    family: str, size: Size, seed: int, gamma: float, group_size: int, exact_tail: int, iterations: int
) -> None:
    case = build(family, size, seed)
    split = {"gamma": gamma, "group_size": group_size, "exact_tail": exact_tail}
    found, records = highway(case, iterations=iterations, **split)
    check_found(case, records)
    assert relative_error(found, reference(case, Settings(iterations, **split))) <= TOLERANCE
    enough = max(-(-(n - exact_tail) // group_size) for n in case.blocks)
    found, _ = highway(case, iterations=enough, **split)
    assert relative_error(found, exact(case)) <= TOLERANCE


ALONE_IN_CI = {"residual_mlp"}


@pytest.mark.parametrize(
    ("option", "value"), [("gamma", 0.3), ("gamma", 1.0), ("group_size", 3), ("exact_tail", 2)]
)
@pytest.mark.parametrize("family", some_slow(FAMILIES, set(FAMILIES) - ALONE_IN_CI))
def test_each_split_alone(family: str, option: str, value: float) -> None:
    case = build(family, Size(depth=5), 3)
    found, _ = highway(case, iterations=1, **{option: value})
    settings = Settings(1, **{option: value})  # type: ignore[arg-type]
    assert relative_error(found, reference(case, settings)) <= TOLERANCE
    plain, _ = highway(case, iterations=1)
    assert relative_error(plain, found) > 1e-6, "the option has no effect"
    found, _ = highway(case, iterations=max(case.blocks), **{option: value})
    assert relative_error(found, exact(case)) <= TOLERANCE


INDUCTOR_IN_CI = {"residual_mlp"}


@pytest.mark.parametrize("family", some_slow(FAMILIES, set(FAMILIES) - INDUCTOR_IN_CI))
def test_inductor_in_single_precision(family: str) -> None:
    size = Size(depth=4, width=8, batch=2, length=4)
    expected = reference(build(family, size, 1), Settings(2))
    torch.manual_seed(1)
    case = FAMILIES[family](size)
    found, records = highway(case, iterations=2, codegen="inductor")
    check_found(case, records)
    assert relative_error([f.double() for f in found], expected) <= 1e-4
