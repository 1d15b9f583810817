"""How tensors lie in memory, against torch's own answers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compile.passes.strides import inverse, is_contiguous, order_of

permuted = st.lists(st.integers(0, 3), max_size=4).flatmap(
    lambda sizes: st.permutations(range(len(sizes))).map(lambda order: torch.empty(sizes).permute(order))
)


@given(value=permuted)
def test_the_order_lays_memory_out_in_a_row(value: torch.Tensor) -> None:
    order = order_of(value)
    assert order is not None
    assert value.permute(order).is_contiguous()
    assert value.permute(order).permute(inverse(order)).stride() == value.stride()
    assert is_contiguous(value, order) == value.is_contiguous()


def test_what_is_not_there_once_has_no_order() -> None:
    assert order_of(torch.empty(1, 3).expand(2, 3)) is None
    assert order_of(torch.empty(4, 6)[:, ::2]) is None
    assert order_of(torch.empty(4, 6)[:, :5]) is None


def test_symbols_leave_no_trace() -> None:
    """Asked while something else is traced, of tensors that this trace does not know."""
    seen: list[list[int] | None] = []

    def outer(known: torch.Tensor) -> torch.Tensor:
        assert isinstance(known.shape[0], torch.SymInt)
        values = [known, known.transpose(0, 1), known[:, :2]]

        def inner(x: torch.Tensor) -> torch.Tensor:
            seen.extend(order_of(value) for value in values)
            return x + 1

        assert len(make_fx(inner)(torch.ones(2)).graph.nodes) == 3
        return known

    make_fx(outer, tracing_mode="symbolic")(torch.empty(5, 7, 3))
    assert seen == [[0, 1, 2], [1, 0, 2], None]
