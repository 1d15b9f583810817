"""The solver on its own, in eager mode, over plain systems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hwbp_compile import solve
from hwbp_compile.residual import ResidualPath
from hwbp_compile.solvers.iterate import sweep
from hwbp_compile.system import ReferenceSystem

N = 5


def dense_system(
    blocks: int, seed: int, size: int, cyclic: bool, direct: bool
) -> tuple[ReferenceSystem, Tensor]:
    """Random J (dense) and K (diagonal, identity, scalar or none); and the whole Jacobian per block."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 0.4

    j = rand(blocks, size, size, N, N)
    entries = []
    full = j.clone()
    for a in range(size):
        row: list[Tensor | float | None] = []
        for b in range(size):
            kind = (seed + a + 2 * b) % 4
            if a < b and not cyclic:
                row.append(None)
            elif kind == 0:
                row.append(1.0)
                full[:, a, b] += torch.eye(N, dtype=torch.float64)
            elif kind == 1:
                row.append(0.7)
                full[:, a, b] += 0.7 * torch.eye(N, dtype=torch.float64)
            elif kind == 2:
                row.append(None)
            else:
                d = rand(blocks, N)
                row.append(d)
                full[:, a, b] += torch.diag_embed(d)
        entries.append(tuple(row))

    def vjp(p: int) -> object:
        return lambda w: tuple(sum(j[p, a, b] @ w[b] for b in range(size)) for a in range(size))

    later = tuple(rand(blocks, N) if direct and a == 0 else None for a in range(size))
    system = ReferenceSystem(
        tuple(rand(N) for _ in range(size)),
        [vjp(p) for p in range(blocks)],
        ResidualPath(tuple(entries)),
        later,  # type: ignore[misc]
    )
    return system, full


def solve_densely(system: ReferenceSystem, full: Tensor) -> list[Tensor]:
    """Backpropagation by the full Jacobians, one block after the other."""
    rows = [list(system.first)]
    size = len(system.first)
    for p in range(system.blocks):
        new = [sum(full[p, a, b] @ rows[-1][b] for b in range(size)) for a in range(size)]
        rows.append([x if b is None else x + b[p] for x, b in zip(new, system.later, strict=True)])  # type: ignore[misc]
    return [torch.stack([r[a] for r in rows]) for a in range(size)]


@given(
    blocks=st.integers(1, 9),
    seed=st.integers(0, 1000),
    size=st.integers(1, 3),
    cyclic=st.booleans(),
    direct=st.booleans(),
    gamma=st.sampled_from([0.0, 0.3, 1.0]),
    group_size=st.integers(1, 10),
    tail=st.integers(0, 10),
)
def test_exact_after_as_many_iterations_as_groups(
    blocks: int, seed: int, size: int, cyclic: bool, direct: bool, gamma: float, group_size: int, tail: int
) -> None:
    system, full = dense_system(blocks, seed, size, cyclic, direct)
    groups = -(-max(blocks - tail, 0) // group_size)
    w = solve(system, iterations=groups, gamma=gamma, group_size=group_size, exact_tail=tail)
    for found, expected in zip(w, solve_densely(system, full), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@given(blocks=st.integers(2, 7), seed=st.integers(0, 1000), k=st.integers(0, 3))
def test_after_k_iterations_the_first_k_states_are_exact_and_later_ones_are_not(
    blocks: int, seed: int, k: int
) -> None:
    system, full = dense_system(blocks, seed, 1, False, True)
    (w,) = solve(system, iterations=k)
    (expected,) = solve_densely(system, full)
    exact = min(k, blocks)
    torch.testing.assert_close(w[: exact + 1], expected[: exact + 1], rtol=1e-10, atol=1e-12)
    if k < blocks:
        assert not torch.allclose(w[exact + 1], expected[exact + 1])


@given(blocks=st.integers(2, 6), seed=st.integers(0, 1000), k=st.integers(0, 4))
def test_paths_that_cross_at_most_k_blocks(blocks: int, seed: int, k: int) -> None:
    """The paper's theorem 2: the sum over all paths from the loss that cross at most k blocks."""
    system, full = dense_system(blocks, seed, 1, False, False)
    j = torch.stack(
        [
            torch.stack([system._vjps[p]((e,))[0] for e in torch.eye(N, dtype=torch.float64)], 1)
            for p in range(blocks)
        ]
    )
    residual = full[:, 0, 0] - j
    # by_count[c]: the cotangent along paths that have crossed exactly c blocks
    by_count = [system.first[0]] + [torch.zeros(N, dtype=torch.float64)] * blocks
    rows = [sum(by_count[: k + 1])]
    for p in range(blocks):
        by_count = [residual[p] @ v + (j[p] @ by_count[c - 1] if c else 0) for c, v in enumerate(by_count)]
        rows.append(sum(by_count[: k + 1]))
    (w,) = solve(system, iterations=k)
    torch.testing.assert_close(w, torch.stack(rows), rtol=1e-9, atol=1e-12)


def test_fixed_point_iteration_ignores_the_residual_path() -> None:
    system, _ = dense_system(5, 4, 1, False, False)
    (w,) = solve(system, iterations=0, gamma=1.0)
    assert torch.equal(w[1:], torch.zeros_like(w[1:]))


def test_sweep_is_exact_backpropagation() -> None:
    system, full = dense_system(6, 3, 2, True, True)
    for found, expected in zip(sweep(system, system.first, 0, 6), solve_densely(system, full), strict=True):
        torch.testing.assert_close(found, expected)


def test_more_iterations_than_blocks_change_nothing() -> None:
    system, _ = dense_system(4, 7, 1, False, True)
    assert torch.equal(solve(system, iterations=4)[0], solve(system, iterations=400)[0])


def test_compose_and_scale() -> None:
    a = ResidualPath(((2.0, None), (torch.full((3, 1), 3.0), 1.0)))
    b = ResidualPath(((0.5, 1.0), (None, 4.0)))
    c = a.compose(b)
    assert c.entries[0] == (1.0, 2.0)
    x, y = c.entries[1]
    assert isinstance(x, Tensor)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(x, torch.full((3, 1), 1.5))
    torch.testing.assert_close(y, torch.full((3, 1), 7.0))
    assert a.scaled(0.0).is_zero
    assert a.scaled(0.5).entries[0][0] == 1.0
    with pytest.raises(ValueError, match="square"):
        ResidualPath(((1.0, 2.0),))


def test_split_triangular_keeps_everything_and_orders_it() -> None:
    cycle = ResidualPath(((1.0, 2.0, None), (3.0, None, None), (4.0, 5.0, 6.0)))
    kept, rest, order = cycle.split_triangular()
    assert not rest.is_zero
    for i in range(3):
        for j in range(3):
            assert (kept.entries[i][j], rest.entries[i][j]).count(None) >= 1
            assert cycle.entries[i][j] in (kept.entries[i][j], rest.entries[i][j])
            if i != j and kept.entries[i][j] is not None:
                assert order.index(j) < order.index(i)
