"""Every batching rule against one call per block; and no rule that loops over the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.inductor_prims  # registers prims.fma
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from hwbp_compile.errors import CannotRewrite
from hwbp_compile.passes import batch_rules  # noqa: F401 - registers the rules
from hwbp_compile.passes.batch import RULES, Stacked, batched_call
from hwbp_compile.passes.rows import gather, interleave

aten = torch.ops.aten
N = 3


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def attention(*, mask: Tensor | None = None, stacked: bool = True) -> tuple[Any, dict[str, Any]]:
    shape = (2, 2, 4, 4)
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    rows = []
    for _ in range(N if stacked else 1):
        q, k, v = (rand(*shape) for _ in range(3))
        out, lse = forward(q, k, v, attn_mask=mask)
        rows.append((rand(*shape), q, k, v, out, lse))
    columns = [Stacked(torch.stack(c)) for c in zip(*rows, strict=True)]
    return (*columns, 0.0, False), {"attn_mask": mask}


def calls() -> dict[str, Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    s = lambda *shape: Stacked(rand(N, *shape))  # noqa: E731
    conv = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])
    down = ([2, 2], [1, 1], [1, 1], False, [0, 0], 2, [True, False, False])
    mask4 = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    return {
        "view": lambda: (aten.view.default, (s(4, 6), [8, 3]), {}),
        "view of a transpose": lambda: (
            aten.view.default,
            (Stacked(rand(4, N, 6).transpose(0, 1)), [24]),
            {},
        ),
        "clone": lambda: (aten.clone.default, (s(2, 3, 4, 4),), {"memory_format": torch.channels_last}),
        "cast": lambda: (torch.ops.prims.convert_element_type.default, (s(3), torch.float32), {}),
        "fma": lambda: (torch.ops.prims.fma.default, (s(2, 3), s(2, 3), s(2, 3)), {}),
        "mul": lambda: (aten.mul.Tensor, (s(4, 2, 3), s(2, 1)), {}),
        "mul by a shared value": lambda: (aten.mul.Tensor, (s(2, 3), rand(4, 2, 3)), {}),
        "where": lambda: (
            aten.where.self,
            (Stacked(rand(N, 2, 3) > 0), s(2, 3), torch.zeros((), dtype=torch.float64)),
            {},
        ),
        "select_scatter": lambda: (aten.select_scatter.default, (rand(3, 2, 4), s(2, 4), 0, 1), {}),
        "select_scatter from behind": lambda: (aten.select_scatter.default, (s(3, 2, 4), s(3, 2), -1, 1), {}),
        "slice_scatter": lambda: (aten.slice_scatter.default, (rand(3, 4), s(3, 2), 1, 1, 3), {}),
        "mm": lambda: (aten.mm.default, (s(2, 3), s(3, 4)), {}),
        "mm with a shared weight": lambda: (aten.mm.default, (s(2, 3), rand(3, 4)), {}),
        "mm with a shared gradient": lambda: (aten.mm.default, (rand(2, 3), s(3, 4)), {}),
        "addmm": lambda: (aten.addmm.default, (s(4), s(2, 3), s(3, 4)), {}),
        "addmm with a shared weight": lambda: (aten.addmm.default, (rand(4), s(2, 3), rand(3, 4)), {}),
        "addmm with a shared matrix": lambda: (aten.addmm.default, (rand(2, 4), s(2, 3), rand(3, 4)), {}),
        "bmm": lambda: (aten.bmm.default, (s(5, 2, 3), s(5, 3, 4)), {}),
        "sum": lambda: (aten.sum.dim_IntList, (s(2, 3, 4), [0, 2], True), {}),
        "sum from behind": lambda: (aten.sum.dim_IntList, (s(2, 3, 4), [-1, 0]), {}),
        "sum of everything": lambda: (aten.sum.default, (s(2, 3),), {}),
        "mean": lambda: (aten.mean.dim, (s(2, 3, 4), [1], True), {}),
        "amax": lambda: (aten.amax.default, (s(2, 3), [-2]), {}),
        "split": lambda: (aten.split.Tensor, (s(6, 4), 2), {}),
        "split from behind": lambda: (aten.split.Tensor, (s(6, 4), 3, -1), {}),
        "split_with_sizes": lambda: (aten.split_with_sizes.default, (s(6, 4), [1, 3], 1), {}),
        "unbind": lambda: (aten.unbind.int, (s(3, 4),), {}),
        "transpose": lambda: (aten.transpose.int, (s(2, 3, 4), 0, -1), {}),
        "unsqueeze": lambda: (aten.unsqueeze.default, (s(2, 3), 2), {}),
        "unsqueeze at the end": lambda: (aten.unsqueeze.default, (s(2, 3), -1), {}),
        "squeeze": lambda: (aten.squeeze.dim, (s(2, 1, 3), 1), {}),
        "squeeze dimensions": lambda: (aten.squeeze.dims, (s(1, 2, 1), [0, -1]), {}),
        "squeeze all": lambda: (aten.squeeze.default, (s(2, 1, 3),), {}),
        "flip": lambda: (aten.flip.default, (s(2, 3), [0, -1]), {}),
        "rev": lambda: (torch.ops.prims.rev.default, (s(2, 3), [0]), {}),
        "cumsum": lambda: (aten.cumsum.default, (s(2, 3), 0), {}),
        "slice by default": lambda: (aten.slice.Tensor, (s(5, 3),), {"start": 2}),
        "stack": lambda: (aten.stack.default, ([s(2, 3), s(2, 3)], 2), {}),
        "stack in front": lambda: (aten.stack.default, ([s(2, 3), rand(2, 3)],), {}),
        "cat by keyword": lambda: (aten.cat.default, ([s(2, 3), s(2, 1)],), {"dim": -1}),
        "expand to more dimensions": lambda: (aten.expand.default, (s(2, 1), [5, 2, -1]), {}),
        "permute from behind": lambda: (aten.permute.default, (s(2, 3, 4), [-1, 0, 1]), {}),
        "permute": lambda: (aten.permute.default, (s(2, 3, 4), [2, 0, 1]), {}),
        "expand": lambda: (aten.expand.default, (s(2, 1), [2, 5]), {}),
        "cat": lambda: (aten.cat.default, ([s(2, 3), rand(2, 1), s(2, 2)], 1), {}),
        "slice": lambda: (aten.slice.Tensor, (s(5, 3), 0, 1, 4), {}),
        "select": lambda: (aten.select.int, (s(5, 3), 1, 2), {}),
        "pad": lambda: (aten.constant_pad_nd.default, (s(2, 3), [1, 1]), {}),
        "convolution": lambda: (
            aten.convolution_backward.default,
            (s(2, 4, 5, 5), s(2, 3, 5, 5), s(4, 3, 3, 3), None, *conv),
            {},
        ),
        "grouped convolution": lambda: (
            aten.convolution_backward.default,
            (s(2, 6, 3, 3), s(2, 4, 6, 6), s(6, 2, 3, 3), None, *down),
            {},
        ),
        "convolution with a shared weight": lambda: (
            aten.convolution_backward.default,
            (s(2, 4, 5, 5), s(2, 3, 5, 5), rand(4, 3, 3, 3), None, *conv),
            {},
        ),
        "convolution and its weight": lambda: (
            aten.convolution_backward.default,
            (s(2, 4, 5, 5), s(2, 3, 5, 5), s(4, 3, 3, 3), [4], *conv[:-1], [True, True, True]),
            {},
        ),
        "weight of a grouped convolution": lambda: (
            aten.convolution_backward.default,
            (s(2, 6, 3, 3), s(2, 4, 6, 6), s(6, 2, 3, 3), None, *down[:-1], [False, True, False]),
            {},
        ),
        "one weight of several convolutions": lambda: (
            aten.convolution_backward.default,
            (s(2, 4, 5, 5), s(2, 3, 5, 5), rand(4, 3, 3, 3), [4], *conv[:-1], [False, True, True]),
            {},
        ),
        "bias of a convolution": lambda: (
            aten.convolution_backward.default,
            (s(2, 4, 5, 5), s(2, 3, 5, 5), s(4, 3, 3, 3), [4], *conv[:-1], [False, False, True]),
            {},
        ),
        "attention": lambda: (
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            *attention(),
        ),
        "attention with a mask": lambda: (
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            *attention(mask=mask4),
        ),
        "attention with a flat mask": lambda: (
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            *attention(mask=torch.randn(4, 4, dtype=torch.float64)),
        ),
    }


def row(value: Any, i: int) -> Any:
    return value.value[i] if isinstance(value, Stacked) else value


@pytest.mark.parametrize("name", list(calls()))
def test_rule_equals_one_call_per_block(name: str) -> None:
    target, args, kwargs = calls()[name]()
    is_stacked = lambda x: isinstance(x, Stacked)  # noqa: E731
    found = pytree.tree_leaves(batched_call(target, args, kwargs, N, None), is_leaf=is_stacked)  # type: ignore[arg-type]
    for i in range(N):
        a, k = pytree.tree_map(lambda x, i=i: row(x, i), (args, kwargs), is_leaf=is_stacked)
        single = aten.reshape.default if target is aten.view.default else target
        expected = [e for e in pytree.tree_leaves(single(*a, **k)) if isinstance(e, Tensor)]
        rows = [f.value[i] for f in found if isinstance(f, Stacked)]
        assert len(rows) == len(expected)
        for f, e in zip(rows, expected, strict=True):
            torch.testing.assert_close(f, e)


@pytest.mark.parametrize("name", list(calls()))
def test_number_of_nodes_does_not_depend_on_the_number_of_blocks(name: str) -> None:
    counts = []
    for blocks in (2, 3, 7):
        target, args, kwargs = calls()[name]()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf.value for leaf in leaves if isinstance(leaf, Stacked)]
        repeated = [torch.cat([t] * 3)[:blocks].clone() for t in tensors]

        def run(
            *values: Tensor,
            leaves: Any = leaves,
            spec: Any = spec,
            target: Any = target,
            blocks: int = blocks,
        ) -> Any:
            it = iter(values)
            filled = [Stacked(next(it)) if isinstance(leaf, Stacked) else leaf for leaf in leaves]
            a, k = pytree.tree_unflatten(filled, spec)
            out = batched_call(target, a, k, blocks, None)  # type: ignore[arg-type]
            return [o.value for o in pytree.tree_leaves(out) if isinstance(o, Stacked)]

        graph = make_fx(run)(*repeated).graph
        graph.eliminate_dead_code()
        counts.append(len(graph.nodes))
    assert len(set(counts)) == 1, counts


def test_attention_with_dropout_is_refused() -> None:
    (*columns, _, causal), kwargs = attention()
    target = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    with pytest.raises(CannotRewrite, match="dropout"):
        batched_call(target, (*columns, 0.1, causal), kwargs, N, None)  # type: ignore[arg-type]


def test_vmap_fallback_is_restored_after_a_refusal() -> None:
    before = torch._C._functorch._is_vmap_fallback_enabled()
    with pytest.raises(CannotRewrite, match="cannot be batched"):
        batched_call(aten.histc.default, (Stacked(torch.rand(N, 8)),), {}, N, None)  # type: ignore[arg-type]
    assert torch._C._functorch._is_vmap_fallback_enabled() == before


def test_rules_are_registered_by_schema_name() -> None:
    assert all("::" in name for name in RULES)


@pytest.mark.parametrize(
    "rows", [[0], [3], [0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7], [2, 3, 4], [0, 1, 4, 5, 7], [0, 3, 4, 7]]
)
def test_gather(rows: list[int]) -> None:
    stack = rand(8, 2)
    torch.testing.assert_close(gather(stack, rows), stack[rows])


@pytest.mark.parametrize(
    "pattern", ["a", "aaaa", "ababab", "aab" * 4, "xabababy", "abbabaab", "aabbcc", "xyabcabcabcz", "ab"]
)
def test_interleave_undoes_gather(pattern: str) -> None:
    stack = rand(len(pattern), 2)
    parts = []
    for name in dict.fromkeys(pattern):
        at = [i for i, c in enumerate(pattern) if c == name]
        parts.append((at, stack[at]))
    torch.testing.assert_close(interleave(parts, len(pattern)), stack)


def test_scaled_dot_product_attention_reference_is_the_one_in_use() -> None:
    """The operator that the rule folds is what autograd calls on this device."""
    q = rand(2, 2, 4, 4).requires_grad_()
    out = F.scaled_dot_product_attention(q, q, q)
    assert "FlashAttention" in str(out.grad_fn)
