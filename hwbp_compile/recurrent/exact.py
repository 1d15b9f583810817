"""Exact backpropagation through time of a cell whose state passes a diagonal and one matrix, as a GRU's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..passes.batch import Stacked, rows_of
from ..passes.classes import value_text
from ..passes.linear_ops import is_heavy, op_name
from ..passes.program import BlockProgram
from . import sweep_cpp
from .cell_graph import CellGraph
from .time_system import CellReplay


@dataclass(frozen=True, slots=True)
class OneMatrix:
    """``exit = K * entry + (c * [entry, entry, ...]) @ weight``: the nodes of the product's factors."""

    scaled: Node
    weight: Node


def one_matrix(cell: CellGraph) -> OneMatrix | None:
    """Whether the cell's backward pass has this form; None if not."""
    block = cell.block
    heavy = [n for n in block.nodes if is_heavy(n)]
    if len(block.entry) != 1 or len(heavy) != 1 or op_name(heavy[0]) != "aten::mm":
        return None
    (product,), (exit_,) = heavy, block.exit
    inside = {*block.entry, *block.nodes}
    scaled, weight = product.args
    if (
        not isinstance(scaled, Node)
        or not isinstance(weight, Node)
        or scaled not in inside
        or weight in inside
    ):
        return None
    terms = {n for n in exit_.all_input_nodes if n in inside}
    if op_name(exit_) != "aten::add" or exit_.kwargs or not terms <= {product, *cell.split.path}:
        return None
    state = value_text(block.entry[0])
    for node in _leading_to(scaled, inside):
        if node in block.entry:
            continue
        joins = op_name(node) == "aten::cat" and node is scaled
        if not joins and not (_is_elementwise(node) and value_text(node) == state):
            return None
    return OneMatrix(scaled, weight)


def _leading_to(end: Node, inside: set[Node]) -> set[Node]:
    seen, stack = {end}, [end]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in inside and node not in seen:
                seen.add(node)
                stack.append(node)
    return seen


def _is_elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def sweep(cell: CellGraph, form: OneMatrix, replay: CellReplay, of_output: Tensor) -> Tensor:
    """The cotangents of all states, the initial one first: ``[T + 1, B, H]``."""
    steps = of_output.shape[0]
    ((factor,),) = BlockProgram(cell.block, cell.split, replay.value, steps).residual()
    like = of_output[0]
    if isinstance(factor, float):
        factor = torch.full_like(like, factor)
    # The left factor is elementwise in the cotangent, so its value at one is its coefficient.
    at_one = replay.copy()
    at_one.give(cell.block.entry[0], Stacked(torch.ones_like(of_output)))
    coefficients = rows_of(at_one.value(form.scaled), form.scaled.meta["val"], steps)
    direct = torch.cat([torch.zeros_like(of_output[:1]), of_output[:-1]])
    weight = replay.value(form.weight)
    return sweep_cpp.recurrent_sweep(
        rows_of(factor, like, steps), coefficients, weight, direct, of_output[-1]
    )
