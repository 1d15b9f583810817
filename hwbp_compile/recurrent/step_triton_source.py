"""Triton for a whole recurrence, written from the graph of one step.

Each program takes a few rows of the batch through all steps. States stay in registers, and so do the weights
if they are few. What the next step reads is loaded while a step is computed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

import torch
from torch.fx import Node

from ..errors import CannotRewrite
from .step_program import ROWS, StepProgram
from .step_tiles import Memory, NeedsCut, Tile, Value, lane_of, lines_along, runs_of
from .step_triton_nodes import write
from .step_triton_operators import LIBRARY
from .step_triton_writer import Shape, Writer, has_rows

_MOST_CUTS = 200


def recurrence_source(program: StepProgram, shape: Shape, *, reverse: bool) -> str:
    """A module with the function ``kernel``.

    Its arguments: the inputs, what the steps share (matrices column by column), the initial states, then
    where to write the states (all, the initial one first, or the last ones) and what is emitted; the number
    of steps, of rows, and a zero of which the compiler knows nothing. What there is for each step is given
    from the first step to be run on.

    Raises:
        CannotRewrite: the step does something that is not written here, or mixes the rows of the batch.
    """
    cuts: dict[Node, set[int]] = defaultdict(set)
    for _ in range(_MOST_CUTS):
        try:
            return _written(program, shape, cuts, "-" if reverse else "+")
        except NeedsCut as needed:
            if needed.place in cuts[needed.node]:
                break
            cuts[needed.node].add(needed.place)
    raise CannotRewrite("the step takes its values apart in too many ways for a kernel")


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether what all steps share is read column by column: its products are then summed within threads."""
    return len(shape) > 1 and ROWS not in shape


def _written(program: StepProgram, shape: Shape, cuts: Mapping[Node, Set[int]], forth: str) -> str:
    if any(program.shape(n)[:1] != (ROWS,) for n in program.carry):
        raise CannotRewrite("the batch is not the first dimension of the state")
    writer = Writer(shape, cuts)
    following, emitted, _ = program.results
    for i, node in enumerate(program.inputs):
        writer.values[node] = _in_memory(program, node, Memory(f"x{i}", has_rows(node), True))
    for i, node in enumerate(program.shared):
        writer.values[node] = _in_memory(program, node, Memory(f"s{i}", has_rows(node), False))
    for i, node in enumerate(program.carry):
        writer.values[node] = _first_state(writer, program, node, i)
    for node in program.graph.nodes:
        if node.op == "call_function":
            writer.values[node] = write(writer, node)
    for i, node in enumerate(emitted):
        writer.store(node, f"e{i}", writer.lines)
    for i, (node, state) in enumerate(zip(following, program.carry, strict=True)):
        _follow(writer, node, state)
        if program.keep:
            writer.store(node, f"y{i}", writer.lines)
        else:
            writer.store(state, f"y{i}", writer.after)
    return _module(writer, program, forth)


def _in_memory(program: StepProgram, node: Node, memory: Memory) -> Value:
    """A tensor in memory: the batch first, else without gaps, matrices column by column."""
    where = program.shape(node)
    shape = [n for n in where if n != ROWS]
    places = torch.arange(math.prod(shape))
    if is_matrix(where) and node in program.shared:
        return Value(places.view(*shape[:-2], shape[-1], shape[-2]).mT, memory)
    places = places.view(shape)
    return Value(places.unsqueeze(where.index(ROWS)) if ROWS in where else places, memory)


def _first_state(writer: Writer, program: StepProgram, node: Node, number: int) -> Value:
    """The state that a step begins with: loaded before the first, then what the last one made."""
    memory = Memory(f"h{number}", True, False)
    loaded = _in_memory(program, node, memory)
    lane, found = writer.empty(loaded.places.shape, [loaded])
    for index, line in lines_along(loaded.places, lane):
        for start, (run,) in writer.aligned([runs_of(loaded, line)], node):
            name = writer.new_name("h")
            writer.before.append(f"{name} = {writer.load(run, memory)}")
            if program.keep:
                writer.before.append(writer.storing(name, f"y{number}", run.first, run.step, run.width))
            writer.put(found, lane, index, Tile(name, run.width, node, start))
    return Value(found)


def _follow(writer: Writer, node: Node, state: Node) -> None:
    """Make what a step returned the state of the next one."""
    made, before = writer.in_tiles(state, writer.values[node]), writer.values[state]
    lane = lane_of([before], before.places.shape)
    new = lines_along(made.places.expand(before.places.shape), lane)
    for (_, made_line), (_, line) in zip(new, lines_along(before.places, lane), strict=True):
        for _, (a, b) in writer.aligned([writer.runs(made, made_line), writer.runs(before, line)]):
            name = writer.tile_of(b).name
            # All are read before the first is overwritten.
            writer.lines.append(f"n_{name} = {writer.spread(writer.whole(a), b.width)}")
            writer.last.append(f"{name} = n_{name}")


def _module(writer: Writer, program: StepProgram, forth: str) -> str:
    """The kernel around the statements, of which a step's are repeated."""
    groups = {
        "x": program.inputs,
        "s": program.shared,
        "h": program.carry,
        "y": program.carry,
        "e": program.results[1],
    }
    names = {prefix: [f"{prefix}{i}" for i in range(len(nodes))] for prefix, nodes in groups.items()}
    node_of = {name: node for p, nodes in groups.items() for name, node in zip(names[p], nodes, strict=True)}
    size = {name: math.prod(n for n in program.shape(node) if n != ROWS) for name, node in node_of.items()}
    rows, across = ("", "") if writer.shape.rows == 1 else ("[:, None]", "[None, :]")

    def start(name: str) -> str:
        return f"p_{name} = {name}" + (f" + row * {size[name]}" if has_rows(node_of[name]) else "")

    def step(name: str) -> str:
        return f"(batch * {size[name]})" if has_rows(node_of[name]) else str(size[name])

    count = writer.shape.rows
    first = f"tl.program_id(0) * {count} + tl.arange(0, {count})" if count > 1 else "tl.program_id(0)"
    kept = names["y"] if program.keep else []
    body = [
        # In the last step, that step's own inputs are loaded once more.
        "ahead = (step + 1 < steps).to(tl.int32)",
        *(f"p_{n} {forth}= ahead * {step(n)}" for n in names["x"]),
        *(f"p_{n} {forth}= {step(n)}" for n in kept),
        *([] if writer.shape.hold else [f"p_{n} += still" for n in names["s"]]),
        *writer.ahead,
        *writer.lines,
        *writer.last,
        *(f"p_{n} {forth}= {step(n)}" for n in names["e"]),
    ]
    lines = [
        # Tensors may have more than 2^31 elements.
        f"row = ({first}).to(tl.int64){rows}",
        "batch = batch.to(tl.int64)",
        *(["inside = row < batch"] if rows else []),
        *map(start, node_of),
        *(f"c{1 << i} = tl.arange(0, {1 << i}){across}" for i in range(writer.shape.widest.bit_length())),
        *writer.before,
        "for step in range(steps):",
        *(f"    {line}" for line in body),
        *writer.after,
    ]
    arguments = ", ".join([*node_of, "steps", "batch", "still"])
    text = "\n".join(f"    {line}" for line in lines)
    decorator = '@triton.jit(do_not_specialize=["steps", "batch", "still"])'
    return f"{LIBRARY}\n\n{decorator}\ndef kernel({arguments}):\n{text}\n"
