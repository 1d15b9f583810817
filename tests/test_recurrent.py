"""Recurrent modules of ``torch.nn``: captured, exact at k = T, the reference's gradient at every k."""

from __future__ import annotations

import contextlib
import functools
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from compare import joint_graphs, relative_error
from hypothesis import given
from hypothesis import strategies as st
from marks import some_slow
from reference import Settings, Step, reference_run
from torch import Tensor, nn

from hwbp_compile import explain
from hwbp_compile.recurrent import layer as layers
from hwbp_compile.recurrent import library
from hwbp_compile.recurrent.backward import EXACT
from hwbp_compile.recurrent.cells import STEPS
from hwbp_compile.recurrent.layer import recurrent_layer

TOLERANCE = 1e-10
KINDS = {
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "rnn_tanh": nn.RNN,
    "rnn_relu": functools.partial(nn.RNN, nonlinearity="relu"),
}


def layer(kind: str, inputs: int, hidden: int, **settings: Any) -> nn.RNNBase:
    return KINDS[kind](inputs, hidden, **settings).double()


def data(kind: str, steps: int, batch: int, inputs: int, module: nn.RNNBase) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(steps, batch, inputs, dtype=torch.float64, requires_grad=True)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size]
    carry = [
        torch.randn(batch, size, dtype=torch.float64, requires_grad=True)
        for size in sizes[: 2 if kind == "lstm" else 1]
    ]
    return x, carry


def gate(kind: str, projected: bool) -> Any:
    """K by hand: the update gate of a GRU; an LSTM's forget gate, also on the way from h to c."""

    def diagonals(*values: Tensor) -> list[list[Tensor | None]]:
        if kind.startswith("rnn"):
            return [[None]]
        carry, (x, *weights) = values[: 2 if kind == "lstm" else 1], values[2 if kind == "lstm" else 1 :]
        h = carry[0]
        biases = weights[2:4] if len(weights) > 3 else [None, None]
        from_x = torch.nn.functional.linear(x, weights[0], biases[0])
        from_h = torch.nn.functional.linear(h, weights[1], biases[1])
        if kind == "gru":
            return [[torch.sigmoid(from_x.chunk(3, -1)[1] + from_h.chunk(3, -1)[1])]]
        i, f, g, o = (from_x + from_h).chunk(4, -1)
        f, o = torch.sigmoid(f), torch.sigmoid(o)
        c = f * carry[1] + torch.sigmoid(i) * torch.tanh(g)
        # Row: output, column: input, each (h, c). An output projection mixes, so nothing passes it.
        through_h = None if projected else o * (1 - c.tanh().square()) * f
        return [[None, through_h], [None, f]]

    return diagonals


def gradients_given(
    cotangents: list[Tensor], outputs: Tensor, cell_state: Tensor | None, values: list[Tensor]
) -> list[Tensor]:
    """Of a linear loss of the outputs and, of an LSTM, of the last cell state."""
    loss = (outputs * cotangents[0]).sum()
    if cell_state is not None:
        loss = loss + (cell_state * cotangents[1]).sum()
    return list(torch.autograd.grad(loss, values))


def reference_states(
    kind: str, weights: list[Tensor], x: Tensor, carry: list[Tensor], settings: Settings
) -> list[tuple[Tensor, ...]]:
    """Step by step, by an implementation that shares nothing with the package but the cell's formula."""
    n, projected = len(carry), kind == "lstm" and carry[0].shape != carry[1].shape

    def at(t: int) -> Step:
        def block(*values: Tensor) -> tuple[Tensor, ...]:
            return STEPS[kind](values[:n], (values[n][t],), tuple(values[n + 1 :]))

        def diagonals(*values: Tensor) -> Any:
            return gate(kind, projected)(*values[:n], values[n][t], *values[n + 1 :])

        return Step(block, diagonals, ())

    return reference_run(settings)([at(t) for t in range(x.shape[0])], tuple(carry), (x, *weights))


def reference_gradients(
    kind: str,
    module: nn.RNNBase,
    x: Tensor,
    carry: list[Tensor],
    cotangents: list[Tensor],
    settings: Settings,
) -> list[Tensor]:
    weights = list(module.parameters())
    states = reference_states(kind, weights, x, carry, settings)
    outputs = torch.stack([state[0] for state in states[1:]])
    last = states[-1][1] if kind == "lstm" else None
    return gradients_given(cotangents, outputs, last, [x, *carry, *weights])


def reference_module(module: nn.RNNBase, settings: Settings) -> Any:
    """A recurrent module's function, layer by layer and direction by direction."""
    kind = module.mode.lower()
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
    ends = ["", "_reverse"] if module.bidirectional else [""]

    def run(x: Tensor, carry: Any = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = x.transpose(0, 1) if module.batch_first else x
        sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if kind == "lstm" else 1]
        given = [carry] if isinstance(carry, Tensor) else carry
        last: list[tuple[Tensor, ...]] = []
        for number in range(module.num_layers):
            outputs = []
            for end in ends:
                found = [getattr(module, f"{name}_l{number}{end}", None) for name in names]
                weights = [w for w in found if w is not None]
                initial = [y.new_zeros(y.shape[1], size) for size in sizes]
                if given is not None:
                    initial = [c[len(last)] for c in given]
                source = y.flip(0) if end else y
                states = reference_states(kind, weights, source, initial, settings)
                output = torch.stack([state[0] for state in states[1:]])
                outputs.append(output.flip(0) if end else output)
                last.append(states[-1])
            y = torch.cat(outputs, -1)
        stacked = tuple(torch.stack(component) for component in zip(*last, strict=True))
        return (y.transpose(0, 1) if module.batch_first else y), stacked

    return run


def torch_gradients(
    module: nn.RNNBase, x: Tensor, carry: list[Tensor], cotangents: list[Tensor]
) -> list[Tensor]:
    initial = [c.unsqueeze(0) for c in carry]
    y, last = module(x, initial[0] if len(initial) == 1 else tuple(initial))
    cell_state = last[1][0] if len(carry) == 2 else None
    return gradients_given(cotangents, y, cell_state, [x, *carry, *module.parameters()])


@pytest.fixture(autouse=True)
def _no_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fast on this machine at this moment decides about no test."""
    monkeypatch.setattr(layers, "kernels_are_faster", lambda *_, **__: True)


def layer_gradients(
    kind: str,
    module: nn.RNNBase,
    x: Tensor,
    carry: list[Tensor],
    cotangents: list[Tensor],
    settings: Settings,
) -> list[Tensor]:
    weights = list(module.parameters())
    y, *last = recurrent_layer(
        x, carry, weights, kind, settings.iterations, settings.gamma, settings.group_size, settings.exact_tail
    )
    return gradients_given(cotangents, y, last[1] if kind == "lstm" else None, [x, *carry, *weights])


ONE_LAYER = ["gru", "lstm", "lstm with projection", "rnn_tanh", "rnn_relu"]


def one_layer(name: str, hidden: int, **settings: Any) -> tuple[str, nn.RNNBase]:
    """A layer of three inputs, by a name of :data:`ONE_LAYER`, and its kind."""
    kind = name.split()[0]
    if "projection" in name and hidden > 3:
        settings["proj_size"] = 3
    return kind, layer(kind, 3, hidden, **settings)


def compare_with_reference(kind: str, steps: int, batch: int, bias: bool, settings: Settings) -> None:
    kind, module = one_layer(kind, 5, bias=bias)
    x, carry = data(kind, steps, batch, 3, module)
    cotangents = [torch.randn(steps, *carry[0].shape).double(), torch.randn(carry[-1].shape).double()]
    expected = torch_gradients(module, x, carry, cotangents)
    found = layer_gradients(kind, module, x, carry, cotangents, replace(settings, iterations=steps))
    assert relative_error(found, expected) <= TOLERANCE
    found = layer_gradients(kind, module, x, carry, cotangents, settings)
    expected = reference_gradients(kind, module, x, carry, cotangents, settings)
    assert relative_error(found, expected) <= TOLERANCE


SPLITS = [Settings(k, group_size=g) for k in (0, 1, 2, 3) for g in (1, 3)]


@pytest.mark.parametrize("kind", ONE_LAYER)
@pytest.mark.parametrize("settings", SPLITS, ids=lambda s: f"k={s.iterations}-groups of {s.group_size}")
def test_one_layer_at_every_k(kind: str, settings: Settings) -> None:
    """Ten steps, so that the last of the groups is a short one and no k is exact."""
    compare_with_reference(kind, 10, 2, True, settings)


@pytest.mark.parametrize("kind", ONE_LAYER)
@given(
    steps=st.integers(1, 9),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    iterations=st.integers(0, 3),
    gamma=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    group_size=st.integers(1, 4),
    exact_tail=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_one_layer(
    kind: str,
    steps: int,
    batch: int,
    bias: bool,
    iterations: int,
    gamma: float,
    group_size: int,
    exact_tail: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    compare_with_reference(kind, steps, batch, bias, Settings(iterations, gamma, group_size, exact_tail))


class Model(nn.Module):
    """A recurrent module, and a function of all that it returns."""

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *carry: Tensor) -> Tensor:
        return self.of(self.module, x, carry)

    def of(self, module: Any, x: Tensor, carry: Sequence[Tensor] = ()) -> Tensor:
        y, last = module(x, None if not carry else carry[0] if len(carry) == 1 else carry)
        last = (last,) if isinstance(last, Tensor) else last
        return y.square().sum() + sum((i + 1) * h.sin().sum() for i, h in enumerate(last))


def gradients(model: nn.Module, forward: Any, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(forward(*inputs), [*inputs, *model.parameters()]))


EXACTLY: dict[str, Any] = {"backend": "highway", "options": {"iterations": "exact", "codegen": "eager"}}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "layers, bidirectional, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "num_layers": 2},
    "projection": {"proj_size": 3, "num_layers": 2, "bidirectional": True},
    "projection, no bias": {"proj_size": 3, "bias": False},
    "relu": {"nonlinearity": "relu"},
}


def variants() -> list[Any]:
    only = {"projection": "lstm", "projection, no bias": "lstm", "relu": "rnn_tanh"}
    kinds = [kind for kind in KINDS if kind != "rnn_relu"]  # a variant of rnn_tanh
    every = [(kind, name) for kind in kinds for name in VARIANTS if only.get(name, kind) == kind]
    in_ci = {False: {"plain"}, True: set(VARIANTS) - {"projection", "layers", "bidirectional", "no bias"}}
    return [
        pytest.param(
            *each,
            given,
            marks=()
            if each[1] in in_ci[given] and (each[0] == "gru" or "layers" not in each[1])
            else pytest.mark.slow,
        )
        for each in every
        for given in (False, True)
    ]


@pytest.mark.parametrize(("kind", "variant", "given_carry"), variants())
def test_modules(kind: str, variant: str, given_carry: bool) -> None:
    settings = VARIANTS[variant]
    module = layer(kind, 3, 5, **settings)
    model = Model(module)
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    batch, steps = (6, 4) if settings.get("batch_first") else (4, 6)
    stacked = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    sizes = [module.proj_size or 5, 5][: 2 if kind == "lstm" else 1]
    carry = [torch.randn(stacked, batch, size, dtype=torch.float64, requires_grad=True) for size in sizes]
    inputs = (x, *carry) if given_carry else (x,)
    expected = gradients(model, model, *inputs)
    for iterations in (steps, "exact"):
        options = {"iterations": iterations, "apply": "always", "group_size": 1, "codegen": "eager"}
        compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
        assert relative_error(gradients(model, compiled, *inputs), expected) <= TOLERANCE
    iterations, group_size = int(torch.randint(0, 2, ())), int(torch.randint(1, 3, ()))
    approximate = Settings(iterations, 1.0 if "rnn" in kind else 0.0, group_size)
    options = {"apply": "always", "codegen": "eager", **asdict(approximate)}
    compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
    found = gradients(model, compiled, *inputs)
    reference = functools.partial(model.of, reference_module(module, approximate))
    assert relative_error(found, gradients(model, lambda x, *c: reference(x, c), *inputs)) <= TOLERANCE
    assert relative_error(found, expected) > 1e-6


class Deep(nn.Module):
    """Layers with residual connections between them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer("gru", 5, 5) for _ in range(layers))

    def forward(self, x: Tensor, of: Any = lambda module: module) -> Tensor:
        for module in self.layers:
            x = x + of(module)(x)[0]
        return x.sin().sum() + x[-1].square().sum()


@pytest.mark.parametrize("layers", some_slow([3, 5], {5}))
def test_layers_with_residual_connections(layers: int) -> None:
    model = Deep(layers)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    for settings in (Settings(6), Settings(1), Settings(1, group_size=2)):
        torch._dynamo.reset()
        options = {"apply": "always", "codegen": "eager", **asdict(settings)}
        compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
        reference = functools.partial(model, of=functools.partial(reference_module, settings=settings))
        found = gradients(model, compiled, x)
        assert relative_error(found, gradients(model, reference, x)) <= TOLERANCE
        assert (relative_error(found, gradients(model, model, x)) <= TOLERANCE) == (settings.iterations == 6)


def test_no_residual_path() -> None:
    """A module without one is exact, unless fixed-point iteration is asked for."""
    model = Model(layer("rnn_tanh", 3, 5))
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, model, x)
    for gamma, iterated in ((0.0, False), (0.3, False), (1.0, True)):
        options = {"iterations": 1, "gamma": gamma, "apply": "always", "group_size": 1, "codegen": "eager"}
        compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
        error = relative_error(gradients(model, compiled, x), expected)
        assert error > 1e-3 if iterated else error <= TOLERANCE
        (chain,) = explain(model, x, options=options).chains
        assert chain.applied == iterated
        assert iterated or "gamma=1.0" in chain.reason


@pytest.mark.parametrize("kind", some_slow(["gru", "lstm"], {"lstm"}))
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("iterations", ["exact", 6])
def test_automatic_mixed_precision(kind: str, before: bool, iterations: int | str) -> None:
    """Also where a linear layer before it hands over half precision and the weights are in single."""
    module, linear = KINDS[kind](3, 5, num_layers=2), nn.Linear(3, 3)
    x = torch.randn(6, 4, 3, requires_grad=True)
    weights = [x, *module.parameters(), *(linear.parameters() if before else ())]

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = module(linear(x) if before else x)
        return y

    def loss(y: Tensor) -> Tensor:
        return y.float().square().sum()

    dtype = torch.bfloat16
    # On some processors oneDNN's LSTM takes no half precision.
    with contextlib.suppress(RuntimeError) if kind == "lstm" else contextlib.nullcontext():
        dtype = run(x).dtype
    options = {"iterations": iterations, "apply": "always", "group_size": 1, "codegen": "eager"}
    found = torch.compile(run, backend="highway", options=options, fullgraph=True)(x)
    assert found.dtype == dtype
    module_in_single, _ = module(linear(x) if before else x)
    expected = torch.autograd.grad(loss(module_in_single), weights)
    torch.testing.assert_close(found.float(), module_in_single, rtol=0.05, atol=0.02)
    gradients_found = torch.autograd.grad(loss(found), weights)
    assert all(g.dtype == torch.float32 for g in gradients_found)
    error = relative_error(list(gradients_found), list(expected))
    assert error <= 0.1
    with contextlib.suppress(RuntimeError) if kind == "lstm" else contextlib.nullcontext():
        eager = torch.autograd.grad(loss(run(x)), weights)
        assert error <= 2 * relative_error(list(eager), list(expected)), "no less precise than torch's own"


@pytest.mark.parametrize("settings", [{"group_size": 8}, {"exact_tail": 6}, {"group_size": 5, "gamma": 0.2}])
def test_sweeps_in_time_are_no_chains_over_depth(settings: dict[str, Any]) -> None:
    """They are made of the same sums and products; were they rewritten too, the gradient would be another."""
    model = Model(layer("gru", 3, 5))
    x = torch.randn(40, 2, 3, dtype=torch.float64, requires_grad=True)
    options = {
        "iterations": 1,
        "apply": "always",
        "group_size": 1,
        "codegen": "eager",
        "min_blocks": 2,
        **settings,
    }
    compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
    found = gradients(model, compiled, x)
    weights = list(model.parameters())
    h = torch.zeros(2, 5, dtype=torch.float64)
    values = {"gamma": 0.0, "group_size": 1, "exact_tail": 0} | settings
    y, *_ = recurrent_layer(x, [h], weights, "gru", 1, **values)
    expected = torch.autograd.grad(y.square().sum() + y[-1].sin().sum(), [x, *weights])
    assert relative_error(found, list(expected)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["gru", "lstm", "lstm with projection", "rnn_tanh"])
@pytest.mark.parametrize("threads", [1, 3])
@given(
    steps=st.integers(1, 6),
    batch=st.integers(1, 11),
    hidden=st.sampled_from([1, 16, 35]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_exact(kind: str, threads: int, steps: int, batch: int, hidden: int, bias: bool, seed: int) -> None:
    """Forward and backward by kernels, of sizes that fill vectors, tiles and threads or do not."""
    torch.manual_seed(seed)
    kind, module = one_layer(kind, hidden, bias=bias)
    x, carry = data(kind, steps, batch, 3, module)
    cotangents = [torch.randn(steps, *carry[0].shape).double(), torch.randn(carry[-1].shape).double()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = layer_gradients(kind, module, x, carry, cotangents, Settings(EXACT))
        initial = [c.unsqueeze(0) for c in carry]
        expected_y, _ = module(x, initial[0] if len(initial) == 1 else tuple(initial))
        y, *_ = recurrent_layer(x, carry, list(module.parameters()), kind, EXACT)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, expected_y, rtol=TOLERANCE, atol=TOLERANCE)
    assert relative_error(found, torch_gradients(module, x, carry, cotangents)) <= TOLERANCE


@pytest.mark.parametrize("kind", some_slow(["gru", "lstm", "rnn_relu"], {"gru", "rnn_relu"}))
@pytest.mark.parametrize("copied", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_library_trains(kind: str, copied: bool, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward runs once for a forward and a backward pass, unless hooks copy what is saved."""
    runs: list[int] = []

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        return run(*arguments)

    run = library._run
    monkeypatch.setattr(library, "_run", counted)
    monkeypatch.setattr(layers, "kernels_are_faster", lambda *_, **__: False)
    model = Model(layer(kind, 3, 5, num_layers=2))
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, h, torch.randn_like(h).requires_grad_()) if kind == "lstm" else (x, h)
    expected = gradients(model, model, *inputs)
    options = {"iterations": "exact"}
    compiled = torch.compile(model, backend="highway", options=options, fullgraph=True, dynamic=dynamic)
    gradients(model, compiled, *inputs)
    runs.clear()

    def copy(t: Tensor) -> Tensor:
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(copy, copy) if copied else contextlib.nullcontext():
        found = gradients(model, compiled, *inputs)
    assert relative_error(found, expected) <= TOLERANCE
    assert len(runs) == (4 if copied else 2)
    runs.clear()
    with torch.no_grad():
        compiled(*inputs)
    assert not runs, "nothing is kept for a backward pass that cannot come"


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn_tanh"])
@pytest.mark.parametrize("iterations", [EXACT, 2, 4])
def test_where_there_are_no_kernels(kind: str, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library runs forward; parallel in time, the gradient is what it is with kernels."""
    module = layer(kind, 3, 5)
    x, carry = data(kind, 4, 2, 3, module)
    cotangents = [torch.randn(4, 2, 5).double(), torch.randn(2, 5).double()]
    settings = Settings(iterations)
    expected = layer_gradients(kind, module, x, carry, cotangents, settings)
    monkeypatch.setattr(layers, "why_no_kernels", lambda *_: "no compiler")
    found = layer_gradients(kind, module, x, carry, cotangents, settings)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", some_slow(["gru", "lstm"], {"lstm"}))
def test_unbatched_input(kind: str) -> None:
    model = Model(layer(kind, 3, 5, bidirectional=True))
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    for settings in (Settings(7), Settings(1, group_size=2)):
        options = {"apply": "always", "codegen": "eager", **asdict(settings)}
        compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
        run = reference_module(model.module, settings)

        def reference(x: Tensor, run: Any = run) -> Tensor:
            return model.of(run, x.unsqueeze(1))

        assert relative_error(gradients(model, compiled, x), gradients(model, reference, x)) <= TOLERANCE
    exact = torch.compile(model, **EXACTLY)
    assert relative_error(gradients(model, exact, x), gradients(model, model, x)) <= TOLERANCE


def test_dropout_between_layers() -> None:
    """The random numbers are other ones than the library's: those of a dropout between two layers."""
    module = nn.GRU(3, 5, num_layers=2, dropout=0.5)
    compiled = torch.compile(Model(module), backend="highway", options={"codegen": "eager"}, fullgraph=True)
    x = torch.randn(6, 4, 3)
    values = {compiled(x).item() for _ in range(4)}
    assert len(values) == 4

    layers = [nn.GRU(3, 5), nn.GRU(5, 5)]
    for i, each in enumerate(layers):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(each, f"{name}_l0", getattr(module, f"{name}_l{i}"))

    def composed(x: Tensor) -> Tensor:
        """Two layers, one of which reads what is dropped of the other."""
        y, first = layers[0](x)
        y, second = layers[1](2 * y * (torch.rand_like(y) > 0.5))
        return Model(module).of(lambda *_: (y, torch.cat([first, second])), x)

    both = []
    for forward in (compiled, composed):
        torch.manual_seed(3)
        both.append(list(torch.autograd.grad(forward(x), list(module.parameters()))))
    assert relative_error(*both) <= 1e-5
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), Model(module)(x))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_packed_sequences_are_exact(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = layer(kind, 3, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, _ = self.module(packed)
            return nn.utils.rnn.pad_packed_sequence(y)[0].square().sum()

    model = Packed()
    x, lengths = torch.randn(6, 3, 3, dtype=torch.float64), torch.tensor([6, 2, 4])
    expected = torch.autograd.grad(model(x, lengths), list(model.parameters()))
    compiled = torch.compile(
        model,
        backend="highway",
        options={"iterations": 0, "apply": "always", "group_size": 1, "codegen": "eager"},
    )
    with caplog.at_level(logging.INFO, "hwbp_compile"):
        found = torch.autograd.grad(compiled(x, lengths), list(model.parameters()))
    assert relative_error(list(found), list(expected)) <= TOLERANCE
    assert "what is given a packed sequence runs as it is" in caplog.text


def test_inside_a_transform_of_torch_func() -> None:
    module = layer("gru", 3, 5)
    x = torch.randn(6, 4, 3, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: module(y)[0].square().sum())(x)

    compiled = torch.compile(
        gradient,
        backend="highway",
        options={"iterations": 0, "apply": "always", "group_size": 1, "codegen": "eager"},
    )
    torch.testing.assert_close(compiled(x), gradient(x))


BEFORE = """
import copy, torch
from torch import nn
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4)
    def forward(self, x):
        return self.gru(x)[0].square().sum()
m, x = M(), torch.randn(6, 2, 3)
other = torch.compile(copy.deepcopy(m), backend="aot_eager")
other(x)
options = {"iterations": 0, "apply": "always", "group_size": 1, "codegen": "eager"}
ours = torch.compile(m, backend="highway", options=options)
for _ in range(2):
    for f in (ours, other):
        f.zero_grad()
        f(x).backward()
    pairs = zip(ours.parameters(), other.parameters())
    print(max(float((a.grad - b.grad).abs().max()) for a, b in pairs) > 1e-3)
torch.compile(m, backend="highway", options=options, fullgraph=True)(x)
"""


def test_another_backend_that_came_first() -> None:
    """What Dynamo gave up for another backend, before there was ours, is compiled, and stays so."""
    done = subprocess.run([sys.executable, "-c", BEFORE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_dynamo_is_reset_with_all_that_it_gave_up() -> None:
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    for inner, expected in ((nn.GRU(3, 4), 0), (nn.Linear(3, 4), 1), (nn.GRU(3, 4), 1)):
        torch._dynamo.reset()
        torch.compile(Wrapped(inner), backend=backend)(torch.randn(3, 2, 3))
        assert len(graphs) == expected


@pytest.mark.parametrize(
    ("kind", "codegen", "iterations"),
    [
        ("gru", "eager", "exact"),
        ("lstm", "eager", 5),
        pytest.param("gru", "inductor", 5, marks=pytest.mark.slow),
        pytest.param("lstm", "inductor", "exact", marks=pytest.mark.slow),
    ],
)
def test_results_that_are_written_to(kind: str, codegen: str, iterations: int | str) -> None:
    """Nothing that the backward pass reads is in the user's hands."""
    module = layer(kind, 3, 5)
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def found(function: Any, in_place: bool) -> list[Tensor]:
        y, last = function(x)
        h = last if kind == "gru" else last[0]
        # Not the last state where one is a view of several, which autograd refuses.
        y = y.mul_(2) if in_place else y * 2
        return list(torch.autograd.grad(y.sin().sum() + h.sum(), list(module.parameters())))

    options = {"iterations": iterations, "apply": "always", "group_size": 1, "codegen": codegen}
    compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
    assert relative_error(found(compiled, True), found(module, False)) <= TOLERANCE


def test_other_backends_are_as_before() -> None:
    model = Model(layer("gru", 3, 5))
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    options = {"iterations": 2, "apply": "always", "group_size": 1, "codegen": "eager"}
    torch.compile(model, backend="highway", options=options, fullgraph=True)(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert not torch._dynamo.config.allow_rnn


@pytest.mark.parametrize("group_size", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("kind", some_slow(["gru", "lstm"], {"lstm"}))
def test_lengths_and_batches_that_change(kind: str, group_size: int) -> None:
    """One program for all lengths; of groups, whether the last is a short one does not matter."""
    model = Model(layer(kind, 3, 5))
    sizes = [(7, 4), (12, 4), (10, 4), (14, 4), (12, 7), (13, 2)]

    def graphs(dynamic: bool | None) -> list[int]:
        torch._dynamo.reset()
        options = {"iterations": 2, "apply": "always", "group_size": group_size, "codegen": "eager"}
        compiled = torch.compile(model, backend="highway", options=options, fullgraph=True, dynamic=dynamic)
        found = []
        for steps, batch in sizes:
            x = torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=True)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            approximate = gradients(model, compiled, x)
            found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
            reference = functools.partial(
                model.of, reference_module(model.module, Settings(2, group_size=group_size))
            )
            assert relative_error(approximate, gradients(model, reference, x)) <= TOLERANCE
        return found

    assert graphs(True) == [1, 0, 0, 0, 0, 0]
    assert graphs(None) == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("kind", some_slow(["gru", "lstm"], {"lstm"}))
@pytest.mark.parametrize("iterations", ["exact", 2])
def test_programs_do_not_grow_with_the_length(kind: str, iterations: int | str) -> None:
    """So neither does what it takes to compile them."""
    module = layer(kind, 3, 5)
    options = {"iterations": iterations, "apply": "always", "codegen": "eager"}
    nodes = []
    for steps in (64, 1504):
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="highway", options=options, fullgraph=True, dynamic=False)
        with joint_graphs() as graphs:
            compiled(torch.randn(steps, 2, 3, dtype=torch.float64))
        nodes.append([len(graph.nodes) for graph in graphs])
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("kind", ONE_LAYER)
@pytest.mark.parametrize("group_size", [1, 3])
def test_single_precision(kind: str, group_size: int) -> None:
    kind, module = one_layer(kind, 8)
    module.float()
    x, carry = data(kind, 20, 4, 3, module)
    x, *carry = (t.detach().float().requires_grad_() for t in (x, *carry))
    cotangents = [torch.randn(20, *carry[0].shape), torch.randn(carry[-1].shape)]
    expected = torch_gradients(module, x, carry, cotangents)
    for settings in (Settings(20, group_size=group_size), Settings(EXACT)):
        found = layer_gradients(kind, module, x, carry, cotangents, settings)
        assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("iterations", ["exact", 2])
def test_gradients_of_wide_weights_lie_as_these_do(kind: str, iterations: int | str) -> None:
    """Otherwise autograd copies them; narrow ones are summed on the way, or cheap to copy."""
    module = layer(kind, 40, 160)
    options = {"iterations": iterations, "apply": "always", "codegen": "eager"}
    compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
    y = compiled(torch.randn(4, 3, 40, dtype=torch.float64))[0]
    gradients = torch.autograd.grad(y.sum(), list(module.parameters()))
    assert all(g.is_contiguous() for g in gradients)


@pytest.mark.parametrize("operator", ["recurrent_layer", "library_layer", "library_training"])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_operator_checks(operator: str, kind: str) -> None:
    module = KINDS[kind](3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    carry = [torch.randn(2, 4, requires_grad=True) for _ in range(2 if kind == "lstm" else 1)]
    arguments: tuple[Any, ...] = (x, carry, list(module.parameters()), kind)
    if operator != "library_training":
        arguments += (5, 0.0, 1, 0, 0)
    torch.library.opcheck(getattr(torch.ops.hwbp_compile, operator).default, arguments)


@pytest.mark.parametrize("kind", some_slow(["gru", "lstm"], {"lstm"}))
def test_modules_without_memory(kind: str) -> None:
    """On the device "meta", which knows no autocast."""
    module = KINDS[kind](3, 5).to("meta")
    compiled = torch.compile(module, backend="highway", options={"codegen": "eager"})
    y = compiled(torch.randn(4, 2, 3, device="meta"))[0]
    y.sum().backward()
    assert y.shape == (4, 2, 5)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_inductor_in_single_precision(kind: str) -> None:
    module = KINDS[kind](3, 8)
    model = Model(module)
    x = torch.randn(20, 4, 3, requires_grad=True)
    expected = gradients(model, model, x)
    compiled = torch.compile(
        model,
        backend="highway",
        options={"iterations": 20, "apply": "always", "group_size": 1},
        fullgraph=True,
    )
    assert relative_error(gradients(model, compiled, x), expected) <= 1e-4
