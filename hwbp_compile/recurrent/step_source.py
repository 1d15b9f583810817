"""C++ for one step of a recurrence, written from its graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CannotRewrite
from ..passes.linear_ops import nodes_in, op_name
from .step_layout import ROWS_STRIDE, Value, align, collapse, compact, placed_rows, row_size
from .step_operators import (
    CONVERSIONS,
    COPIES,
    GIVE_TRUTH,
    PLUS,
    POINTWISE,
    REDUCTIONS,
    RESHAPES,
    VIEWS,
    number,
    reduced_dimensions,
    truth,
)
from .step_program import ROWS, StepProgram, check_rows

_WRITERS = {"aten::cat", "aten::mm", "aten::addmm", *REDUCTIONS}
"""Operators that are told where to write."""
_LASTING = ("in_x", "out_e", "out_w", "in_y", "out_y")
"""Beginnings of variables for what stays where it is; of states, only if all are kept."""
_WIDEST_PANEL = 64
"""No processor has panels of more columns."""


class StepSource:
    """Writes the statements of one step.

    Args:
        program: the step. Next states are written to rows of variables out_y0, out_y1 ..., what is emitted
            to out_e0 ..., what is summed for all rows together is kept in out_w0 ...
        placed: the values of the placeholders.
        dtype: of all values.

    Raises:
        CannotRewrite: the step does something that is not written here, or mixes the rows of the batch.
    """

    def __init__(self, program: StepProgram, placed: dict[Node, Value], dtype: torch.dtype) -> None:
        self._values: dict[Node, Any] = dict(placed)
        self._dtype = dtype
        self._lines: list[str] = []
        self._group: list[Node] = []
        self._sum_lines: list[str] = []
        self.scratch = 0
        """How many elements a row needs."""
        self.workspace: list[int] = []
        """Sizes of a row in buffers that hold one step of all rows, of what is summed over them."""
        self.summed: list[tuple[int, ...]] = []
        """The shape of each sum; the last two dimensions may be exchanged."""
        self.packs: dict[str, tuple[str, str]] = {}
        """Statements that pack a weight for all steps; each with the result's name and size."""
        self._keep = program.keep
        self._shared = {placed[n].base for n in program.shared}
        following, emitted, sums = program.results
        self._results: dict[Node, Value] = {}
        copies = []
        for prefix, nodes in (("out_y", following), ("out_e", emitted)):
            for i, node in enumerate(nodes):
                target = placed_rows(f"{prefix}{i}", program.shape(node))
                if not self._write_into(node, target):
                    copies.append((node, target))
        for node in sums:
            for operand in node.all_input_nodes:
                source = _source(operand, through=VIEWS)
                if source not in self._results and source not in placed and _begins_with_rows(source):
                    self._write_into(source, self._new_workspace(program.shape(source)))
        for node in program.graph.nodes:
            if node.op == "call_function" and node not in sums:
                self._check(node)
                self._write(node)
        self._flush()
        for node, target in copies:
            self._copy(self._value(node), target)
        for node in sums:
            self._sum(node)

    def _write_into(self, node: Node, target: Value) -> bool:
        """Have a value computed right where it is to go, if it can be told to."""
        source = _source(node)
        told = source.op == "call_function" and op_name(source) in (*POINTWISE, *_WRITERS)
        same = tuple(source.meta["val"].shape) == tuple(target.where.shape)
        if not told or not same or source in self._results:
            return False
        self._results[source] = target
        if op_name(source) == "aten::cat":
            for part, place in self._parts(source, target):
                if op_name(_source(part)) not in REDUCTIONS:  # these have no gaps in what they write
                    self._write_into(part, place)
        return True

    def _parts(self, cat: Node, out: Value) -> Iterator[tuple[Node, Value]]:
        """What is put together, and where each of it is to be in the result."""
        parts: Any = cat.args[0]
        dim: Any = cat.args[1] if len(cat.args) > 1 else 0
        dim = dim % out.where.dim()
        if out.where.shape[dim] == ROWS:
            raise CannotRewrite(f"{cat.target} mixes the rows of the batch", cat)
        start = 0
        for part in parts:
            size = part.meta["val"].shape[dim]
            yield part, Value(out.base, out.where.narrow(dim, start, size))
            start += size

    @property
    def sums(self) -> str:
        """The statements that add a step of all rows to the sums."""
        return "\n".join(self._sum_lines)

    @property
    def text(self) -> str:
        """The statements."""
        return "\n".join(self._lines)

    def _check(self, node: Node) -> None:
        values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
        for value in values:
            # The choice between two constants is one of integers in some of torch's formulas.
            chosen = op_name(node) == "aten::where" and value.dtype in (torch.int64, torch.int32)
            if not isinstance(value, Tensor) or not (chosen or value.dtype in (self._dtype, torch.bool)):
                raise CannotRewrite(f"{node.target} makes values of another type", node)
            if value.dtype == torch.bool and op_name(node) not in (*GIVE_TRUTH, *VIEWS, "getitem"):
                raise CannotRewrite(f"{node.target} of truth values has no translation", node)
            check_rows(node, value)

    def _write(self, node: Node) -> None:
        name = op_name(node)
        if name in POINTWISE or _becomes_truth(node):
            self._pointwise(node)
            return
        if node.target is operator.getitem:
            self._values[node] = self._values[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        if name in VIEWS:
            self._view(node)
        elif name in REDUCTIONS:
            self._reduce(node, name)
        elif name == "aten::var_mean":
            self._var_mean(node)
        elif name in ("aten::mm", "aten::bmm"):
            self._product(node, node.args[0], node.args[1], None)
        elif name in ("aten::addmm", "aten::baddbmm") and not node.kwargs:
            self._product(node, node.args[1], node.args[2], node.args[0])
        elif name == "aten::cat":
            self._cat(node)
        else:
            raise CannotRewrite(f"{node.target} has no translation into a kernel", node)

    # Values

    def _new(self, shape: Sequence[int]) -> Value:
        has_rows = ROWS in shape
        size = row_size(shape)
        # Every buffer begins at a whole vector; what all rows share is kept once for each of them.
        start, self.scratch = self.scratch, self.scratch + math.ceil(size / 16) * 16
        step = f" + r * {size}" if has_rows else ""
        return Value(f"(scratch + {start} * N{step})", compact(shape))

    def _value(self, node: Any) -> Value:
        if node in self._group:
            self._flush()
        value = self._values[node]
        assert isinstance(value, Value)
        return value

    def _view(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        if op_name(node) in CONVERSIONS:
            if source.meta["val"].dtype not in (self._dtype, torch.bool):
                raise CannotRewrite(f"{node.target} converts from another type", node)
            self._values[node] = self._value(source)
            return
        value = self._value(source)
        if op_name(node) in COPIES:
            self._values[node] = value
            return
        target: Any = torch.ops.aten.view.default if op_name(node) in RESHAPES else node.target
        try:
            found = target(value.where, *node.args[1:], **node.kwargs)
        except (RuntimeError, ValueError):
            copy = self._new(value.where.shape)
            self._copy(value, copy)
            value = copy
            try:
                found = target(value.where, *node.args[1:], **node.kwargs)
            except (RuntimeError, ValueError) as error:
                raise CannotRewrite(f"{node.target} mixes the rows of the batch", node) from error
        several = isinstance(found, (tuple, list))
        parts = [Value(value.base, x) for x in (found if several else [found])]
        for part in parts:
            inside = all(size < 2 or stride < ROWS_STRIDE for size, stride in part.dims)
            if not inside or (value.has_rows and not part.has_rows):
                raise CannotRewrite(f"{node.target} picks some rows of the batch", node)
        self._values[node] = parts if several else parts[0]

    # Elementwise operators: neighbours of one shape share a loop, and pass values on in registers.

    def _pointwise(self, node: Node) -> None:
        shape = tuple(node.meta["val"].shape)
        if self._group and shape != tuple(self._group[0].meta["val"].shape):
            self._flush()
        for operand in node.all_input_nodes:
            if operand in self._group and tuple(operand.meta["val"].shape) != shape:
                self._flush()
        self._group.append(node)
        self._values[node] = self._results.get(node) or None

    def _flush(self) -> None:
        group, self._group = self._group, []
        if not group:
            return
        shape = tuple(group[0].meta["val"].shape)
        loads: dict[Node, Value] = {}
        for node in group:
            for operand in node.all_input_nodes:
                if operand not in group:
                    loads.setdefault(operand, self._values[operand])
        stores: dict[Node, Value] = {}
        for node in group:
            if self._values[node] is None:
                outside = any(user not in group for user in node.users)
                if not outside:
                    continue
                self._values[node] = self._new(shape)
            stores[node] = self._values[node]
        broadcast = {n: Value(v.base, align(v.where, shape).expand(shape)) for n, v in loads.items()}
        names: dict[Node, str] = {n: f"v{i}" for i, n in enumerate((*loads, *group))}

        def body(load: Callable[[Value], str], store: Callable[[Value, str], str]) -> list[str]:
            lines = [f"const Vec {names[n]} = {load(v)};" for n, v in broadcast.items()]
            for node in group:
                lines.append(f"const Vec {names[node]} = {self._expression(node, names)};")
            lines.extend(store(v, names[n]) for n, v in stores.items())
            return lines

        self._loops([*broadcast.values(), *stores.values()], body)

    def _expression(self, node: Node, names: dict[Node, str]) -> str:
        def argument(x: Any) -> Any:
            if isinstance(x, Node):
                return names[x]
            return x if x is None else f"Vec({number(x)})"

        if _becomes_truth(node):
            return truth(argument(node.args[0]))
        plain = {"alpha", "value", "rounding_mode"}
        kwargs = {k: v if k in plain else argument(v) for k, v in node.kwargs.items()}
        try:
            return POINTWISE[op_name(node)](*(argument(x) for x in node.args), **kwargs)
        except TypeError as error:
            raise CannotRewrite(f"{node.target} is used in a way that has no translation", node) from error

    def _loops(
        self,
        values: Sequence[Value],
        body: Callable[[Callable[[Value], str], Callable[[Value, str], str]], list[str]],
    ) -> None:
        """Loops over all elements of values of one shape, for each row if any of them has rows."""
        sizes, strides = collapse([v.dims for v in values])
        has_rows = any(v.has_rows for v in values)
        lines = [f"for (int64_t r = 0; r < {'N' if has_rows else '1'}; r++) {{"]
        index = [f"i{d}" for d in range(len(sizes))]
        for size, name in zip(sizes[:-1], index[:-1], strict=True):
            lines.append(f"for (int64_t {name} = 0; {name} < {size}; {name}++) {{")
        steps = {id(v): s for v, s in zip(values, strides, strict=True)}
        last, inner = (sizes[-1], index[-1]) if sizes else (1, "i")
        vectors = all(s[-1] in (0, 1) for s in strides) if sizes else False

        def address(v: Value) -> str:
            terms = [f"{n} * {s}" for n, s in zip(index, steps[id(v)], strict=True) if s]
            return " + ".join(
                [v.base, *([str(offset)] if (offset := v.where.storage_offset()) else []), *terms]
            )

        def part(count: str) -> list[str]:
            tail = f", {count}" if count else ""

            def load(v: Value) -> str:
                constant = not sizes or not steps[id(v)][-1]
                return f"Vec(*({address(v)}))" if constant else f"Vec::loadu({address(v)}{tail})"

            return body(load, lambda v, x: f"{x}.store({address(v)}{tail});")

        if vectors:
            lines.append(f"constexpr int64_t whole = {last} / LANES * LANES, rest = {last} % LANES;")
            lines.append(f"for (int64_t {inner} = 0; {inner} < whole; {inner} += LANES) {{")
            lines.extend([*part(""), "}", "if constexpr (rest > 0) {", f"constexpr int64_t {inner} = whole;"])
            lines.extend([*part("rest"), "}"])
        else:
            lines.append(f"for (int64_t {inner} = 0; {inner} < {last}; {inner}++) {{")
            lines.extend([*part("1"), "}"])
        lines.extend("}" for _ in sizes[:-1])
        self._lines.extend([*lines, "}"])

    def _copy(self, source: Value, target: Value) -> None:
        spread = Value(source.base, align(source.where, target.where.shape).expand(target.where.shape))
        self._loops([spread, target], lambda load, store: [store(target, load(spread))])

    # Everything else

    def _reduce(self, node: Node, name: str) -> None:
        source = self._value(node.args[0])
        dims = reduced_dimensions(node, source.where.dim())
        size = self._checked_size(node, source, dims)
        out = self._results.get(node) or self._new(node.meta["val"].shape)
        scale = f" * {number(1 / size)}" if name == "aten::mean" else ""
        self._fold(source, dims, out, REDUCTIONS[name], "{0}", scale)
        self._values[node] = out

    def _checked_size(self, node: Node, source: Value, dims: Sequence[int]) -> int:
        sizes = [source.where.shape[d] for d in dims]
        if ROWS in sizes:
            raise CannotRewrite(f"{node.target} mixes the rows of the batch", node)
        if 0 in sizes:
            raise CannotRewrite(f"{node.target} reduces nothing", node)
        return math.prod(sizes)

    def _fold(
        self,
        source: Value,
        dims: Sequence[int],
        out: Value,
        reduction: tuple[str, str, str],
        each: str,
        scale: str,
        also: str = "",
    ) -> None:
        """``out = each(source), reduced over dims, times scale``. ``also`` is declared for each output."""
        start, join, join_numbers = reduction
        where = source.where
        kept = [d for d in range(where.dim()) if d not in dims and where.shape[d] != ROWS]
        folded = [(where.shape[d], where.stride(d)) for d in dims]
        sizes, (inner,) = collapse([folded])
        if len(sizes) > 1:
            raise CannotRewrite("a sum over dimensions that are apart in memory has no translation")
        (last,), (stride,) = (sizes, inner) if sizes else ([1], [1])
        lines = [f"for (int64_t r = 0; r < {'N' if source.has_rows else '1'}; r++) {{"]
        terms, step, targets = [], 1, []
        for d in reversed(kept):
            targets.append(f"k{d} * {step}")
            step *= where.shape[d]
        for d in kept:
            lines.append(f"for (int64_t k{d} = 0; k{d} < {where.shape[d]}; k{d}++) {{")
            terms.append(f"k{d} * {where.stride(d)}")
        here = " + ".join([source.base, str(where.storage_offset()), *terms])
        target = " + ".join([out.base, *targets])
        lines.append(f"const Real* from = {here}; Real* to = {target};")
        lines.append(also)
        number = each.format(f"from[i * {stride}]", "mean")
        first = "0"
        if stride == 1:
            vector = each.format("Vec::loadu(from + i)", "Vec(mean)")
            lines.append(f"Vec sum({start}); constexpr int64_t whole = {last} / LANES * LANES;")
            lines.append(f"for (int64_t i = 0; i < whole; i += LANES) sum = {join.format('sum', vector)};")
            lines.append(
                "Real total = at::vec::vec_reduce_all<Real>("
                f"[](Vec& x, Vec& y) {{ return {join.format('x', 'y')}; }}, sum);"
            )
            first = "whole"
        else:
            lines.append(f"Real total = {start};")
        lines.append(
            f"for (int64_t i = {first}; i < {last}; i++) total = {join_numbers.format('total', number)};"
        )
        lines.append(f"*to = total{scale};")
        lines.extend("}" for _ in kept)
        self._lines.extend([*lines, "}"])

    def _var_mean(self, node: Node) -> None:
        source = self._value(node.args[0])
        dims = reduced_dimensions(node, source.where.dim())
        size = self._checked_size(node, source, dims)
        correction: Any = node.kwargs.get("correction", 1)
        shape = node.meta["val"][0].shape
        var, mean = self._new(shape), self._new(shape)
        self._fold(source, dims, mean, PLUS, "{0}", f" * {number(1 / size)}")
        square = "({0} - {1}) * ({0} - {1})"
        scale = f" * {number(1 / (size - correction) if size > correction else math.nan)}"
        declared = f"const Real mean = *({mean.base} + (to - ({var.base})));"
        self._fold(source, dims, var, PLUS, square, scale, declared)
        self._values[node] = [var, mean]

    def _product(self, node: Node, a: Any, b: Any, bias: Any) -> None:
        """``a @ b`` for a value with rows and one without: ``[rows, K] @ [K, M]``, or the transposed."""
        x, weight = self._value(a), self._value(b)
        # W @ x is (x^T @ W^T)^T.
        transposed = not x.has_rows
        if transposed:
            x, weight = weight.transposed(), x.transposed()
        if weight.has_rows or x.where.shape[-2] != ROWS:
            raise CannotRewrite(f"{node.target} of two values that both differ between the rows", node)
        x = self._contiguous(x)
        inner, width = weight.where.shape[-2:]
        shape = [*node.meta["val"].shape[:-2], ROWS, width]
        out = None if transposed else self._results.get(node)
        out = self._new(shape) if out is None else out
        start = "nullptr, 0"
        if bias is not None:
            added = self._value(bias)
            added = Value(added.base, align(added.where, shape).expand(node.meta["val"].shape))
            added = self._contiguous(added.transposed() if transposed else added)
            start = f"{added.of_product('m')}, {added.row_step}"
        many = shape[0] if len(shape) == 3 else 1
        sizes = f"{inner}, {width}, {int(bias is not None)}"
        rows = f"(N, {x.of_product('m')}, {x.row_step}, "
        ends = f"{start}, {out.of_product('m')}, {out.row_step});"
        lies = None if weight.base in self._shared else _rows_or_columns(weight)
        if lies is None:
            packed = self._packed(weight, many)
            call = f"product<{sizes}>{rows}{packed} + m * PACKED<{inner}, {width}>, {ends}"
        else:
            by_column, step = lies
            matrix = f"{weight.of_product('m')}, {step}"
            call = f"unpacked_product<{sizes}, {int(by_column)}>{rows}{matrix}, {ends}"
        self._lines.append(f"for (int64_t m = 0; m < {many}; m++) {call}")
        self._values[node] = out.transposed() if transposed else out
        if transposed and node in self._results:
            self._copy(self._values[node], self._results[node])

    def _packed(self, weight: Value, many: int) -> str:
        """Where a weight is, packed; once for all steps, unless each step has its own."""
        inner, width = weight.where.shape[-2:]
        statement = (
            f"for (int64_t m = 0; m < {many}; m++) pack<{inner}, {width}>({weight.of_product('m')}, "
            f"{weight.where.stride(-2)}, {weight.where.stride(-1)}, {{0}} + m * PACKED<{inner}, {width}>);"
        )
        if weight.base in self._shared:
            name, _ = self.packs.setdefault(
                statement, (f"p{len(self.packs)}", f"{many} * PACKED<{inner}, {width}>")
            )
            return name
        panels = math.ceil(width / _WIDEST_PANEL) * _WIDEST_PANEL
        here = self._new((many, inner, panels)).base
        self._lines.append(statement.format(here))
        return here

    def _contiguous(self, value: Value) -> Value:
        """With neighbours in the last dimension next to one another in memory."""
        if value.where.stride(-1) == 1 or value.where.shape[-1] == 1:
            return value
        copy = self._new(value.where.shape)
        self._copy(value, copy)
        return copy

    def _new_workspace(self, shape: Sequence[int]) -> Value:
        # Rows that are a power of two apart would be in one another's way in a cache.
        self.workspace.append(math.ceil(row_size(shape) / 16) * 16 + 16)
        return Value(f"(out_w{len(self.workspace) - 1} + r * {self.workspace[-1]})", compact(shape))

    def _sum(self, node: Node) -> None:
        """Add to a sum over rows: a product ``a^T @ b``, or the rows of one value."""
        operands = [self._value(n) for n in node.all_input_nodes]
        if op_name(node) == "aten::sum":
            (x,) = operands
            rows = self._for_all_rows(x, matrix=False)
            size = row_size(rows.where.shape)
            start = self._start_of_sum(tuple(node.meta["val"].shape))
            self._sum_lines.append(
                f"add_rows<{size}>({_rows_of_steps(rows, '0')}, times, count, sums + {start});"
            )
            return
        many = node.meta["val"].shape[0] if len(node.meta["val"].shape) == 3 else 1
        a, b = (self._for_all_rows(x, matrix=True) for x in (operands[0].transposed(), operands[1]))
        wide = b.where.shape[-1] >= min(a.where.shape[-1], 16)
        a, b = (a, b) if wide else (b, a)
        m, k = a.where.shape[-1], b.where.shape[-1]
        shape = tuple(node.meta["val"].shape[:-2])
        start = self._start_of_sum((*shape, m, k))
        self._sum_lines.append(
            f"for (int64_t m = 0; m < {many}; m++) add_product<{m}, {k}>({_rows_of_steps(a, 'm')}, "
            f"{_rows_of_steps(b, 'm')}, times, count, sums + {start} + m * {m * k});"
        )

    def _start_of_sum(self, shape: tuple[int, ...]) -> int:
        start = sum(map(math.prod, self.summed))
        self.summed.append(shape)
        return start

    def _for_all_rows(self, value: Value, *, matrix: bool) -> Value:
        """Where each row's elements still are some steps later, without gaps (in a matrix' row)."""
        gaps = collapse([value.dims])[1][0] not in ([], [1])
        if matrix:
            gaps = value.where.stride(-1) != 1 and value.where.shape[-1] != 1
        lasting = value.variable.startswith(_LASTING if self._keep else _LASTING[:-2])
        if lasting and value.base != value.variable and not gaps:  # for each row, at an address of its own
            return value
        copy = self._new_workspace([ROWS, *(size for size, _ in value.dims)])
        if value.where.shape[0] != ROWS:
            copy = Value(copy.base, copy.where.movedim(0, -2))
        self._copy(value, copy)
        return copy

    def _cat(self, node: Node) -> None:
        out = self._results.get(node) or self._new(node.meta["val"].shape)
        for part, place in self._parts(node, out):
            value = self._value(part)
            if not place.is_at(value):
                self._copy(value, place)
        self._values[node] = out


def _becomes_truth(node: Node) -> bool:
    """Whether it converts numbers to truth values."""
    if op_name(node) not in CONVERSIONS or node.meta["val"].dtype != torch.bool:
        return False
    return node.all_input_nodes[0].meta["val"].dtype != torch.bool


def _source(node: Node, through: Collection[str] = COPIES) -> Node:
    """The node whose value this one passes on."""
    while node.op == "call_function" and op_name(node) in through:
        (node,) = nodes_in(node.args)
    return node


def _rows_or_columns(matrix: Value) -> tuple[bool, int] | None:
    """Whether a matrix lies column by column, and how far these, or its rows, are apart; None if neither."""
    rows, columns = matrix.where.shape[-2:]
    by_row, by_column = matrix.where.stride()[-2:]
    if by_column == 1 or columns == 1:
        return False, by_row
    return (True, by_column) if by_row == 1 or rows == 1 else None


def _rows_of_steps(value: Value, number: str) -> str:
    """The rows of several steps, in one of several products."""
    name = value.variable.partition("_")[2]
    return f"Rows{{{value.of_product(number)}, {value.row_step}, jump_{name}}}"


def _begins_with_rows(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == ROWS
