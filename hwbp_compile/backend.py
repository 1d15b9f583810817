"""The door of ``torch.compile``: options in, a compiled function out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from . import _compat
from .control.choices import Findings
from .control.program import Program
from .control.variants import Variants
from .options import Options, parse_options
from .passes.apart import take_apart
from .passes.kernels import may_have_kernels
from .passes.outcomes import IsWatched
from .passes.pipeline import rewrite, simplified
from .passes.record import drop_observations, new_records
from .passes.row_gradients import join_row_gradients
from .passes.worth import Comparison
from .ranges import Range, open_sizes_of
from .recurrent.as_it_is import run_as_it_is
from .recurrent.capture import MARK, install, settle
from .recurrent.scans import trained_scans
from .report.log import log_record

log = logging.getLogger(__name__)


def highway(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile ``gm`` so that its backward pass runs in parallel over depth; see :class:`.options.Options`.

    Not called directly: ``torch.compile(model, backend="highway", options={...})``.

    Raises:
        OptionError: an option has a wrong name, type or value.
    """
    ours, inductor = parse_options(options, mode)
    cuda_graphs = _compat.uses_cuda_graphs(inductor)

    def compile(
        gm: GraphModule, inputs: Sequence[Any], options: Options, keeps_records: bool
    ) -> tuple[Program, Findings]:
        layers = settle(gm, options)
        by_op = options.codegen == "eager"
        # A CUDA graph takes less time than calls of the library, and may hold them where nothing is trained.
        on_gpu = any(layer.carry[0].device.type == "cuda" for layer in layers)
        if not by_op and not (on_gpu and cuda_graphs and not torch.is_grad_enabled()):
            plain = run_as_it_is(gm, layers, keeps_records)
            if plain is not None:
                return Program(plain, has_memory=False), Findings(layers, ())
        if not by_op and trained_scans(gm):
            log.warning(
                "A scan stays torch's own, and Inductor computes wrong gradients for some of these, so its "
                "graph runs op by op. hwbp_compile.explain says why it is left."
            )
            by_op = True
        graph_pass = HighwayPass(options, keeps_records, open_sizes_of(gm).traced)
        run: Callable[..., Any]
        if by_op:
            run = _compat.compile_op_by_op(gm, inputs, inductor, graph_pass)
        elif options.watch and keeps_records and not graph_pass.range:
            is_certain = options.apply == "always" or any(not layer.reason for layer in layers)
            run = _compile_watched(gm, inputs, inductor, graph_pass, is_certain)
        else:
            run = _compat.compile_with_inductor(gm, inputs, inductor, graph_pass)
        program = Program(run, keeps_records, is_sure=graph_pass.records is not None)
        if keeps_records and graph_pass.records is False:
            program.records_nothing(new_records(inputs[-1].device, options.records_blocks))
        return program, Findings(layers, graph_pass.comparisons)

    return Variants(gm, example_inputs, ours, compile, cuda_graphs)


setattr(highway, MARK, True)
install()


def _compile_watched(
    gm: GraphModule,
    inputs: Sequence[Any],
    inductor: Mapping[str, Any],
    graph_pass: HighwayPass,
    is_certain: bool,
) -> Callable[..., Any]:
    """Compile steps that are watched: few of many, so that their code would take longer than they do.

    They run op by op, and only where nothing is to be watched code is generated. Not for graphs with open
    sizes: what Inductor finds out about these has to be known before Dynamo is done, or later programs hold
    for single sizes.

    Args:
        gm: as for :func:`._compat.compile_with_inductor`, like the next ones.
        inputs: what it is compiled for.
        inductor: a configuration.
        graph_pass: with options by which iterations are watched.
        is_certain: whether it is known already that there are any, but for what cannot be rewritten.
    """
    if not is_certain:
        graph_pass.stops = True
        try:
            run = _compat.compile_with_inductor(_compat.copy_dynamo_graph(gm), inputs, inductor, graph_pass)
        except IsWatched:
            graph_pass.stops = False
        else:
            graph_pass.records = False  # which the pass does not say of code from a cache
            return run
    run = _compat.compile_op_by_op(_compat.copy_dynamo_graph(gm), inputs, inductor, graph_pass)
    if not graph_pass.records:
        graph_pass.records = None
        run = _compat.compile_with_inductor(gm, inputs, inductor, graph_pass)
    return run


class HighwayPass:
    """The rewrite as a pass over joint graphs, with an identity that caches can rely on."""

    def __init__(self, options: Options, keeps_records: bool = False, range: Range = ()) -> None:
        self.options = options
        self.keeps_records = keeps_records
        """Whether the last input of the graph is memory for :mod:`.passes.record`."""
        self.range = range
        """That of the sizes which were traced, for which is chosen what has not been chosen before."""
        self.comparisons: tuple[Comparison | None, ...] | None = None
        """What was compared for each chain; None while no graph was rewritten."""
        self.records: bool | None = None
        """Whether the backward pass writes to that memory; None while it is not known."""
        self.stops = False
        """Whether a graph in which anything is to be watched ends the compilation."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite ``graph`` in place; in one without a backward half there is little to do."""
        options = self.options
        if not options.is_iterated:
            self._keep_exact(graph)
            return
        record = rewrite(graph, options, keeps_records=self.keeps_records, compiles=True, stops=self.stops)
        self.comparisons = tuple(outcome.comparison for outcome in record.outcomes)
        self.records = bool(self.records) or _compat.writes_in_backward(graph)
        log_record(record, graph)

    def _keep_exact(self, graph: Graph) -> None:
        def sweep(graph: Graph) -> None:
            log_record(rewrite(graph, self.options, compiles=True), graph)

        # Where nothing is iterated no failure of ours may end a compilation.
        if not may_have_kernels(graph, self.options) or not simplified(graph, sweep):
            drop_observations(graph)
            simplified(graph, join_row_gradients, take_apart)

    def uuid(self) -> Any:
        """Changes with any option, any of our sources, the version of torch, and the sizes that decide."""
        return (
            "hwbp_compile",
            _source_hash(),
            torch.__version__,
            str(replace(self.options, given=frozenset())),
            tuple(sorted(self.options.given)),  # a set's own order differs between processes
            self.keeps_records,
            self.range if self.options.chooses else (),
        )


@cache
def _source_hash() -> str:
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
