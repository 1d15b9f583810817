"""Second pass: cut a residual stream into blocks.

A cut is a place that the whole cotangent passes through a few tensors of one shape: in graph order, only
these are alive between what comes before and what comes after. One tensor is the usual case; it is then a
dominator of everything behind it. Two serve cells with a pair of states. Only values that depend on the
stream's start count, so a gradient that joins from elsewhere (an auxiliary head, a loss per step) cuts no
chain: it is an affine term of the block it joins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from ..chain import Block, Chain, Cut, Refusal
from ..errors import CannotRewrite
from ..stage import stage_of
from .classes import classify, signature
from .linear import LinearPart, between, longest_stream
from .linear_ops import check_linear, is_heavy, op_name
from .program import externals_of
from .residual_ops import SUMS
from .split import Split, split

MAX_STATE = 2
"""The most tensors that a state may consist of."""

MAX_HALVINGS = 3
"""How often a stream that other paths bypass is halved in search of a chain."""

Found = Chain | Refusal


def find_chains(part: LinearPart) -> Iterator[Found]:
    """All chains of a joint graph, longest stream first, and what looked like one but is none."""
    # An iteration over time is made of sums and sweeps as well, and must stay as it is.
    excluded = {node for node in part.order if stage_of(node) is not None}
    while (stream := longest_stream(part, excluded)) is not None:
        searches = [_search(part, path, MAX_HALVINGS) for path in (stream.path, *stream.alternatives)]
        best = max(searches, key=_longest)
        yield from best
        inside = {node for found in best for block in found.blocks for node in block.nodes}
        # What comes before the first block may start another chain as well: two towers, one head.
        start = next((i for i, node in enumerate(stream.path) if node in inside), 0)
        excluded.update(inside, stream.path[start:])


def _search(part: LinearPart, path: Sequence[Node], halvings: int) -> list[Found]:
    """Chains along ``path``; where too many other paths run beside it, along its two halves."""
    nodes = between(part, path[0], path[-1])
    by_size = [_chains_with_state(nodes, size) for size in range(1, MAX_STATE + 1)]
    best = by_size[0]
    for larger in by_size[1:]:
        # Inside a block with two branches two tensors are alive, and each branch would count as a block.
        better = _longest(larger) > _longest(best) and _covered(larger) > 2 * _covered(best)
        best = larger if better or _longest(best) < 2 <= _longest(larger) else best
    if _longest(best) > 1 or halvings == 0 or len(path) < 4:
        return best
    middle = _most_crowded(nodes, path)
    halves = _search(part, path[: middle + 1], halvings - 1) + _search(part, path[middle:], halvings - 1)
    if _longest(halves) > 1:
        return halves
    if not any(by_size) and sum(map(is_heavy, nodes)) > 1:
        return [Refusal("other paths run beside the residual stream for its whole length", path[-1])]
    return best


def _longest(found: list[Found]) -> int:
    return max((len(f.blocks) for f in found), default=0)


def _covered(found: list[Found]) -> int:
    return max((sum(len(b.nodes) for b in f.blocks) for f in found), default=0)


def live_sets(nodes: list[Node]) -> Iterator[dict[Node, None]]:
    """After each node, the nodes so far that are still needed, in graph order."""
    index = {node: i for i, node in enumerate(nodes)}
    last = {n: max((index[u] for u in n.users if u in index), default=len(nodes)) for n in nodes}
    alive: dict[Node, None] = {}
    for i, node in enumerate(nodes):
        for operand in node.all_input_nodes:
            if last.get(operand) == i:
                alive.pop(operand, None)
        alive[node] = None
        yield alive


def _most_crowded(nodes: list[Node], path: Sequence[Node]) -> int:
    """The inner position of ``path`` at which most values are alive beside it."""
    crowd = {node: len(alive) for node, alive in zip(nodes, live_sets(nodes), strict=True)}
    return max(range(1, len(path) - 1), key=lambda i: crowd[path[i]])


def _chains_with_state(nodes: list[Node], size: int) -> list[Found]:
    """Chains whose states consist of ``size`` tensors."""
    return [found for run in _runs(_segments(nodes, size)) for found in _legal_chains(run)]


def _segments(nodes: list[Node], size: int) -> list[Block]:
    """The pieces between neighbouring cuts of ``size`` tensors."""
    segments: list[Block] = []
    entry: Cut | None = None
    inside: list[Node] = []
    for node, alive in zip(nodes, live_sets(nodes), strict=True):
        inside.append(node)
        if len(alive) != size or not all(_is_gradient(n) for n in alive):
            continue
        cut = tuple(alive)
        if entry is not None:
            segments.append(Block(entry, cut, tuple(inside)))
        entry, inside = cut, []
    return segments


def _is_gradient(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def _join(segments: Sequence[Block]) -> Block:
    return Block(segments[0].entry, segments[-1].exit, tuple(n for s in segments for n in s.nodes))


def _runs(segments: list[Block]) -> Iterator[list[Block]]:
    """Merge segments into blocks, one for each place with heavy operators, and blocks into runs.

    A cheap segment (a normalisation, a mask, a view) belongs to the block that follows; one in which only
    direct gradients join belongs to the block before it. What comes before the first block is done exactly.
    """
    run: list[Block] = []
    pending: list[Block] = []
    leading: list[Block] = []
    i = 0
    while i < len(segments):
        pending.append(segments[i])
        i += 1
        block = _join(pending)
        if not split(block).path:
            if run:
                yield _trim_first(run, leading)
            run, pending, leading = [], [], []
        elif any(map(is_heavy, block.nodes)) and (_shapes(block.exit) == _shapes(block.entry) or not run):
            following = _joining(segments[i:])
            i += len(following)
            if not run:
                leading = [*pending, *following]
            run.append(_join([*pending, *following]))
            pending = []
    if run:
        yield _trim_first(run, leading)


def _shapes(cut: Cut) -> tuple[str, ...]:
    return tuple(f"{n.meta['val'].dtype}{tuple(map(str, n.meta['val'].shape))}" for n in cut)


def _joining(segments: Sequence[Block]) -> list[Block]:
    """The leading segments up to the last in which a direct gradient joins an otherwise unchanged stream."""
    last = 0
    for i, segment in enumerate(segments):
        found = split(segment)
        if not found.path.issuperset(segment.nodes) or not _is_identity(segment, found):
            break
        inside = {*segment.entry, *segment.nodes}
        if any(op_name(n) in SUMS and not inside.issuperset(n.all_input_nodes) for n in segment.nodes):
            last = i + 1
    return list(segments[:last])


def _is_identity(segment: Block, found: Split) -> bool:
    return all(
        known.get(node) == (1.0 if i == j else None) or node is segment.entry[i]
        for j, known in enumerate(found.scalars)
        for i, node in enumerate(segment.exit)
    )


def _trim_first(run: list[Block], leading: list[Block]) -> list[Block]:
    """Take from the first block what is not repeated in later ones (a final normalisation, pooling).

    Left in, it would count as part of a block and be crossed one iteration late.
    """
    first = next(i for i, s in enumerate(leading) if any(map(is_heavy, s.nodes)))
    candidates = [_join(leading[i:]) for i in range(first + 1)]
    candidates = [b for b in candidates if _shapes(b.entry) == _shapes(b.exit) and split(b).path]
    later = {signature(b) for b in run[1:]}
    repeated = [b for b in candidates if signature(b) in later]
    return [*(repeated or candidates[-1:])[:1], *run[1:]]


def _legal_chains(run: list[Block]) -> Iterator[Found]:
    """The parts of a run in which every block is understood, and a refusal for each that is not."""
    legal: list[Block] = []
    for block in run:
        try:
            check_block(block)
        except CannotRewrite as refusal:
            yield from _chain(legal)
            yield Refusal(refusal.reason, refusal.node or block.exit[0], (block,), split(block).kind)
            legal = []
        else:
            legal.append(block)
    yield from _chain(legal)


def check_block(block: Block) -> None:
    """Raise :class:`CannotRewrite` unless a program can be made of the block."""
    inside = {*block.entry, *block.nodes}
    for node in block.nodes:
        check_linear(node, inside)
    for node in externals_of(block):
        if not isinstance(node.meta.get("val"), (torch.Tensor, int, float, torch.SymInt, torch.SymFloat)):
            raise CannotRewrite(f"{node.target} hands a value to the block that is no tensor", node)
    if not set(block.entry).isdisjoint(block.exit):
        raise CannotRewrite("one tensor of the state passes a block unchanged", block.exit[0])


def _chain(blocks: list[Block]) -> Iterator[Found]:
    """The chain of these blocks, without an end whose heavy operators are those of no other block.

    Past its last block a stream may go on elementwise into something that merely looks like one more, such as
    the gate of a cell's first step.
    """
    heavy = [sorted(f"{n.target} {_value_shape(n)}" for n in b.nodes if is_heavy(n)) for b in blocks]
    first = 1 if len(blocks) > 2 and heavy[0] not in heavy[1:] else 0
    last = len(blocks) - 1 if len(blocks) > 2 and heavy[-1] not in heavy[:-1] else len(blocks)
    if blocks:
        kept = tuple(blocks[first:last])
        kinds = dict.fromkeys(split(b).kind for b in kept)
        yield Chain(kept, " / ".join(kinds), classify(kept))
    for block in (*blocks[:first], *blocks[last:]):
        reason = "this end of the chain has other operators than the blocks of the chain"
        yield Refusal(reason, block.exit[0], (block,), split(block).kind)


def _value_shape(node: Node) -> str:
    value = node.meta.get("val")
    return str(tuple(map(str, value.shape))) if isinstance(value, torch.Tensor) else ""
