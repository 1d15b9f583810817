"""An explanation as plain text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ..options import Options
from .table import amount, table
from .where import shorten, shorten_lines

if TYPE_CHECKING:
    from .explanation import ChainReport, Explanation, GraphReport, SavedTensor

WIDTH = 110


def render(explanation: Explanation) -> str:
    """The whole report: a verdict, a table of the chains, remarks on each, notes and graphs."""
    chains = explanation.chains
    parts = [_verdict(explanation)]
    if chains:
        parts.append(
            table(
                ["", "blocks", "K", "state", "modules", "backward pass"],
                [_row(i, c) for i, c in enumerate(chains, 1)],
                words=range(2, 6),
            )
        )
        parts.extend(_remarks(i, c) for i, c in enumerate(chains, 1) if _remarks(i, c))
    if explanation.notes:
        parts.append("\n".join(["Notes", *(_item(n) for n in explanation.notes)]))
    if explanation.graphs:
        parts.append("\n".join(_graph_line(i, g) for i, g in enumerate(explanation.graphs)))
    return "\n\n".join(parts)


def _verdict(explanation: Explanation) -> str:
    # What stands between two chains has no residual path, and is no chain itself.
    chains = [c for c in explanation.chains if c.residual or c.over == "time"]
    applied = sum(c.applied for c in chains)
    settings = _settings(explanation.options)
    if not chains:
        return f"Nothing is rewritten; the backward pass is exact. ({settings})"
    noun = "residual chain" + "s" * (len(chains) != 1)
    swept = sum(c.swept > 0 for c in chains)
    kernel = f", {swept} swept exactly by one kernel{' each' * (swept > 1)}" if swept else ""
    if not applied:
        exact = "the backward pass is exact"
        return f"None of {len(chains)} {noun} is iterated{kernel}; {exact}. ({settings})"
    verb = "are" if applied > 1 else "is"
    between = len(explanation.chains) - len(chains)
    rest = (
        ""
        if not between
        else f"; {between} other place{'s' * (between != 1)} stay{'s' * (between == 1)} exact"
    )
    return f"{applied} of {len(chains)} {noun} {verb} rewritten{kernel}{rest}. ({settings})"


def _settings(options: Options) -> str:
    """Iterations, and whatever is not at its default."""
    default = Options().to_dict()
    shown = {k: v for k, v in options.to_dict().items() if k == "iterations" or v != default[k]}
    return ", ".join(f"{k}={v!r}" for k, v in shown.items())


def _row(number: int, chain: ChainReport) -> list[str]:
    state = " and ".join(
        f"{'x'.join(map(str, shape))} {dtype}"
        for shape, dtype in zip(chain.shapes, chain.dtypes, strict=True)
    )
    if chain.applied:
        plural = "s" * (chain.iterations != 1)
        verdict = f"{chain.iterations} iteration{plural}"
        verdict += " over time" if chain.over == "time" else f", {chain.new_nodes} new nodes"
    else:
        verdict = "exact"
        if chain.swept:
            some = f"{chain.swept} of {chain.blocks} blocks " if chain.swept != chain.blocks else ""
            verdict = f"exact, {some}by one kernel, {chain.new_nodes} new nodes"
    return [
        str(number),
        str(chain.blocks),
        chain.residual or "-",
        state or "-",
        shorten(chain.modules) or "-",
        verdict,
    ]


def _remarks(number: int, chain: ChainReport) -> str:
    """What does not fit into the table."""
    said = []
    if chain.reason:
        said.append(f"left exact: {chain.reason}")
    if len(chain.classes) > 1 and chain.applied:
        sizes = ", ".join(map(str, chain.classes))
        said.append(f"{len(chain.classes)} kinds of blocks ({sizes} of each), each batched on its own")
    said.extend(chain.notes)
    if chain.costs is not None:
        exact, iterated = chain.costs
        said.append(f"exact: {exact}")
        said.append(f"iterated: {iterated}, expected to be {exact.seconds / iterated.seconds:.2f}x as fast")
    said.extend(f"by size, up to the next power of two: {sizes}" for sizes in chain.sizes)
    if chain.lines:
        said.append(f"source of the first block: {shorten_lines(chain.lines)}")
    return "\n".join([f"Chain {number}", *(_item(s) for s in said)]) if said else ""


def _graph_line(index: int, graph: GraphReport) -> str:
    passes = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in graph.seconds.items())
    forward = "".join(f"the forward pass of {blocks} blocks is one kernel; " for blocks in graph.fused)
    times = f" (runs {graph.calls} times; modules are those of the first)" if graph.calls > 1 else ""
    return (
        f"Graph {index}{times}: {graph.nodes_before} -> {graph.nodes_after} nodes, "
        f"heavy operators in sequence in the backward pass {graph.depth_before} -> {graph.depth_after}; "
        f"{forward}"
        f"saved for it {_saved(graph.saved_before)} -> {_saved(graph.saved_after)}; "
        f"{passes}"
    )


def _saved(tensors: tuple[SavedTensor, ...]) -> str:
    plural = "s" * (len(tensors) != 1)
    return f"{len(tensors)} tensor{plural} of {amount(sum(t.bytes for t in tensors))}B"


def _item(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_long_words=False)
