"""``explain``: what the backend does with a model, without training or compiling it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .. import _compat
from ..chain import Chain, Refusal
from ..options import Options, parse_options
from ..passes.linear import linear_part
from ..passes.outcomes import Outcome
from ..passes.pipeline import Record, prepare, rewrite
from ..passes.worth import Comparison, by_size
from ..recurrent.capture import Layer
from ..recurrent.packed import REASON
from ..verdict import is_about_cost
from .capture import Capture, Frame, capture
from .explanation import ChainReport, CostReport, Explanation, GraphReport, SizesReport
from .gaps import gaps
from .roles import effective_iterations, roles_of
from .where import (
    Names,
    block_lines,
    block_modules,
    module_names,
    module_stack,
    shorten_lines,
    user_line,
)


def explain(model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Say what ``backend="highway"`` does with ``model(*args, **kwargs)``.

    That is: which chains of blocks it finds, what their residual path is, and what is rewritten or why not.

    The call is made op by op, as the model stands, and with ``iterations="auto"`` once more if several
    iterations are not worth it but a single one may be. A model in evaluation mode is explained in
    evaluation mode, and under ``torch.no_grad()`` there is no backward pass to explain. Buffers, gradients,
    random states, arguments and caches are afterwards what they were before. Give it a model or a function
    that computes a loss, not a whole training step: an optimiser's step would be done.

    Args:
        model: a module or function, or what ``torch.compile`` made of one; its options are then used.
        *args: what to call it with.
        options: options of the backend, in place of those the model was compiled with.
        **kwargs: what to call it with.

    Raises:
        OptionError: an option has a wrong name, type or value.
    """
    compiled = _compat.compiled_parts(model)
    ours = compiled.backend == "highway"
    if options is None and ours:
        settings, _ = parse_options(compiled.options, compiled.mode)
    else:
        settings, _ = parse_options(options)
    if settings.iterations != "auto":
        return _explained(model, compiled, args, kwargs, settings)
    most = settings.shown()
    found = _explained(model, compiled, args, kwargs, most)
    note = f'iterations="auto" chooses k while training; this is k = {most.iterations}'
    if not any(c.applied for c in found.chains):
        if most.iterations == 1 or not any(is_about_cost(c.reason) for c in found.chains):
            return found
        # A step is watched, and k chosen, where a single iteration would be worth it.
        first = replace(most, iterations=1)
        fewer = _explained(model, compiled, args, kwargs, first)
        if not any(c.applied for c in fewer.chains):
            return found
        found = fewer
        note = (
            'iterations="auto" chooses k while training; this is k = 1, '
            f"and k = {most.iterations} is not expected to be worth it"
        )
    return replace(found, notes=(note, *found.notes))


def _explained(
    model: Any, compiled: _compat.Compiled, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Options
) -> Explanation:
    ours = compiled.backend == "highway"
    captured = capture(compiled.original, args, kwargs, settings, compiled.dynamic)
    notes = []
    if compiled.backend is not None and not ours:
        notes.append(
            f'the model is compiled with backend="{compiled.backend}"; this is what "highway" would do'
        )
    elif compiled.backend is None and _has_compiled_parts(model):
        notes.append("parts of the model are compiled on their own; this is what happens if all of it is")
    names = module_names(compiled.original)
    notes.extend(_recurrent_notes(compiled.original, captured, names))
    return explain_capture(captured, settings, names, notes)


def _recurrent_notes(model: Any, captured: Capture, names: Names) -> list[str]:
    """Recurrent modules that are in no graph."""
    if not isinstance(model, torch.nn.Module):
        return []
    found = {m for f in captured.frames for layer in f.layers for m in module_stack(layer.node, names)}
    missing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.RNNBase) and name not in found
    ]
    why = [REASON] if captured.packed else []
    if not captured.packed or len(missing) > 1:
        why.append("the graph breaks there, or it does not run, so its gradient is exact")
    return [f"{name or 'the recurrent module'} is in no graph: {'; or '.join(why)}" for name in missing]


def _has_compiled_parts(model: Any) -> bool:
    modules = list(model.modules())[1:] if isinstance(model, torch.nn.Module) else []
    return any(_compat.compiled_parts(m).backend is not None for m in modules)


def explain_capture(captured: Capture, options: Options, names: Names, notes: list[str]) -> Explanation:
    """Run the passes on copies of captured graphs. The graphs themselves are left as they are."""
    chains: list[ChainReport] = []
    graphs: list[GraphReport] = []
    notes.extend(_graph_break_notes(captured))
    if not captured.frames:
        notes.append("Dynamo captured no graph of this call, so nothing is compiled")
    for frame, calls in _distinct(captured.frames):
        if frame.failure:
            notes.append(f"a graph could not be traced: {frame.failure}")
            continue
        over_time = options.over_time()
        chains.extend(_layer_report(layer, over_time, names, len(graphs)) for layer in frame.layers)
        if not frame.joints:
            notes.append(f"no gradient needed: {_why_no_gradient()}")
        for joint in frame.joints:
            analysis = _Analysis.of(joint, options, names, graph=len(graphs), chains_before=len(chains))
            cut = bool(captured.graph_breaks)
            chains.extend(analysis.chains(cut))
            graphs.append(analysis.report(frame.graph_break.reason if frame.graph_break else "", calls))
            if not analysis.record.needs_gradient:
                notes.append(f"no gradient needed: {_why_no_gradient()}")
            elif not analysis.record.outcomes and not frame.layers:
                notes.append(f"no residual connection found{_in_graph(len(graphs) - 1, captured)}")
    return Explanation(tuple(chains), tuple(_counted(notes)), tuple(graphs), options)


@dataclass(frozen=True)
class _Analysis:
    """One joint graph and what the passes did to a copy of it."""

    before: GraphModule
    after: GraphModule
    record: Record
    options: Options
    names: Names
    graph: int
    outcomes: dict[int, Outcome]
    """By the number of the chain in the report."""

    @classmethod
    def of(
        cls, joint: GraphModule, options: Options, names: Names, graph: int, chains_before: int
    ) -> _Analysis:
        # Chains are looked for in what this makes, so nodes have its names.
        before = _compat.copy_graph_module(joint)
        prepare(before.graph)
        before.recompile()
        after = _compat.copy_graph_module(before)
        place = {node.name: i for i, node in enumerate(before.graph.nodes)}
        record = rewrite(after.graph, options)
        between = [Outcome(g, g.reason) for g in gaps(before.graph, [o.found for o in record.outcomes])]
        after.recompile()
        # The backward pass meets the model's last chain first.
        ordered = sorted(
            [*record.outcomes, *between],
            key=lambda outcome: max((place[n.name] for n in _nodes(outcome)), default=0),
            reverse=True,
        )
        numbered = dict(enumerate(ordered, chains_before))
        return cls(before, after, record, options, names, graph, numbered)

    def chains(self, cut: bool) -> list[ChainReport]:
        outcomes = list(self.outcomes.values())
        table = list(by_size([o.comparison for o in outcomes]))
        return [
            _chain_report(o, self.options, self.names, self.graph, cut, tuple(_sizes(o, table, i)))
            for i, o in enumerate(outcomes)
        ]

    def report(self, graph_break: str, calls: int) -> GraphReport:
        return GraphReport(
            nodes_before=len(self.before.graph.nodes),
            nodes_after=len(self.after.graph.nodes),
            depth_before=_depth(self.before.graph),
            depth_after=_depth(self.after.graph),
            seconds=dict(self.record.seconds),
            graph_break=graph_break,
            calls=calls,
            fused=tuple(f.blocks for f in self.record.forward if not f.reason),
            before_module=self.before,
            after_module=self.after,
            roles=roles_of(self.outcomes, self.options, self.after.graph),
        )


def _nodes(outcome: Outcome) -> list[Node]:
    found = outcome.found
    if found.blocks:
        return list(found.blocks[0].nodes)
    return [found.node] if isinstance(found, Refusal) and found.node is not None else []


def _depth(graph: Graph) -> int:
    return max(linear_part(graph).depth.values(), default=0)


def _chain_report(
    outcome: Outcome,
    options: Options,
    names: Names,
    graph: int,
    cut: bool,
    sizes: tuple[SizesReport, ...],
) -> ChainReport:
    found = outcome.found
    blocks = found.blocks
    applied = outcome.is_iterated
    entry = blocks[0].entry if blocks else ()
    values = [node.meta["val"] for node in entry]
    iterations = effective_iterations(options, len(blocks)) if applied else None
    return ChainReport(
        blocks=len(blocks),
        classes=tuple(len(c.members) for c in found.classes) if isinstance(found, Chain) else (),
        residual=found.residual,
        shapes=tuple(tuple(d if isinstance(d, int) else str(d) for d in v.shape) for v in values),
        dtypes=tuple(str(v.dtype).removeprefix("torch.") for v in values),
        modules=block_modules(blocks[::-1], names),
        lines=block_lines(blocks[-1]) if blocks else (),
        options=options,
        applied=applied,
        reason=_reason(outcome, cut),
        iterations=iterations,
        new_nodes=len(outcome.new),
        notes=tuple(_notes(outcome, options)),
        swept=outcome.swept,
        graph=graph,
        costs=None if outcome.comparison is None else _costs(outcome.comparison),
        sizes=sizes,
    )


def _notes(outcome: Outcome, options: Options) -> list[str]:
    if outcome.is_iterated:
        return [*_chain_notes(len(outcome.found.blocks), options), *_judged_with_others(outcome)]
    return [f"nor does one kernel compute it: {outcome.no_sweep}"] if outcome.no_sweep else []


def _judged_with_others(outcome: Outcome) -> list[str]:
    alone = "" if outcome.comparison is None else outcome.comparison.reason
    return ["not worth it alone, but together with other chains"] if alone else []


def _sizes(
    outcome: Outcome, table: Sequence[tuple[str, int, list[bool]]], chain: int
) -> Iterator[SizesReport]:
    if outcome.comparison is None or not outcome.comparison.is_open:
        return
    for symbol, rows in groupby(table, key=lambda row: row[0]):
        yield SizesReport(symbol, tuple((size, applied[chain]) for _, size, applied in rows))


def _costs(comparison: Comparison) -> tuple[CostReport, CostReport]:
    exact, iterated = (
        CostReport(
            str(work.flops.formula),
            len(work.products),
            work.depth,
            str(work.bytes.formula),
            len(work.kernels),
            seconds,
        )
        for work, seconds in (
            (comparison.exact, comparison.exact_seconds),
            (comparison.iterated, comparison.iterated_seconds),
        )
    )
    return exact, iterated


def _layer_report(layer: Layer, options: Options, names: Names, graph: int) -> ChainReport:
    steps = layer.steps
    known = steps if isinstance(steps, int) else None
    iterations = None if layer.reason else options.iterations
    if known is not None and isinstance(iterations, int):
        iterations = effective_iterations(options, known)
    line = user_line(layer.node)
    notes = [layer.note] if layer.note else []
    if known is not None and not layer.reason:
        notes += _chain_notes(known, options)
    return ChainReport(
        blocks=steps if known is not None else str(steps),
        classes=(),
        residual=layer.residual,
        shapes=tuple(tuple(d if isinstance(d, int) else str(d) for d in x.shape) for x in layer.carry),
        dtypes=tuple(str(x.dtype).removeprefix("torch.") for x in layer.carry),
        modules=tuple(module_stack(layer.node, names)[-1:]),
        lines=() if line is None else (line,),
        options=options,
        applied=not layer.reason,
        reason=layer.reason,
        iterations=iterations if isinstance(iterations, int) else None,
        new_nodes=0,
        notes=tuple(notes),
        graph=graph,
        over="time",
    )


def _reason(outcome: Outcome, cut: bool) -> str:
    reason = outcome.reason
    if cut and reason.startswith("too short"):
        reason += " (a graph break keeps it apart from the rest of the model)"
    return reason


def _chain_notes(blocks: int, options: Options) -> list[str]:
    assert isinstance(options.iterations, int)
    groups = -(-(blocks - options.exact_tail) // options.group_size)
    if options.iterations < groups:
        return []
    plural = "s" * (groups != 1)
    what = f"block{plural}" if options.group_size == 1 else f"group{plural} of {options.group_size} blocks"
    more = f": only {groups} {'are' if plural else 'is'} done" if options.iterations > groups else ""
    return [
        f"iterations={options.iterations} and {groups} {what}{more}; "
        "the gradient is exact, but costs more than plain backpropagation would"
    ]


def _graph_break_notes(captured: Capture) -> list[str]:
    """Each break once, with the user's line where it is known."""
    found = [f.graph_break for f, _ in _distinct(captured.frames) if f.graph_break is not None]
    for other in captured.graph_breaks:
        if not any(other.reason in known.reason for known in found):
            # A frame that is given up says the same as the break that caused it, and where.
            found = [known for known in found if known.line or known.reason not in other.reason] + [other]
    return [f"graph break: {b.reason}" + (f" [{shorten_lines([b.line])}]" if b.line else "") for b in found]


def _why_no_gradient() -> str:
    if not torch.is_grad_enabled():
        return "gradients are disabled here (torch.no_grad or inference_mode)"
    return "no input or parameter of the graph requires a gradient"


def _distinct(frames: Sequence[Frame]) -> list[tuple[Frame, int]]:
    """Each frame once, with how often it ran: one compiled frame may serve every block of a loop."""
    counts: dict[int, int] = {}
    for frame in frames:
        counts[id(frame)] = counts.get(id(frame), 0) + 1
    return [(frame, counts.pop(id(frame))) for frame in frames if id(frame) in counts]


def _in_graph(index: int, captured: Capture) -> str:
    return f" in graph {index}" if len(captured.frames) > 1 else ""


def _counted(notes: Sequence[str]) -> list[str]:
    """Equal notes once, with how often they occurred."""
    counts: dict[str, int] = {}
    for note in notes:
        counts[note] = counts.get(note, 0) + 1
    return [note if n == 1 else f"{note} ({n} times)" for note, n in counts.items()]
