"""Recurrences in a model that the highway backend compiles: ``nn.GRU``, ``nn.LSTM``, ``nn.RNN`` and scans.

Dynamo does not trace the modules of ``torch.nn``. While it traces for this backend, and for no other, they
are let in, and the library function that each of them calls is replaced by one in Python, which goes layer by
layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from .. import _compat
from ..errors import CannotRewrite
from ..options import Options
from ..ranges import Sizes, open_sizes_of
from .backward import EXACT, Settings
from .cost import why_exact_is_faster
from .layer import recurrent_layer
from .packed import saw_packed_sequence
from .scans import Scan, make_ready, scans_in

log = logging.getLogger(__name__)

MARK = "_hwbp_compile_recurrent"
"""Set on the functions that Dynamo may call as a backend for which recurrent modules are let in."""


def run_layers(
    kind: str,
    x: Tensor,
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:
    """All layers and directions; arguments as ``torch.nn`` passes them on, ``carry`` stacked over the layers.

    Returns the outputs and the last carry, stacked as well.
    """
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    device, given = x.device.type, x.dtype
    # Dynamo of torch 2.11 traces no question whether a device knows automatic mixed precision at all.
    casts = device != "meta" and torch.is_autocast_enabled(device) and given != torch.float64
    low = torch.get_autocast_dtype(device) if casts else None
    if low is not None:
        x, carry, weights = x.to(low), [c.to(low) for c in carry], [w.to(low) for w in weights]
    x = x.transpose(0, 1) if batch_first else x
    last: list[list[Tensor]] = [[] for _ in carry]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            initial = [c[i] for c in carry]
            source = x.flip(0) if direction else x
            y, *after = recurrent_layer(
                source, initial, list(weights[i * each : (i + 1) * each]), kind, EXACT
            )
            for c, all_ in zip(after, last, strict=True):
                all_.append(c)
            outputs.append(y.flip(0) if direction else y)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, training)
    states = [torch.stack(c) for c in last]
    if low is not None and device == "cpu" and kind != "lstm":
        # On CPUs autocast knows the LSTM only; the products inside of the others are cast, their results not.
        x, states = x.to(given), [s.to(given) for s in states]
    return (x.transpose(0, 1) if batch_first else x), states


def _one_state(kind: str) -> Any:
    def replacement(
        x: Tensor, h: Tensor, weights: Sequence[Tensor], biases: bool, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        y, (last,) = run_layers(kind, x, (h,), weights, *settings)
        return y, last

    return replacement


def _lstm(
    x: Tensor, carry: Sequence[Tensor], weights: Sequence[Tensor], biases: bool, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, (h, c) = run_layers("lstm", x, carry, weights, *settings)
    return y, h, c


def install() -> None:
    """Let recurrent modules in, from now on, where the backend carries :data:`MARK`."""
    replacements = {kind: _one_state(kind) for kind in ("gru", "rnn_tanh", "rnn_relu")}
    replacements["lstm"] = _lstm
    try:
        _compat.let_recurrent_modules_in(MARK, replacements, saw_packed_sequence)
    except (ImportError, AttributeError) as error:  # Dynamo's inside has changed; all else still works
        log.warning("Recurrent modules stay outside of compiled graphs with this version of torch: %r", error)


@dataclass(frozen=True, slots=True)
class Layer:
    """One recurrence, a layer in one direction or a scan, as Dynamo's graph has it; what is done with it."""

    node: Node
    kind: str
    reason: str
    """Why its backward pass stays exact; empty if it does not."""
    residual: str
    """The kind of its residual path."""
    steps: Any
    """Their number, which may be symbolic."""
    carry: tuple[Tensor, ...]
    """Each component of the state, as a fake tensor."""
    by_cost: bool = False
    """Whether ``reason`` depends on what it is expected to cost, and so on the sizes."""
    note: str = ""
    """How its steps are run, where not by a kernel."""


def settle(gm: GraphModule, options: Options, sizes: Sizes | None = None) -> list[Layer]:
    """Write the options in force into the recurrences of a graph that Dynamo made, and list these.

    Args:
        gm: the graph.
        options: those of the whole graph.
        sizes: what is faster is decided for these values of the sizes that it leaves open; by default for
            those at the end of the range that was traced.
    """
    target = torch.ops.hwbp_compile.recurrent_layer.default
    layers: list[Layer] = []
    options = options.over_time()
    chosen = None if options.chosen is None else options.chosen.over_time
    if sizes is None:
        open_sizes = open_sizes_of(gm)
        sizes = open_sizes.ends_of(open_sizes.traced)
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        found = [n for n in module.graph.nodes if n.op == "call_function" and n.target is target]
        for node in found:
            layers.append(_settle(node, options.for_chain(chosen, len(layers)), sizes))
        scans = scans_in(module.graph)
        for node in scans:
            layers.append(_settle_scan(module, node, options.for_chain(chosen, len(layers)), sizes))
        if found or scans:
            module.recompile()
    return layers


def _settings(options: Options, reason: str) -> Settings:
    iterations = options.iterations if not reason and isinstance(options.iterations, int) else EXACT
    watch = 0 if reason else options.watch
    return Settings(iterations, options.gamma, options.group_size, options.exact_tail, watch)


def _unwanted(options: Options) -> str:
    """Why no chain is rewritten."""
    if options.apply == "never":
        return 'apply="never" leaves every chain exact'
    exact = options.iterations == "exact" and not options.watch
    return 'iterations="exact" leaves every chain exact' if exact else ""


_RESIDUALS = {"gru": "gate", "lstm": "gate on a state of 2 tensors"}


def _no_path(residual: str, options: Options, what: str) -> str:
    """Why a recurrence without a residual path is not iterated: unless that is what was asked for."""
    if residual or options.gamma == 1.0:
        return ""
    return f"no residual path: {what} through matrices only; gamma=1.0 iterates without one"


def _settle(node: Node, options: Options, sizes: Sizes) -> Layer:
    kind = str(node.args[3])
    residual = _RESIDUALS.get(kind, "")
    reason = _unwanted(options) or _no_path(residual, options, "a step of nn.RNN hands its state on")
    x, carry, weights = (_values(n) for n in ((node.args[0],), node.args[1], node.args[2]))
    by_cost = not reason and options.apply == "auto"
    reason = reason or _too_slow(kind, x, carry, weights, options, sizes)
    settings = _settings(options, reason)
    node.args = (*node.args[:4], *astuple(settings))
    _log(kind, reason, settings)
    values, steps = tuple(carry), x[0].shape[0]
    return Layer(node, kind, reason, residual, steps, values, by_cost)


def _values(nodes: Any) -> list[Tensor]:
    return [n.meta["example_value"] for n in nodes]


def _too_slow(
    key: str,
    inputs: Sequence[Tensor],
    carry: Sequence[Tensor],
    weights: Sequence[Tensor],
    options: Options,
    sizes: Sizes,
) -> str:
    """Why ``apply="auto"`` leaves it exact; empty if it does not."""
    if options.apply != "auto":
        return ""
    return why_exact_is_faster(inputs, carry, weights, key, _settings(options.judged(), ""), sizes)


def _settle_scan(module: GraphModule, node: Node, options: Options, sizes: Sizes) -> Layer:
    reason, residual, by_cost, note = _unwanted(options), "", False, ""
    init, inputs = node.args[1], node.args[2]
    values, steps = tuple(_values(init)), _values(inputs)[0].shape[0]
    if options.apply != "never":
        try:
            scan = Scan(module, node)
            residual = scan.residual
            if scan.why_no_kernel:
                note = f"its steps run in a loop of torch's operators: {scan.why_no_kernel}"
            reason = reason or _no_path(residual, options, "a step of the cell hands its state on")
            reason = reason or scan.why_not_parallel()
            x, carry, weights = (_values(nodes) for nodes in (scan.inputs, scan.init, scan.weights))
            by_cost = not reason and options.apply == "auto"
            reason = reason or _too_slow(scan.cell, x, carry, weights, options, sizes)
            node = scan.replace(_settings(options, reason))
        except CannotRewrite as refusal:
            reason, note = refusal.reason, ""
        except _compat.restart_exceptions():
            raise
        except Exception as error:
            log.warning("A scan is left exact after an internal error.", exc_info=True)
            note, reason = "", f"internal error: {type(error).__name__}: {error}"
    if node in scans_in(module.graph):
        make_ready(module, node)
    _log("scan", reason, _settings(options, reason))
    return Layer(node, "scan", reason, residual, steps, values, by_cost, note)


def _log(kind: str, reason: str, settings: Settings) -> None:
    log.info("%s over time: %s", f"left exact: {kind}" if reason else f"parallel: {kind}", reason or settings)
