"""``hwbp_compile::recurrence``: one program applied step after step, in either direction of time.

What a program is stands in a text that says of which cell and of which shapes it is, so that code which was
compiled in another process finds it again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _compat
from ..errors import CannotRewrite
from ..passes.linear_ops import op_name
from .cell_graph import CellGraph, trace_cell
from .cells import STEPS, steps_for_any_batch
from .step_cpp import CppRecurrence
from .step_loop import LoopRecurrence
from .step_program import ROWS, StepProgram, backward_program, forward_program
from .step_triton import TritonRecurrence

Kernel = CppRecurrence | TritonRecurrence

torch.library.define(
    "hwbp_compile::recurrence",
    "(Tensor[] initial, Tensor[] inputs, Tensor[] shared, str program, bool reverse) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def recurrence(
    initial: Sequence[Tensor],
    inputs: Sequence[Tensor],
    shared: Sequence[Tensor],
    kernel: str,
    *,
    reverse: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """All states of ``state[t + 1] = step(state[t], inputs[t], shared)``, ``t = 0 .. T - 1``.

    With ``reverse`` time runs backwards: ``state[t] = step(state[t + 1], inputs[t], shared)``.

    Args:
        initial: the components of ``state[0]`` (or ``state[T]``), ``[B, ...]`` each.
        inputs: ``[T, ...]`` each.
        shared: what all steps read.
        kernel: from :func:`kernel_name`.

    Returns:
        Each component over time, ``[T + 1, B, ...]`` (or its last state, if the kernel does not keep them),
        what the steps emit, ``[T, B, ...]`` each, and what is summed over steps and rows.
    """
    result = torch.ops.hwbp_compile.recurrence.default(
        list(initial), list(inputs), list(shared), kernel, reverse
    )
    n = len(initial)
    m = n + len(_kernel(kernel).program.emitted)
    return result[:n], result[n:m], result[m:]


@torch.library.impl("hwbp_compile::recurrence", "default")
def _run(
    initial: list[Tensor], inputs: list[Tensor], shared: list[Tensor], kernel: str, reverse: bool
) -> list[Tensor]:
    return _kernel(kernel)(initial, inputs, shared)


@torch.library.register_fake("hwbp_compile::recurrence")
def _fake(
    initial: list[Tensor], inputs: list[Tensor], shared: list[Tensor], kernel: str, reverse: bool
) -> list[Tensor]:
    return _kernel(kernel).results(initial, inputs[0].shape[0])


def kernel_name(
    key: str,
    cell: CellGraph,
    carry: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    emit: bool = False,
    backward: Sequence[bool] | None = None,
    wanted: Sequence[bool] = (),
) -> str:
    """The name of a kernel of a cell, which is compiled if it was not before; of a loop if there is none.

    Args:
        key: the cell's, in :data:`.cells.STEPS`.
        cell: traced for tensors of these shapes.
        carry: of one step, as are the ``inputs``.
        inputs: see ``carry``.
        weights: what the cell's steps share.
        emit: whether a forward kernel also returns what a backward pass needs.
        backward: of the exact backward kernel, whether cotangents join from outside, per component; None for
            the forward kernel.
        wanted: of the exact backward kernel, per input and weight whether its gradient is.

    Raises:
        CannotRewrite: there is neither.
    """
    batch = _fixed(carry[0].shape[0]) if carry[0].dim() else 0

    def shape(x: Tensor, rows: bool) -> list[Any]:
        found = [ROWS if rows and d == 0 and str(n) == str(batch) else int(n) for d, n in enumerate(x.shape)]
        return [found, str(x.dtype).removeprefix("torch.")]

    name = json.dumps(
        {
            "cell": key,
            "emit": emit,
            "backward": None if backward is None else list(backward),
            "wanted": list(wanted),
            "carry": [shape(x, True) for x in carry],
            "inputs": [shape(x, True) for x in inputs],
            "weights": [shape(x, False) for x in weights],
            "graph": cell.signature,
            "batch": batch if isinstance(batch, int) else None,
            "device": str(carry[0].device),
            "exact_products": _compat.exact_products(),
            "numbers": _numbers(cell, batch),
        }
    )
    _kernel(name)
    return name


def _fixed(size: int | torch.SymInt) -> int | torch.SymInt:
    """A size, as an integer if it is known by now."""
    expression = _compat.size_expression(size)
    return int(expression) if expression.is_number else size


def _numbers(cell: CellGraph, batch: int | torch.SymInt | None) -> str:
    """The shapes of all of a cell's values, and the numbers that its operators are given.

    Equal for a batch of so many, which may be open, and for :data:`ROWS` in its place. The batch's size may
    stand in shapes only: what computes with it computes something else for each.
    """
    open_size = None if isinstance(batch, (int, type(None))) else _compat.size_expression(batch)

    def size(n: Any) -> Any:
        if isinstance(n, int) and n and n % ROWS == 0:
            return n // ROWS * batch if isinstance(batch, int) else f"{n // ROWS} B"
        if isinstance(n, torch.SymInt):
            times = _compat.size_expression(n) / open_size if open_size is not None else None
            return f"{times} B" if times is not None and times.is_Integer else str(n)
        return n

    values = [n.meta.get("val") for n in cell.nodes]
    sizes = [[size(d) for d in x.shape] for x in values if isinstance(x, Tensor)]
    shapes: list[Any] = []
    others: list[Any] = []
    for node in cell.nodes:
        for is_size, argument in _compat.arguments_of(node):
            (shapes if is_size else others).append(argument)
    if batch == 1:
        # Dimensions of one element may stand in any order, which changes nothing.
        return _digest([[d for d in each if d != 1] for each in sizes], others)
    return _digest(sizes, [pytree.tree_map(size, x) for x in shapes], others)


def _digest(*facts: Any) -> str:
    return hashlib.sha256(str(facts).encode()).hexdigest()[:16]


def kernel_program(name: str) -> StepProgram:
    """What a kernel does; positions in it are those in the graph of the cell it was asked for with."""
    return _kernel(name).program


def why_no_kernel(name: str) -> str:
    """Why the steps run in a loop of torch's operators; empty if there is a kernel."""
    return _made(name)[1]


def _kernel(name: str) -> Kernel | LoopRecurrence:
    found, reason = _made(name)
    if found is None:
        raise CannotRewrite(reason)
    return found


@functools.lru_cache(maxsize=256)
def _made(name: str) -> tuple[Kernel | LoopRecurrence | None, str]:
    """What runs a program, and why it is no kernel or nothing."""
    given = json.loads(name)
    no_autocast = _compat.without_autocast(torch.device(given["device"]))
    with _compat.outside_of_tracing(), torch.inference_mode(False), no_autocast:
        kernel = _compiled(given)
        if not isinstance(kernel, str):
            return kernel, ""
        if given["batch"] is None:
            return None, f"{kernel}, and the size of the batch is not fixed"
        loop = _loop(given)
        return loop, kernel if loop is not None else f"{kernel}, and other sizes are not fixed"


def _like(given: Any, which: str, batch: int | None = None, rows: int = ROWS) -> list[Tensor]:
    """Tensors of the shapes that a name holds, with ``rows`` rows; sizes equal to ``batch`` count as such."""
    return [
        torch.empty((), dtype=getattr(torch, dtype), device=given["device"]).expand(
            [rows if d == 0 and n in (batch, ROWS) else n for d, n in enumerate(shape)]
        )
        for shape, dtype in given[which]
    ]


def _loop(given: Any) -> LoopRecurrence | None:
    carry, inputs = (_like(given, which, rows=given["batch"]) for which in ("carry", "inputs"))
    # Weights hold no stand-in: one that is as long as it is so by itself.
    weights = _like(given, "weights")
    cell = trace_cell(STEPS[given["cell"]], carry, inputs, weights)
    if cell.signature != given["graph"]:
        return None  # positions in it would be others
    if given["backward"] is None:
        return LoopRecurrence(forward_program(cell, emit=given["emit"], rows=False), reverse=False)
    program = backward_program(cell, given["backward"], given["wanted"], rows=False, on_the_way=False)
    return LoopRecurrence(program, reverse=True)


def _compiled(given: Any) -> Kernel | str:
    """The kernel, or why there is none."""
    if torch.device(given["device"]).type not in ("cpu", "cuda"):
        return "there are kernels for CPUs and CUDA devices only"
    carry, inputs, batch = _like(given, "carry"), _like(given, "inputs"), given["batch"]
    reason = ""
    # What all steps share may have a dimension for the batch too, and a cell its size as a constant.
    for weights, step in itertools.product(
        (_like(given, "weights"), _like(given, "weights", batch)), steps_for_any_batch(given["cell"], batch)
    ):
        try:
            cell = trace_cell(step, carry, inputs, weights)
        except Exception as error:  # the step does not take the stand-in for the batch
            reason = reason or f"the step cannot be traced for a batch of any size ({type(error).__name__})"
            continue
        same = cell.signature == given["graph"]
        if same and given["numbers"] == _numbers(cell, batch):
            return _written(cell, given, carry[0].dtype)
        reason = "the step does other things for other sizes of the batch"
    return reason


def _written(cell: CellGraph, given: Any, dtype: torch.dtype) -> Kernel | str:
    added, device = given["backward"], torch.device(given["device"])
    reverse, in_cpp = added is not None, _is_for_cpp(device)
    try:
        if reverse:
            # On a GPU all steps' gradients at once are the faster.
            program = backward_program(cell, added, given["wanted"], on_the_way=in_cpp)
        else:
            program = forward_program(cell, emit=given["emit"], on_the_way=in_cpp)
        if in_cpp:
            return CppRecurrence(program, dtype, reverse=reverse)
        _check_extrema(cell, program)
        exact, tried = given["exact_products"], device if device.type == "cuda" else None
        return TritonRecurrence(program, dtype, reverse=reverse, exact_products=exact, device=tried)
    except CannotRewrite as refusal:
        return refusal.reason


def _is_for_cpp(device: torch.device) -> bool:
    return device.type == "cpu"


def _check_extrema(cell: CellGraph, program: StepProgram) -> None:
    """Refuse what finds the place of an extremum by comparing it with what is computed once more.

    Rounded otherwise, it would be equal to nothing, and its gradient 0 / 0.
    """
    for i in (*program.read, *program.emitted):
        if op_name(cell.nodes[i]) in ("aten::amax", "aten::amin"):
            raise CannotRewrite("the gradient of an extremum has no translation")
