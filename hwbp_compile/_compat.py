"""Everything that differs between torch versions, or reaches below torch's public surface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def compiled_parts(model: Any) -> tuple[Any, dict[str, Any] | None, str | None]:
    """Of what ``torch.compile`` returned: the original callable, its options and its mode."""
    original = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)
    if original is None:
        return model, None, None
    context = getattr(model, "dynamo_ctx", None) or getattr(model, "_torchdynamo_context", None)
    backend = getattr(context, "callback", None)
    for _ in range(8):
        kwargs = getattr(backend, "kwargs", None)
        if isinstance(kwargs, dict):
            return original, kwargs.get("options"), kwargs.get("mode")
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
        if backend is None:
            break
    return original, None, None
