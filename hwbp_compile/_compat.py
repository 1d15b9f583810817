"""Everything that differs between torch versions, or reaches below torch's public surface."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

@contextmanager
def vmap_fallback_is_an_error() -> Iterator[None]:
    """Turn vmap's silent loop over the batch into an error while the context lasts."""
    functorch = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Inductor's decomposition table, as its own compilation uses it."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def trace(function: Callable[..., Any], fake_inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace ``function`` on fake tensors into a graph of decomposed aten operators."""
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = detect_fake_mode(list(fake_inputs))
    if mode is None:
        raise RuntimeError("There is no fake tensor mode to trace in.")
    with mode, torch.no_grad():
        return make_fx(function, decomposition_table=dict(decompositions()))(*fake_inputs)


def sort_topologically(graph: fx.Graph) -> None:
    """Order the nodes so that operands come first, moving as little as possible."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def restart_exceptions() -> tuple[type[BaseException], ...]:
    """Exceptions by which Dynamo or symbolic shapes steer compilation: they must pass through."""
    from torch._dynamo import exc
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    names = ("RestartAnalysis", "TensorifyScalarRestartAnalysis", "SkipFrame")
    found = tuple(getattr(exc, name) for name in names if hasattr(exc, name))
    return (*found, GuardOnDataDependentSymNode)


class GraphPass(Protocol):
    """A pass over a joint graph with an identity for the caches."""

    def __call__(self, graph: fx.Graph) -> None: ...

    def uuid(self) -> Any: ...


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any], graph_pass: GraphPass
) -> Any:
    """Compile with Inductor, ``graph_pass`` running on the joint graph after the user's own passes."""
    from torch._inductor.compile_fx import compile_fx

    patches = dict(patches)
    patches["joint_custom_pre_pass"] = _compose(_user_passes(patches), graph_pass)
    return compile_fx(gm, list(example_inputs), config_patches=patches)


def compile_op_by_op(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any], graph_pass: GraphPass
) -> Any:
    """The joint graph, passes and partitioner of Inductor's compilation, run one aten operator at a time."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    user_passes = _user_passes(patches)

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        for each in (*user_passes, graph_pass):
            each(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    compiler = aot_autograd(
        fw_compiler=_run_as_it_is,
        bw_compiler=_run_as_it_is,
        decompositions=dict(decompositions()),
        partition_fn=partition,
    )
    return compiler(gm, example_inputs)


def capture_joint_graphs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[fx.GraphModule]:
    """Trace ``gm`` with AOTAutograd and return copies of its joint graphs (none where nothing needs a gradient)."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import default_partition

    joints: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        joints.append(copy_graph_module(joint))
        return default_partition(joint, inputs, **kwargs)

    compiler = aot_autograd(
        fw_compiler=_run_as_it_is,
        bw_compiler=_run_as_it_is,
        decompositions=dict(decompositions()),
        partition_fn=partition,
    )
    compiler(gm, example_inputs)
    return joints


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be changed; the nodes' values (fake tensors) are shared."""
    copy = fx.Graph()
    returned = copy.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(returned, tuple)
    value, original = returned
    copy.output(value).meta.update(original.meta)
    return fx.GraphModule(gm, copy)


def _run_as_it_is(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    from functorch.compile import make_boxed_func

    return make_boxed_func(gm.forward)


def _user_passes(patches: Mapping[str, Any]) -> tuple[Any, ...]:
    """The joint-graph passes that the user's options or Inductor's global configuration ask for."""
    from torch._inductor import config

    name = "joint_custom_pre_pass"
    found = patches[name] if name in patches else getattr(config, name)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def _compose(user_passes: tuple[Any, ...], graph_pass: GraphPass) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Composed(CustomGraphPass):
        """The user's passes, then ours; 2.11 takes no list."""

        def __call__(self, graph: fx.Graph) -> None:
            for each in (*user_passes, graph_pass):
                each(graph)

        def uuid(self) -> Any:
            ids = [each.uuid() if hasattr(each, "uuid") else None for each in user_passes]
            # Without an identity for every pass nothing may be cached.
            return None if None in ids else (*ids, graph_pass.uuid())

    return Composed()


def inductor_options() -> dict[str, Any]:
    """The names of Inductor's own options and their present values."""
    import torch._inductor

    known = torch._inductor.list_options()
    config = torch._inductor.config.get_config_copy()
    return {name: config.get(name) for name in known}


def inductor_mode_options(mode: str | None) -> dict[str, Any]:
    """What ``torch.compile(mode=...)`` means to Inductor. Raises ValueError for an unknown mode."""
    import torch._inductor

    if mode is None or mode == "default":
        return {}
    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise ValueError(f"mode={mode!r} is unknown; it must be one of {', '.join(map(repr, modes))}.")
    return dict(modes[mode])


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Add a text to the structured trace that tlparse reads."""
    from torch._logging import trace_structured

    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload
    )


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ``torch.compile`` was asked for, read back from what it returned."""

    original: Any
    """The callable that was compiled."""
    backend: str | None = None
    """None if it was not compiled."""
    options: dict[str, Any] | None = None
    mode: str | None = None
    dynamic: bool | None = None


def compiled_parts(model: Any) -> Compiled:
    """Take apart what ``torch.compile`` or ``Module.compile`` returned; anything else is its own original."""
    in_place = getattr(model, "_compiled_call_impl", None) if isinstance(model, torch.nn.Module) else None
    wrapper = in_place if in_place is not None else model
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        original, context = model._orig_mod, model.dynamo_ctx
    elif hasattr(wrapper, "_torchdynamo_orig_callable") and hasattr(wrapper, "_torchdynamo_wrapper_id"):
        original = model if in_place is not None else wrapper._torchdynamo_orig_callable
        context = _dynamo_context(wrapper)
    else:
        return Compiled(model)
    dynamic = getattr(context, "_dynamic", None)
    backend = getattr(context, "callback", None)
    for _ in range(8):
        if isinstance(getattr(backend, "kwargs", None), dict):
            name = getattr(backend, "compiler_name", None) or "inductor"
            return Compiled(original, name, backend.kwargs.get("options"), backend.kwargs.get("mode"), dynamic)
        following = getattr(backend, "_torchdynamo_orig_backend", None)
        if following is None:
            break
        backend = following
    return Compiled(original, getattr(backend, "compiler_name", None) or getattr(backend, "__name__", "unknown"), dynamic=dynamic)


def _dynamo_context(wrapper: Any) -> Any:
    """The context that made a compiled function: it is kept only in the function's closure."""
    for cell in getattr(wrapper, "__closure__", None) or ():
        if isinstance(cell.cell_contents, torch._dynamo.eval_frame._TorchDynamoContext):
            return cell.cell_contents
    return None


@contextmanager
def dynamo_caches_unchanged(backend: Callable[..., Any]) -> Iterator[None]:
    """Compile with ``backend`` inside without a trace in Dynamo's caches, however full they are.

    Shapes seen inside do not make later compilations dynamic, and cache entries made for ``backend`` are
    dropped at the end, so that they never count against the user's recompile limit.
    """
    import torch._dynamo

    unlimited = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30}
    try:
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False, **unlimited):
            yield
    finally:
        _drop_cache_entries(backend)


def _drop_cache_entries(backend: Callable[..., Any]) -> None:
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo import convert_frame
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        for entry in () if code is None else _debug_get_cache_entry_list(code):
            if getattr(entry.backend, "compiler_fn", entry.backend) is backend:
                manager = entry.guard_manager
                manager.extra_state.invalidate(entry, DeletedGuardManagerWrapper("the analysis is over"))


@dataclass(frozen=True, slots=True)
class GraphBreak:
    """Why Dynamo ended a graph before the end of the call."""

    reason: str
    """Its title and explanation in one line."""
    line: str = ""
    """``file:line`` of the user's code, if it is known."""


def graph_break_of(gm: fx.GraphModule) -> GraphBreak | None:
    """The graph break at the end of a graph that Dynamo handed to a backend."""
    found = getattr(gm, "compile_subgraph_reason", None)
    if found is None or not getattr(found, "graph_break", True):
        return None
    stack = list(getattr(found, "user_stack", ()))
    return GraphBreak(_first_sentences(found.reason), f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "")


@contextmanager
def record_graph_breaks() -> Iterator[list[GraphBreak]]:
    """Collect the graph breaks of all frames compiled inside, also of frames that Dynamo gave up."""
    from torch._dynamo.utils import counters

    found: list[GraphBreak] = []
    kinds = ("unimplemented", "graph_break")
    before = {kind: dict(counters[kind]) for kind in kinds}
    try:
        yield found
    finally:
        messages = [m for kind in kinds for m, count in counters[kind].items() if count > before[kind].get(m, 0)]
        for message in dict.fromkeys(messages):
            skipped = re.search(r"frame skipped: \S+ \((.+?) line (\d+)\)", message)
            line = f"{skipped[1]}:{skipped[2]}" if skipped else ""
            found.append(GraphBreak(_first_sentences(message) + (" (in a loop: the frame is not compiled)" if skipped else ""), line))


def _first_sentences(message: str) -> str:
    """Of Dynamo's many lines, the title and the explanation."""
    title = message.strip().splitlines()[0].strip()
    explanation = re.search(r"^\s*Explanation: (.*)$", message, re.MULTILINE)
    return title if explanation is None else f"{title}: {explanation[1].strip()}"
