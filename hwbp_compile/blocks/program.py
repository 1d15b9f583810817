"""The step from one state to the next of blocks that were found, for a batch of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .. import _compat
from .. import rows_op as rows_op  # the operator
from ..errors import CannotRewrite
from ..passes.classes import value_text
from ..passes.linear_ops import op_name
from ..passes.views import STACKED, Views, row_of, views_of
from ..recurrent.step_program import ROWS, check_rows
from .step_text import encoded


class EqualBlock(Protocol):
    """One of several equal blocks, each applied to the result of the one before."""

    @property
    def template(self) -> Sequence[Node]:
        """Its nodes in graph order."""

    @property
    def entry(self) -> Node:
        """The state before it."""

    @property
    def exit(self) -> Node:
        """The state after it."""

    @property
    def leaves(self) -> Sequence[Node]:
        """What it reads besides."""


@dataclass(frozen=True)
class Source:
    """Where a value is that each block has of its own: in tensors, one for each, or in rows of one tensor."""

    tensors: tuple[Node, ...]
    rows: tuple[int, ...] | None
    """None for tensors."""
    shape: tuple[Any, ...]
    dtype: torch.dtype
    views: Views
    """What the blocks read are these of it."""


def source_of(column: Sequence[Node | None]) -> Source:
    """Where the values are that the blocks read at one place.

    Raises:
        CannotRewrite: they are no tensors, or views of different kinds.
    """
    found = [views_of(n) for n in column if n is not None]
    bases, views = [base for base, _ in found], found[0][1]
    first: Any = bases[0].meta.get("val")
    if not isinstance(first, Tensor) or len({value_text(n) for n in bases}) > 1:
        raise CannotRewrite("the blocks read values of different shapes or types", bases[0])
    if len({str(v) for _, v in found}) > 1:
        raise CannotRewrite("the blocks read different views", bases[0])
    rows = [_row(n) for n in bases]
    stacks = {stack for stack, _ in rows}
    if None not in stacks and len(stacks) == 1:
        tensors, numbers = tuple(n for n in stacks if n is not None), tuple(i for _, i in rows)
    else:
        tensors, numbers = tuple(bases), None
    return Source(tensors, numbers, tuple(first.shape), first.dtype, views)


def _row(node: Node) -> tuple[Node | None, int]:
    """Of which tensor a node is which row, or a copy of it; None if it is not."""
    if (row := row_of(node)) is not None:
        return (None, 0) if row.views else (row.base, row.row)
    source: Any = node.args[0] if op_name(node) == "getitem" else None
    if isinstance(source, Node) and source.target is torch.ops.hwbp_compile.rows.default:
        (base,) = source.all_input_nodes
        return base, node.args[1]  # type: ignore[return-value]
    return None, 0


def is_real(node: Node, state: Node) -> bool:
    """Whether a value has a contiguous row of a state's type for each row of the batch."""
    value, like = node.meta["val"], state.meta["val"]
    alike = isinstance(value, Tensor) and value.dtype == like.dtype and value.is_contiguous()
    return alike and value.dim() > 0 and str(value.shape[0]) == str(like.shape[0])


def step_of(
    block: EqualBlock, sources: Sequence[Source], emitted: Sequence[Node], *, keep: bool
) -> list[Any]:
    """The step of equal blocks; see :func:`.step_text.encoded`.

    Args:
        block: one of them.
        sources: of its leaves.
        emitted: its nodes whose values are returned for each block.
        keep: whether all states are.

    Raises:
        CannotRewrite: the rows of the batch depend on one another, or the batch has a size in it.
    """
    state = block.entry.meta["val"]
    if any(s.dtype not in (state.dtype, torch.bool) for s in sources):
        raise CannotRewrite("the blocks read values of another type than their state", block.entry)
    refusal: CannotRewrite | None = None
    for rows in _with_rows(state.shape[0], sources):
        try:
            with _compat.failures_are_expected():
                return _traced(block, sources, rows, emitted, keep)
        except CannotRewrite as error:
            refusal = refusal or error
        except Exception as error:  # the operators do not fit together for these shapes
            why = f"the blocks cannot be traced for a batch of any size ({type(error).__name__})"
            refusal = refusal or CannotRewrite(why)
    assert refusal is not None
    raise refusal


def _with_rows(batch: Any, sources: Sequence[Source]) -> Iterator[list[bool]]:
    """Which of the sources may have a dimension for the batch; shapes that fit say which it is."""
    maybe = [bool(s.shape) and str(s.shape[0]) == str(batch) for s in sources]
    given = [all(n.op == "placeholder" for n in s.tensors) for s in sources]
    likely = [m and not g for m, g in zip(maybe, given, strict=True)]
    seen: list[list[bool]] = []
    for rows in (likely, maybe, [False] * len(sources)):
        if rows not in seen:
            seen.append(rows)
            yield rows


def _traced(
    block: EqualBlock,
    sources: Sequence[Source],
    rows: Sequence[bool],
    emitted: Sequence[Node],
    keep: bool,
) -> list[Any]:
    state = block.entry.meta["val"]
    batch = state.shape[0]

    def evaluate(*values: Tensor) -> list[Tensor]:
        known: dict[Node, Any] = {block.entry: values[0]}
        for leaf, source, base in zip(block.leaves, sources, values[1:], strict=True):
            value = base.unsqueeze(0)
            for name, argument in source.views:
                value = STACKED[name](value, argument)
            known[leaf] = value[0]
        for node in block.template:
            args: Any
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            if op_name(node) == "aten::expand":
                args = (args[0], _without_sizes_there(args[0], args[1]), *args[2:])
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            _check(node, known[node], batch)
        return [known[n] for n in (block.exit, *emitted)]

    def like(shape: Sequence[Any], dtype: torch.dtype, rows: bool) -> Tensor:
        return torch.empty((), dtype=dtype).expand([ROWS, *shape[1:]] if rows else list(shape))

    values = [like(state.shape, state.dtype, True)]
    values += [like(s.shape, s.dtype, r) for s, r in zip(sources, rows, strict=True)]
    traced = _compat.trace_shapes(evaluate, [], values)
    return encoded(traced.graph, len(emitted), keep)


def _without_sizes_there(x: Tensor, sizes: Sequence[Any]) -> list[Any]:
    """What a tensor is expanded to, with -1 for sizes that it has already, such as that of the batch."""
    new = len(sizes) - x.dim()
    return [-1 if i >= new and x.shape[i - new] != 1 else size for i, size in enumerate(sizes)]


def _check(node: Node, value: Any, batch: Any) -> None:
    """Refuse what differs, apart from the size of the batch, from what it is in the graph."""
    was = node.meta["val"]
    pairs = zip(value, was, strict=True) if isinstance(value, (tuple, list)) else [(value, was)]
    for now, before in pairs:
        check_rows(node, now)
        sizes = [str(batch) if n == ROWS else str(n) for n in now.shape]
        if sizes != list(map(str, before.shape)) or now.dtype != before.dtype:
            raise CannotRewrite(f"{node.target} does other things for other sizes of the batch", node)
