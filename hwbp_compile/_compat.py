"""Everything that differs between torch versions, or reaches below torch's public surface."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import fx

T = TypeVar("T")


@contextmanager
def vmap_fallback_is_an_error() -> Iterator[None]:
    """Turn vmap's silent loop over the batch into an error while the context lasts."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Inductor's decomposition table, as its own compilation uses it."""
    import torch._inductor.lowering  # noqa: F401 - that of max_pool2d reads it and does not import it
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def trace(function: Callable[..., Any], fake_inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace ``function`` on fake tensors into a graph of decomposed aten operators."""
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = detect_fake_mode(list(fake_inputs))
    if mode is None:
        raise RuntimeError("There is no fake tensor mode to trace in.")
    table = dict(decompositions())
    if all(x.device.type == "cpu" for x in fake_inputs if isinstance(x, torch.Tensor)):
        # Of one row it makes a multiplication, into which Inductor fuses what computes its factors: a GELU is
        # then computed once for each element of a weight's gradient. Devices with arithmetic to spare gain.
        table.pop(torch.ops.aten.bmm.default, None)
    with mode, torch.no_grad():
        return make_fx(function, decomposition_table=table)(*fake_inputs)


def trace_shapes(
    function: Callable[..., Any], differentiable: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> fx.GraphModule:
    """Trace ``function`` on tensors like these, apart from whatever is being traced around the call.

    The first ones require a gradient.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    mode = _fake_mode(differentiable) or FakeTensorMode()
    shapes = [(tuple(x.shape), x.dtype, x.device) for x in (*differentiable, *others)]
    # Autograd's threads, one per GPU, and this one would share the mode's state.
    with _disable_current_modes(), mode, torch.autograd.set_multithreading_enabled(False):
        values = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
        for value in values[: len(differentiable)]:
            value.requires_grad_()
        # The decompositions of products depend on sizes, and what is done must not.
        products = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm")}
        table = {op: rule for op, rule in decompositions().items() if op not in products}
        traced = make_fx(function, decomposition_table=table)(*values)
        if any(mutates(node) for node in traced.graph.nodes):
            # Not in the first trace: functionalize cannot be around autograd.
            functional = torch.func.functionalize(traced, remove="mutations")
            with torch.no_grad():
                traced = make_fx(functional)(*values)
    _without_copies(traced.graph)
    _without_sizes(traced.graph)
    traced.graph.eliminate_dead_code()
    return traced


def _without_sizes(graph: fx.Graph) -> None:
    """Symbolic sizes are numbers where shapes are meant, as known ones are: graphs differ in what they do.

    What computes with a size stays a node, as a graph for other sizes has another number there.
    """

    def number(x: fx.Node) -> Any:
        value = x.meta.get("val")
        return value if isinstance(value, torch.SymInt) else x

    for node in graph.nodes:
        if str(node.target).startswith("aten.sym_"):
            continue
        node.args = tuple(
            fx.map_arg(a, number) if _is_integer(node, i) else a for i, a in enumerate(node.args)
        )
        node.kwargs = {
            k: fx.map_arg(a, number) if _is_integer(node, k) else a for k, a in node.kwargs.items()
        }


def _is_integer(node: fx.Node, argument: int | str) -> bool:
    """Whether an argument of an operator is an integer or a list of these, by its place or name."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    kinds: dict[int | str, Any] = {i: a.type for i, a in enumerate(schema.arguments)}
    kinds |= {a.name: a.type for a in schema.arguments}
    return "int" in str(kinds.get(argument, "")).lower()


def arguments_of(node: fx.Node) -> Iterator[tuple[bool, Any]]:
    """The arguments of an operator, tensors left out; of each, whether it is an integer or several."""
    places: list[tuple[int | str, Any]] = [*enumerate(node.args), *sorted(node.kwargs.items())]
    for place, argument in places if node.op == "call_function" else ():
        yield _is_integer(node, place), fx.map_arg(argument, lambda n: None)


def _without_copies(graph: fx.Graph) -> None:
    """Values are used as they are, not their copies; whether there are copies depends on sizes."""
    aten = torch.ops.aten
    for node in graph.nodes:
        value = None
        if node.target in (aten.clone.default, aten.alias.default, aten.detach.default):
            value = node.args[0]
        elif node.target is aten.copy.default:
            value = node.args[1]
        if isinstance(value, fx.Node):
            a, b = node.meta["val"], value.meta["val"]
            if a.shape == b.shape and a.dtype == b.dtype:
                node.replace_all_uses_with(value)


def mutates(node: fx.Node) -> bool:
    """Whether an operator writes to what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _fake_mode(values: Sequence[torch.Tensor]) -> Any:
    """The mode of these tensors or, where they are wrapped, the one in force; None outside of any."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor

    # While a backend is called, Dynamo's values are of another mode than the one in force.
    fake = [x for x in values if isinstance(x, FakeTensor)]
    return fake[0].fake_mode if fake else detect_fake_mode(list(values))


@contextmanager
def failures_are_expected() -> Iterator[None]:
    """Inside, torch does not log that an operator does not fit the shapes it is traced with."""
    from torch._subclasses import fake_tensor

    here = threading.get_ident()

    def is_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    fake_tensor.log.addFilter(is_elsewhere)
    try:
        yield
    finally:
        fake_tensor.log.removeFilter(is_elsewhere)


@contextmanager
def fake_mode_of(values: Sequence[torch.Tensor]) -> Iterator[None]:
    """The mode of these fake tensors, with nothing traced; plain tensors are taken as they are."""
    from torch.utils._python_dispatch import _disable_current_modes

    mode = _fake_mode(values)
    with _disable_current_modes(), torch.no_grad(), mode or nullcontext():
        yield


TAGS_OF_PYTHON_STATE: Final = tuple(
    tag
    for name in ("pt2_compliant_tag", "cudagraph_unsafe")
    if (tag := getattr(torch.Tag, name, None)) is not None
)
"""Tags of an operator that keeps more than tensors between its calls."""


@contextmanager
def autograd_inside_an_operator() -> Iterator[None]:
    """Record a graph for autograd within an operator's kernel, which runs below autograd otherwise."""
    keys, include = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with (
        include(keys.AutogradFunctionality, False),
        include(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which nothing is cast; some devices (``"meta"``) know no casting at all."""
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocasts(device: torch.device) -> bool:
    """Whether automatic mixed precision is in force for a device."""
    known = torch.amp.autocast_mode.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


@contextmanager
def outside_of_tracing() -> Iterator[None]:
    """Whatever is being traced around this context sees nothing of it, nor do casts around it matter."""
    from torch._dispatch.python import no_python_dispatcher
    from torch.utils._python_dispatch import _disable_current_modes

    with (
        _disable_current_modes(),
        no_python_dispatcher(),
        without_hooks_on_saved_tensors(),
        without_autocast(torch.device("cpu")),
        without_autocast(torch.device("cuda")),
    ):
        yield


@contextmanager
def without_hooks_on_saved_tensors() -> Iterator[None]:
    """What is saved for backward passes inside is hidden from hooks of the user's, such as a checkpoint's."""
    autograd: Any = torch._C._autograd
    before = autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        autograd._saved_tensors_hooks_set_tracing(before)


def graph_being_traced() -> fx.Graph | None:
    """The graph that is being made around this call, if there is one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def after_backward_pass(args: Sequence[Any], results: Any, call: Callable[[], None]) -> None:
    """Have a function called once the backward pass of a compiled graph is done.

    Args:
        args: what the graph was given, which may come from another compiled graph, and be returned as it is.
        results: what the graph returned. Where no result is the compiled function's own, such as a view that
            is made again outside of it, nothing is called; nor where torch compiles the whole backward pass,
            which calls hooks while it traces.
        call: what to call.
    """
    from torch._dynamo import compiled_autograd

    def after(*_: Any) -> None:
        if not (compiled_autograd.compiled_autograd_enabled or compiled_autograd.in_compiled_autograd_region):
            call()

    others = {x.grad_fn for x in args if isinstance(x, torch.Tensor)}
    for result in results if isinstance(results, (tuple, list)) else [results]:
        node = result.grad_fn if isinstance(result, torch.Tensor) else None
        if type(node).__name__ == "CompiledFunctionBackward" and node is not None and node not in others:
            node.register_hook(after)
            return


def copies_of(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Copies of numbers, made by one call and on a GPU by one kernel; clones would be as many."""
    return list(torch._foreach_mul(tensors, 1))


def size_hint(size: int | torch.SymInt) -> int:
    """A size, or the one that a symbolic size had when it was traced; nothing is guarded on it."""
    if isinstance(size, int):
        return size
    from torch.fx.experimental import symbolic_shapes

    hint = getattr(symbolic_shapes, "optimization_hint", None) or getattr(symbolic_shapes, "hint_int")  # noqa: B009
    return int(hint(size, fallback=64))


def size_at(size: int | torch.SymInt, sizes: Mapping[Any, int]) -> int:
    """A size where its symbols have these values; what it was when it was traced if any has none."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if not expression.free_symbols <= sizes.keys():
        return size_hint(size)
    return value_of(expression, sizes)


def value_of(expression: Any, sizes: Mapping[Any, int]) -> int:
    """An expression of ``sympy`` where its symbols have these values."""
    import sympy

    return int(expression.xreplace({symbol: sympy.Integer(value) for symbol, value in sizes.items()}))


def size_expression(size: int | torch.SymInt) -> Any:
    """A size as an expression of ``sympy``."""
    import sympy

    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


@dataclass(frozen=True, slots=True)
class Symbol:
    """A size that a graph leaves open: the one that was traced, and those it may have."""

    expression: Any
    value: int
    low: int
    high: int
    position: int
    """Which of the graph's inputs it is."""


def symbols_of(values: Sequence[Any]) -> tuple[Symbol, ...]:
    """Those among the inputs of a graph that are one symbol."""
    found = {}
    for position, value in enumerate(values):
        if not isinstance(value, torch.SymInt) or not value.node.expr.is_symbol:
            continue
        expression = value.node.expr
        bounds = value.node.shape_env.var_to_range[expression]
        low, high = (int(b) if b.is_Integer else sys.maxsize for b in (bounds.lower, bounds.upper))
        found[expression] = Symbol(expression, size_hint(value), low, high, position)
    return tuple(found.values())


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
    _compute_operands_where_they_are()
    with _stacks_are_kept:
        return compile_fx(gm, list(example_inputs), config_patches=patches)


@functools.cache
def _compute_operands_where_they_are() -> None:
    """Have what our operators read computed at its place in the graph, not at theirs.

    Inductor does so for operators that it has no code for, but only once it has met one in this process.
    Until then it computes the rows of a stack where that is made, at the end of the forward pass, in kernels
    that differ from layer to layer. And the second model of a process would get other code than the first.
    """
    from torch._inductor.lowering import add_needs_realized_inputs

    for name in torch._C._dispatch_get_all_op_names():
        library, _, name = name.partition("::")
        if library == "hwbp_compile":
            add_needs_realized_inputs(getattr(torch.ops.hwbp_compile, name.partition(".")[0]).default)


def uses_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor, with this configuration in place of its global one, runs code in CUDA graphs."""
    from torch._inductor import config

    return bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))


def compile_op_by_op(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any], graph_pass: GraphPass
) -> Any:
    """The joint graph, passes and partitioner of Inductor's compilation, run one aten operator at a time."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor import config

    user_passes = _user_passes(patches)

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        for each in (*user_passes, graph_pass):
            each(joint.graph)
        joint.recompile()
        with _stacks_are_kept:
            forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        for node in backward.graph.nodes:
            if node.meta.get(_UNSEEN):
                node.target = _write_unseen
        backward.recompile()
        return forward, backward

    # Some choose the decompositions, such as fallback_random.
    with config.patch({k: v for k, v in patches.items() if k != "joint_custom_pre_pass"}):
        return _trace_with_aot(gm, example_inputs, partition)


class _StacksAreKept:
    """Inside, the partitioner keeps a stack rather than all of its rows, which are of the same size.

    It rounds sizes down, so that many rows seem a few bytes smaller. Without the function that is replaced
    here it would keep these, which is right too, and takes longer. Several threads may compile.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._size_of: Any = None

    def __enter__(self) -> None:
        from torch._functorch import partitioners

        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._size_of = getattr(partitioners, "_size_of", None)
                if self._size_of is not None:
                    partitioners._size_of = functools.partial(_size_of, self._size_of)

    def __exit__(self, *_: object) -> None:
        from torch._functorch import partitioners

        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._size_of is not None:
                partitioners._size_of = self._size_of


def _size_of(original: Callable[[fx.Node], int], node: fx.Node) -> int:
    size = original(node)
    return size - size // 8 if str(node.target) == "hwbp_compile.stack.default" else size


_stacks_are_kept = _StacksAreKept()


def capture_joint_graphs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[fx.GraphModule]:
    """Trace ``gm`` with AOTAutograd; copies of its joint graphs (none where nothing needs a gradient)."""
    from torch._functorch.partitioners import default_partition

    joints: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        joints.append(copy_graph_module(joint))
        joints[-1].meta[_PARTITION] = kwargs
        return default_partition(joint, inputs, **kwargs)

    _trace_with_aot(gm, example_inputs, partition)
    return joints


_PARTITION = "hwbp_compile_partition"


def saved_for_backward(joint: fx.GraphModule) -> list[tuple[str, Any]]:
    """What Inductor's partitioner keeps between the halves of a captured joint graph: names and values."""
    if _PARTITION not in joint.meta:
        return []
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    kwargs = joint.meta[_PARTITION]
    with _stacks_are_kept:
        forward, _ = min_cut_rematerialization_partition(copy_graph_module(joint), [], **kwargs)
    outputs: Any = forward.graph.output_node().args[0]
    kept = outputs[kwargs["num_fwd_outputs"] :]
    return [(n.name, n.meta.get("val")) for n in kept if isinstance(n, fx.Node)]


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph of Dynamo's, and of the graphs in it, that can be compiled in its place."""
    copy = copy_graph_module(gm)
    for name, inner in gm.named_children():
        if isinstance(inner, fx.GraphModule):
            setattr(copy, name, copy_dynamo_graph(inner))
    for name, value in gm.__dict__.items():
        copy.__dict__.setdefault(name, value)
    for old, new in zip(gm.graph.nodes, copy.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copy


def add_input(
    gm: fx.GraphModule, name: str, value: torch.Tensor, like: Sequence[Any], one_address: bool = False
) -> torch.Tensor:
    """Add a last input to a copy of a graph of Dynamo's: one that no variable of the user's is the source of.

    Args:
        gm: changed in place.
        name: the input's.
        value: a tensor of its shape, which is fixed.
        like: the fake tensors that the graph is compiled with.
        one_address: whether it always is at the same place in memory, so that CUDA graphs need no copy of it.

    Returns:
        The fake tensor for it.
    """
    mode = _fake_mode([x for x in like if isinstance(x, torch.Tensor)])
    fake: torch.Tensor = value if mode is None else mode.from_tensor(value, static_shapes=True)
    graph = gm.graph
    inputs = graph.find_nodes(op="placeholder")
    first = next(iter(graph.nodes))
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(first):
        node = graph.placeholder(name)
    # As Dynamo's own: where one input has "val", Inductor takes those without for no tensors (cpp_wrapper).
    node.meta["example_value"] = fake
    node._dynamo_source = None
    if one_address:  # as after torch._dynamo.mark_static_address
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    gm.recompile()
    return fake


def fake_inputs(gm: fx.GraphModule, given: Sequence[Any]) -> list[Any]:
    """What Dynamo traced a graph with, as fake tensors and symbolic sizes.

    ``given`` are the example inputs that it hands over, which are real tensors; they stand in for what has no
    value.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    return [node.meta.get("example_value", x) for node, x in zip(nodes, given, strict=True)]


def real_inputs(gm: fx.GraphModule) -> list[Any]:
    """What Dynamo traced a graph with, as far as it tells; None for the rest."""
    arguments = [node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder")]
    return [getattr(argument, "example", None) for argument in arguments]


def frame_being_compiled() -> Any:
    """What tells the code that Dynamo compiles from other code, but not from itself for other sizes."""
    identity = torch._guards.CompileContext.current_compile_id()
    return None if identity is None else identity.frame_id


class Saving(NamedTuple):
    """Who takes care of the tensors that are saved for a backward pass here."""

    is_hooked: bool = False
    """Whether anybody does besides autograd: what is saved may be copied, or left out."""
    checkpoint: Any = None
    """What stands for the checkpoint that leaves them out, or that computes them again; None without one."""
    again: Any = None
    """What stands for the computation of the same once more; None if it is the first one."""
    inside_again: bool = False
    """Whether a checkpoint around all that computes again what is run here: it is no step of its own."""


def saving() -> Saving:
    """See :class:`Saving`; of a checkpoint with ``use_reentrant=True`` nothing is to be seen."""
    autograd = torch._C._autograd
    hooks = autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return Saving()
    pack = hooks[0]
    name = getattr(pack, "__qualname__", "")
    if name.startswith("_recomputation_hook."):
        frame = _closed_over(pack, "target_frame_ref")
        return Saving(True, frame and frame(), pack)
    found = Saving(True, _closed_over(pack, "frame") if name.startswith("_checkpoint_hook.") else None)
    if isinstance(pack, fx.GraphModule):  # of a graph that Dynamo compiles, which allows no others
        return found
    # Those around it can be seen only while it is not there.
    autograd._pop_saved_tensors_default_hooks()
    try:
        around = saving()
    finally:
        autograd._push_saved_tensors_default_hooks(*hooks)
    return found._replace(inside_again=around.again is not None or around.inside_again)


def _closed_over(function: Any, name: str) -> Any:
    """A variable of the function around ``function``; None if there is none."""
    function = inspect.unwrap(function)
    names = function.__code__.co_freevars
    return function.__closure__[names.index(name)].cell_contents if name in names else None


def known_of_sizes(example_inputs: Sequence[Any]) -> Any:
    """All that has been found or assumed about the symbolic sizes of fake inputs so far; to be compared."""
    mode = _fake_mode([x for x in example_inputs if isinstance(x, torch.Tensor)])
    if mode is None or mode.shape_env is None:
        return None
    env = mode.shape_env
    facts = ("replacements", "var_to_range", "divisible")
    return len(env.guards), *(str(getattr(env, name, None)) for name in facts)


def compile_later(
    compile: Callable[[], T], example_inputs: Sequence[Any], known_before: Any
) -> tuple[T, bool]:
    """Compile for fake inputs after Dynamo, which had made them, is done.

    Returns:
        The result, and whether it holds for all inputs that Dynamo would pass on: no more is taken for
        granted of a symbolic size than ``known_before``, when Dynamo was done. What one late compilation has
        found stays known to all later ones.
    """
    from torch._guards import TracingContext, tracing

    mode = _fake_mode([x for x in example_inputs if isinstance(x, torch.Tensor)])
    if mode is None:
        return compile(), True
    with tracing(TracingContext(mode)), without_hooks_on_saved_tensors():
        result = compile()
    return result, known_of_sizes(example_inputs) == known_before


_UNSEEN = "highway_unseen"


def _write_unseen(memory: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As generated code writes: autograd, which has saved ``memory``, does not take it for changed."""
    memory.data.copy_(value)
    return memory


# Compiled autograd traces it, and would drop what nobody reads.
fx.node.has_side_effect(_write_unseen)


def write_in_backward(graph: fx.Graph, memory: fx.Node, value: fx.Node) -> None:
    """Have the backward half of a joint graph write ``value`` to an input, at the point of insertion."""
    node = graph.call_function(torch.ops.aten.copy_.default, (memory, value))
    node.meta.update({"val": memory.meta["val"], "partitioner_tag": "must_be_in_backward", _UNSEEN: True})


def writes_in_backward(graph: fx.Graph) -> bool:
    """Whether a joint graph has what :func:`write_in_backward` adds."""
    return any(node.meta.get(_UNSEEN) for node in graph.nodes)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be changed; the nodes' values (fake tensors) are shared."""
    copy = fx.GraphModule(gm, copy_graph(gm.graph))
    copy.meta = dict(gm.meta)
    return copy


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with all of its nodes' metadata."""
    copy = fx.Graph()
    _fill(copy, graph)
    return copy


def restore_graph(graph: fx.Graph, backup: fx.Graph) -> None:
    """Make ``graph`` what ``backup`` is, in place."""
    nodes = list(graph.nodes)
    for node in nodes:
        node.args, node.kwargs = (), {}
    for node in nodes:
        graph.erase_node(node)
    _fill(graph, backup)


def _fill(graph: fx.Graph, source: fx.Graph) -> None:
    returned = graph.graph_copy(source, {}, return_output_node=True)
    assert isinstance(returned, tuple)
    value, original = returned
    graph.output(value).meta.update(original.meta)


def _trace_with_aot(gm: fx.GraphModule, example_inputs: Sequence[Any], partition: Callable[..., Any]) -> Any:
    """Trace as Inductor does, split the joint graph with ``partition``, and run both halves as they are."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config

    # The cache of AOTAutograd knows nothing of what partitions the graph.
    off = {
        name: False for name in ("force_autograd_cache", "bundled_autograd_cache") if hasattr(config, name)
    }
    compiler = aot_autograd(
        fw_compiler=_run_as_it_is,
        bw_compiler=_run_as_it_is,
        decompositions=dict(decompositions()),
        partition_fn=partition,
    )
    with config.patch(off):
        return compiler(gm, example_inputs)


def _run_as_it_is(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    from torch._dynamo.backends.debugging import boxed_nop

    return boxed_nop(gm, list(example_inputs))  # which frees what it is given once that has been read


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
    from torch._inductor.utils import get_donated_idxs

    class Composed(CustomGraphPass):
        """The user's passes, then ours; 2.11 takes no list."""

        def __call__(self, graph: fx.Graph) -> None:
            for each in (*user_passes, graph_pass):
                each(graph)

        def uuid(self) -> Any:
            ids = [each.uuid() if hasattr(each, "uuid") else None for each in user_passes]
            # Without an identity for every pass nothing may be cached. Inductor's cache does not care which
            # saved tensors a backward pass may overwrite: with retain_graph=True, it gave code that does.
            return None if None in ids else (*ids, graph_pass.uuid(), str(get_donated_idxs()))

    return Composed()


def let_recurrent_modules_in(
    mark: str, replacements: Mapping[str, Callable[..., Any]], saw_packed: Callable[[], None]
) -> None:
    """Have Dynamo trace recurrent modules where the backend has the attribute ``mark``, and only there.

    It refuses them because the library functions they call would be unrolled over time. There, the functions
    are replaced, by name; where a sequence is packed, the graph breaks and the function runs as it is.
    ``saw_packed`` is called when Dynamo comes across a packed sequence there.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import unimplemented
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.builder import VariableBuilder
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    original = VariableBuilder._wrap
    if hasattr(original, mark):
        return
    refused: WeakSet[Any] = WeakSet()
    handlers = TorchInGraphFunctionVariable._get_handlers()

    def marked(tx: Any) -> bool:
        return _has_mark(tx.output.compiler_fn, mark)

    def break_at_packed(self: Any, tx: Any, *args: Any, **kwargs: Any) -> None:
        if marked(tx):
            unimplemented(
                gb_type="Packed sequence in a recurrent module",
                context=str(self.value),
                explanation="A packed sequence runs as it is, with its exact gradient.",
                hints=["Pad the sequences, and mask the loss, to have the highway backend take part."],
            )

    def inside_transform() -> bool:
        # torch.func.grad and the like look into what is called, and a custom operator has nothing to see.
        return torch._C._functorch.peek_interpreter_stack() is not None

    def handler(replacement: Callable[..., Any]) -> Callable[..., Any]:
        def handle(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
            if not marked(tx):
                return None
            if inside_transform():
                unimplemented(
                    gb_type="Recurrent module inside of a torch.func transform",
                    context=str(self.value),
                    explanation="It runs as it is, with its exact gradient.",
                    hints=["Call backward() or torch.autograd.grad instead of torch.func.grad."],
                )
            if len(args) < 4 or not args[3].is_python_constant():
                break_at_packed(self, tx)
            return VariableTracker.build(tx, replacement).call_function(tx, list(args), kwargs)

        return handle

    vf: Any = torch._VF
    handlers.update({getattr(vf, name): handler(replacement) for name, replacement in replacements.items()})
    # Dynamo fails on these in 2.11. Without us it never gets there: the refused module ends its frame.
    handlers.update(dict.fromkeys((vf._pack_padded_sequence, vf._pad_packed_sequence), break_at_packed))

    def wrap(self: Any, value: Any) -> Any:
        if (
            isinstance(value, torch.nn.RNNBase)
            and not config.allow_rnn
            and marked(self.tx)
            and not inside_transform()
        ):
            with config.patch(allow_rnn=True):
                return original(self, value)
        if isinstance(value, torch.nn.RNNBase) and not config.allow_rnn and not marked(self.tx):
            refused.add(self.tx.output.root_tx.f_code)
        if isinstance(value, torch.nn.utils.rnn.PackedSequence) and marked(self.tx):
            saw_packed()
        return original(self, value)

    setattr(wrap, mark, True)
    VariableBuilder._wrap = wrap  # type: ignore[method-assign]
    _try_frames_again(mark, refused)


def _has_mark(backend: Any, mark: str) -> bool:
    """Whether a backend, or what it wraps, has the attribute."""
    while backend is not None and not hasattr(backend, mark):
        inner = getattr(backend, "compiler_fn", None) or getattr(backend, "_torchdynamo_orig_backend", None)
        backend = None if inner is backend else inner
    return backend is not None


def _try_frames_again(mark: str, refused: WeakSet[Any]) -> None:
    """Have Dynamo look again at functions which it gave up for another backend.

    It never looks again, for any backend, at code in which it found nothing to compile, such as a model that
    begins with a recurrent module it refuses. Such code, ``refused``, is to be skipped only where the backend
    has no mark.
    """
    from torch._C._dynamo.eval_frame import set_code_exec_strategy
    from torch._dynamo import convert_frame
    from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy

    original = convert_frame.ConvertFrame.__call__
    skipped: WeakSet[Any] = WeakSet()

    def call(self: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        code = frame.f_code
        if call.__code__ not in convert_frame.input_codes:  # the first time, or after torch._dynamo.reset()
            convert_frame.input_codes.add(call.__code__)
            refused.clear()
            skipped.clear()
        ours = _has_mark(self._torchdynamo_orig_backend, mark)
        if code in skipped and not ours:
            return ConvertFrameReturn(apply_to_code=False)
        found = original(self, frame, *args, **kwargs)
        if code in refused and not ours and found.guarded_code is None and found.apply_to_code:
            skipped.add(code)
            found.apply_to_code = False
        return found

    convert_frame.ConvertFrame.__call__ = call  # type: ignore[method-assign]
    for code in convert_frame.input_codes.seen:
        known = code() if isinstance(code, weakref.ref) else code
        if known is not None:
            set_code_exec_strategy(known, FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT))


SCANS_NEED_TRAINED_STATES = torch.torch_version.TorchVersion(torch.__version__) < "2.13"
"""Whether gradients of a scan's weights are wrong where the state that it starts from needs none."""


def let_scans_compile() -> None:
    """Inductor turns a scan into a loop over an index that it reads, which torch refuses by default."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        context.fake_mode.allow_scalar_outputs = True


def load_cpp_kernel(argument_types: Sequence[str], source: str) -> Callable[..., None]:
    """Compile a C++ function ``kernel`` as Inductor compiles its own, into the same cache.

    Pointers are passed as tensors. Whatever goes wrong with the compiler is raised.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    loaded: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(list(argument_types), source)
    return loaded


def exact_products() -> bool:
    """Whether products of float32 on a CUDA device are not to be rounded to narrower types."""
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision not in ("tf32", "bf16")


def load_generated(source: str) -> Any:
    """Import generated Python, from a file in Inductor's cache: Triton reads a kernel's source."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.load(source)


def cache_folder() -> Path | None:
    """Where torch's compiler keeps its caches; None where it is to keep none."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if config.force_disable_caches else Path(cache_dir())


def file_lock(path: Path, timeout: float) -> Any:
    """A lock between processes, not held yet. To acquire it raises TimeoutError after so many seconds."""
    from torch.utils._filelock import FileLock

    return FileLock(str(path), timeout=timeout)


def precision_of_products() -> str:
    """What float32 matrices are multiplied in, as far as the user chose."""
    backends: Any = torch.backends
    return f"{backends.cuda.matmul.fp32_precision}, {backends.mkldnn.matmul.fp32_precision}"


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

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)


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
    from torch._dynamo.eval_frame import OptimizedModule

    original, wrapper = model, model
    if isinstance(model, OptimizedModule):
        original = model._orig_mod
    elif isinstance(model, torch.nn.Module):
        wrapper = getattr(model, "_compiled_call_impl", None)
    else:
        original = getattr(model, "_torchdynamo_orig_callable", None)
    context = _dynamo_context(wrapper)
    if context is None or not callable(context.callback):
        return Compiled(model)
    backend: Any = context.callback
    while not hasattr(backend, "compiler_name") and hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    name = getattr(backend, "compiler_name", None) or getattr(backend, "__name__", "unknown")
    kwargs: dict[str, Any] = getattr(backend, "kwargs", {})
    dynamic = getattr(context, "_dynamic", None)
    return Compiled(original, name, kwargs.get("options"), kwargs.get("mode"), dynamic)


def _dynamo_context(wrapper: Any) -> Any:
    """The context that made a compiled module or function, which keeps it only in its closure."""
    from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext

    if isinstance(wrapper, OptimizedModule):
        return wrapper.dynamo_ctx
    if not hasattr(wrapper, "_torchdynamo_orig_callable"):
        return None
    contents = [cell.cell_contents for cell in getattr(wrapper, "__closure__", None) or ()]
    return next((c for c in contents if isinstance(c, _TorchDynamoContext)), None)


@contextmanager
def calls_redirected(
    module: torch.nn.Module, call: Callable[[Callable[..., Any], Any, dict[str, Any]], Any]
) -> Iterator[None]:
    """Calls of ``module`` are ``call(plain, args, kwargs)``; ``plain`` is what they would be uncompiled."""
    name = "_compiled_call_impl"  # where module.compile() puts its own
    before = module.__dict__.get(name)
    module.__dict__[name] = lambda *args, **kwargs: call(module._call_impl, args, kwargs)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextmanager
def compiling_freely() -> Iterator[None]:
    """Compile inside whatever was compiled before, and without an effect on what is compiled afterwards.

    No recompile limit holds, and shapes seen inside do not make later compilations dynamic.
    """
    import torch._dynamo

    unlimited: dict[str, Any] = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30}
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, **unlimited):
        yield


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
    line = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
    return GraphBreak(_first_sentences(found.reason), line)


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
        now = [(kind, message, count) for kind in kinds for message, count in counters[kind].items()]
        messages = [message for kind, message, count in now if count > before[kind].get(message, 0)]
        for message in dict.fromkeys(messages):
            reason, line = _first_sentences(message), ""
            if skipped := re.search(r"frame skipped: \S+ \((.+?) line (\d+)\)", message):
                reason += " (in a loop: the frame is not compiled)"
                line = f"{skipped[1]}:{skipped[2]}"
            found.append(GraphBreak(reason, line))


def _first_sentences(message: str) -> str:
    """Of Dynamo's many lines, the title and the explanation."""
    title = message.strip().splitlines()[0].strip()
    explanation = re.search(r"^\s*Explanation: (.*)$", message, re.MULTILINE)
    return title if explanation is None else f"{title}: {explanation[1].strip()}"
