"""Whether a schedule is expected to take less time than the sequential backward pass in its place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

from .. import _compat
from ..ranges import OpenSizes, Sizes, named
from ..rates import bandwidth, operator_seconds, product_rate
from ..verdict import why_exact
from .emit import Schedule
from .unstacked import unstacked_products
from .views import concatenated, is_view, row_of, views_of
from .work import Work, work_of

_ENOUGH = 0.80
"""The share of the exact backward pass's time that an approximate one may be expected to take at most: with
less to gain the forward pass, which keeps stacks, may lose it."""
_KERNEL, _PRODUCT = 2.0, 1.0
"""A call from generated code, of a kernel or in addition to a product, in calls of a small operator."""
_READ, _RETURNED, _COPIED, _KEPT = 1.1, 2.5, 3.0, 0.5
"""A tensor that a backward pass is given, one that it returns, which becomes a parameter's gradient, a
parameter that is copied into a stack, and what is given as a row of a stack, in calls of a small operator."""
_UNSTACKED, _MATRIX = 5.0, 0.2
"""More for a product with matrices where they are, and for each of these, in calls of a small operator."""
_NEAR = 1 << 22
"""Bytes of matrices up to which products find them in a cache, iteration after iteration."""
_SMALLEST, _LARGEST = 1 << 14, 1 << 25
"""Bytes moved by a kernel beyond which it is as fast as these."""
_AROUND = 8
"""How far from the value of a symbol, up and down, the decision is made for other values."""


@dataclass(frozen=True)
class Comparison:
    """The work of a backward pass, as it was and with a schedule in it, and the seconds expected of each."""

    exact: Work
    iterated: Work
    exact_seconds: float
    iterated_seconds: float
    device: torch.device
    calls: tuple[float, float]
    """Beside the work, in calls of a small operator."""
    own: Work = field(default_factory=Work)
    """Of the iterated pass, what the schedule does."""
    open_sizes: OpenSizes = field(default_factory=lambda: OpenSizes(()))
    """The sizes that the graph leaves open."""
    sizes: Sizes = field(default_factory=dict)
    """Their values here."""

    @property
    def is_open(self) -> bool:
        """Whether the outcome depends on open sizes, and on these only, not on data."""
        works = (self.exact, self.iterated)
        free = set().union(*(f.free_symbols for w in works for f in (w.flops.formula, w.bytes.formula)))
        return bool(free) and free <= {s.expression for s in self.open_sizes.symbols}

    def at(self, sizes: Sizes) -> Comparison:
        """The same for other values of the open sizes; this one if the outcome does not depend on them."""
        if not self.is_open or sizes == self.sizes:
            return self
        exact, iterated, own = (work.at(sizes) for work in (self.exact, self.iterated, self.own))
        seconds = [seconds_of(w, self.device, c) for w, c in zip((exact, iterated), self.calls, strict=True)]
        return replace(
            self,
            exact=exact,
            iterated=iterated,
            own=own,
            exact_seconds=seconds[0],
            iterated_seconds=seconds[1],
            sizes=sizes,
        )

    @property
    def contributes(self) -> bool:
        """Whether what is done for the chain takes enough less time, whatever else the backward pass does."""
        own = seconds_of(self.own, self.device, self.calls[1] - self.calls[0])
        freed = self.exact_seconds - (self.iterated_seconds - own)
        return not why_exact(freed, own, _ENOUGH)

    @property
    def reason(self) -> str:
        """Why the chain is to be left exact, if it is the only one; empty if it is not."""
        where = f" for sizes up to {named(self.sizes)}" if self.sizes else ""
        return why_exact(self.exact_seconds, self.iterated_seconds, _ENOUGH, where)

    def __str__(self) -> str:
        parts = (
            ("exact", self.exact, self.exact_seconds),
            ("iterated", self.iterated, self.iterated_seconds),
        )
        return "; ".join(
            f"{name}: {work.flops.formula} FLOP in {len(work.products)} products, {work.depth} in sequence, "
            f"{work.bytes.formula} bytes in {len(work.kernels)} kernels, about {seconds * 1e3:.3g} ms"
            for name, work, seconds in parts
        )


def verdicts(comparisons: Sequence[Comparison | None]) -> list[str]:
    """Why each chain of one backward pass is left exact; empty for those that are iterated.

    A chain that is not worth it alone is iterated if it contributes, and all of these are worth it together.
    """
    reasons = ["" if c is None else c.reason for c in comparisons]
    known = [(i, c) for i, c in enumerate(comparisons) if c is not None and (not reasons[i] or c.contributes)]
    if len(known) > 1:
        exact = known[0][1].exact_seconds
        together = exact - sum(c.exact_seconds - c.iterated_seconds for _, c in known)
        if not why_exact(exact, together, _ENOUGH):
            for i, _ in known:
                reasons[i] = ""
    return reasons


def by_size(comparisons: Sequence[Comparison | None]) -> Iterator[tuple[str, int, list[bool]]]:
    """For each symbol, ends of ranges around its value, and which chains are worth iterating there.

    The other symbols keep their values.
    """
    first = next((c for c in comparisons if c is not None and c.is_open), None)
    if first is None:
        return
    for symbol in first.open_sizes.symbols:
        low = max(symbol.low, symbol.value // _AROUND, 1)
        high = min(symbol.high, symbol.value * _AROUND)
        for exponent in range((low - 1).bit_length(), high.bit_length()):
            size = 1 << exponent
            others = dict(first.sizes) | {symbol.expression: size}
            reasons = verdicts([c and c.at(others) for c in comparisons])
            yield str(symbol.expression), size, [not reason for reason in reasons]


class Sequential:
    """The backward half of a joint graph as it is, which all schedules for it are compared with."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = [n for n in graph.nodes if n.meta.get("partitioner_tag") == "is_backward"]
        self.work = work_of(self.nodes)
        self.read, returned = _boundary(graph, set(self.nodes))
        self.calls = _READ * len(self.read) + _RETURNED * returned


def compare(exact: Sequential, schedule: Schedule) -> Comparison:
    """Count a backward pass as it is and with a schedule, and predict the times.

    They are those at the end of the range of the sizes that were traced.
    """
    graph = exact.graph
    device = next(n.meta["val"].device for n in schedule.replaced)
    replaced = set(schedule.replaced)
    live = _live(graph, schedule)
    rest = work_of(
        [n for n in exact.nodes if n in live],
        lambda n: bool(parts := concatenated(n)) and all(_is_view_of_any(p, replaced) for p in parts),
    )
    own = list(schedule.graph_module.graph.nodes)
    outer = dict(zip((n for n in own if n.op == "placeholder"), schedule.inputs, strict=True))

    def is_slice(node: Node) -> bool:
        rows = [row_of(outer.get(p, p)) for p in concatenated(node)]
        return bool(rows) and None not in rows and len({r.kind() for r in rows if r is not None}) == 1

    unstacked = unstacked_products(own, lambda n: outer.get(n, n))
    if _bytes_of(unstacked) > _NEAR:
        unstacked = {}  # counted as if they were copied: what is read from memory comes as slowly, at times
    added = work_of(own, lambda n: n in unstacked or is_slice(n))
    calls = exact.calls
    made = [n for n in own if n not in unstacked and not is_slice(n)]
    copied = {views_of(outer[p])[0] for n in made for p in concatenated(n) if p in outer}
    kept = {n for n in exact.read.intersection(schedule.inputs) if views_of(n)[0].op != "placeholder"}
    more = calls + _COPIED * sum(n.op == "placeholder" for n in copied) + (_KEPT - _READ) * len(kept)
    more += sum(_UNSTACKED + _MATRIX * len(rows) for p in unstacked.values() for rows in p.values())
    open_sizes = OpenSizes([n.meta.get("val") for n in graph.nodes if n.op == "placeholder"])
    found = Comparison(exact.work, rest + added, 0.0, 0.0, device, (calls, more), added, open_sizes)
    if found.is_open:
        return found.at(open_sizes.ends_of(open_sizes.traced))
    seconds = seconds_of(found.exact, device, calls), seconds_of(found.iterated, device, more)
    return replace(found, exact_seconds=seconds[0], iterated_seconds=seconds[1])


def _bytes_of(concatenations: Iterable[Node]) -> int:
    """Of all that they put together, each part once."""
    parts = {views_of(n)[0]: n.meta["val"] for each in concatenations for n in concatenated(each)}
    return sum(value.numel() * value.element_size() for value in parts.values())


def _is_view_of_any(node: Node, wanted: set[Node]) -> bool:
    while node not in wanted and is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node in wanted


def _boundary(graph: Graph, backward: set[Node]) -> tuple[set[Node], int]:
    """What a backward pass reads from outside, and how many tensors it returns."""
    (output,) = graph.find_nodes(op="output")
    read = {n for node in backward for n in node.all_input_nodes if n not in backward}
    return read, sum(n in backward for n in output.all_input_nodes)


def _live(graph: Graph, schedule: Schedule) -> set[Node]:
    """What is still needed once the schedule hands out the nodes that it replaces."""
    (output,) = graph.find_nodes(op="output")
    summed = {n for group in schedule.summed for n in group.nodes}
    given = set(schedule.replaced) | summed
    live: set[Node] = set()
    stack = [*output.all_input_nodes, *schedule.inputs]
    while stack:
        node = stack.pop()
        if node in live or node in given:
            continue
        live.add(node)
        stack.extend(node.all_input_nodes)
    return live


def seconds_of(work: Work, device: torch.device, calls: float) -> float:
    """The time that some work is expected to take, beside so many calls of a small operator."""
    threads = torch.get_num_threads()
    equal = Counter((p.sizes, p.dtype) for p in work.products if p.sizes)
    with _compat.outside_of_tracing():
        operator = operator_seconds(device, threads)
        total = (calls + _KERNEL * len(work.kernels)) * operator
        for moved in work.kernels:
            size = min(max(_power(moved.value), _SMALLEST), _LARGEST)
            total += moved.value / bandwidth(device, threads, size, fresh=False)
        for product in work.products:
            side = _power(round((product.flops.value / 2) ** (1 / 3)))
            batch, rows, inner, columns = [n.value for n in product.sizes] or (1, side, side, side)
            if product.flops.value:
                # Not of other operators, whose tensors nobody knows.
                turns = 1 << (max(equal[product.sizes, product.dtype], 1) - 1).bit_length()
                rate = product_rate(rows, inner, columns, product.dtype, device, threads, batch, turns)
                total += product.flops.value / rate + _PRODUCT * operator
    return total


def _power(value: float) -> int:
    """The power of two from 2 on that is no smaller, so that few things are measured."""
    return 1 << max((math.ceil(value) - 1).bit_length(), 1)
