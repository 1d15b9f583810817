"""Cells of torch's ``scan``: exact by kernels and at k = T, the reference's gradient at every k."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import relative_error
from hypothesis import given
from hypothesis import strategies as st
from marks import some_slow
from reference import Settings, Step, reference_run
from scan_cells import CELLS, Cell, State
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from hwbp_compile import _compat, explain
from hwbp_compile.recurrent import recurrence

TOLERANCE = 1e-10


def loop(step: Any, init: Any, xs: Any) -> Any:
    """What a scan means."""
    outputs = []
    for t in range(xs.shape[0]):
        init, y = step(init, xs[t])
        outputs.append(y)
    return init, torch.stack(outputs)


class Model(nn.Module):
    """A cell over time, with a loss that reads every step, through a projection, and the last states."""

    def __init__(self, cell: Cell, every_step: bool = True) -> None:
        super().__init__()
        self.cell, self.every_step = cell, every_step
        weights = [0.4 * torch.randn(shape, dtype=torch.float64) for shape in cell.weights]
        self.weights = nn.ParameterList(weights)
        self.readout = nn.Parameter(torch.randn(2, cell.hidden, dtype=torch.float64))

    def forward(self, x: Tensor, *carry: Tensor, over_time: Any = scan) -> Tensor:
        weights = list(self.weights)

        def step(state: State, x: Tensor) -> tuple[State, Tensor]:
            state = self.cell.function(lambda y: y, state, x, *weights)
            return state, state[0] @ self.readout.t()

        last, y = over_time(step, tuple(carry), x)
        return self.loss(y, last)

    def loss(self, y: Tensor, last: Sequence[Tensor]) -> Tensor:
        loss = sum((i + 1) * x.sin().sum() for i, x in enumerate(last))
        return loss + y.square().sum() if self.every_step else loss


def data(cell: Cell, steps: int, batch: int) -> list[Tensor]:
    x = torch.randn(steps, batch, 3, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, *cell.carry(batch))]


def gradients(model: nn.Module, forward: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    values = [*inputs, *model.parameters()]
    found = torch.autograd.grad(forward(*inputs), values, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]


def reference(model: Model, inputs: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """Step by step, K from the cell's formula with all mixing held constant."""
    cell = model.cell
    n = cell.components
    (x, *carry), weights = inputs, list(model.weights)

    def at(t: int) -> Step:
        def block(*values: Tensor) -> State:
            return cell.function(lambda y: y, values[:n], values[n][t], *values[n + 1 :])

        def diagonals(*values: Tensor) -> list[list[Tensor | None]]:
            with torch.enable_grad():
                state = [v.detach().requires_grad_() for v in values[:n]]
                after = cell.function(torch.Tensor.detach, tuple(state), values[n][t], *values[n + 1 :])
                return [
                    list(torch.autograd.grad(a.sum(), state, retain_graph=True, allow_unused=True))
                    if a.requires_grad
                    else [None] * n
                    for a in after
                ]

        return Step(block, diagonals, ())

    states = reference_run(settings)([at(t) for t in range(x.shape[0])], tuple(carry), (x, *weights))
    y = torch.stack([state[0] @ model.readout.t() for state in states[1:]])
    return gradients(model, lambda *_: model.loss(y, states[-1]), inputs)


def highway(model: nn.Module, inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    torch._dynamo.reset()
    options = {"codegen": "eager", "apply": "always", "group_size": 1, **options}
    compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
    return gradients(model, compiled, inputs)


SPLITS = [
    Settings(0),
    Settings(1),
    Settings(2, group_size=3),
    Settings(3, gamma=0.3, group_size=2, exact_tail=1),
]


@pytest.mark.parametrize("name", some_slow(CELLS, set(CELLS) - {"layer norm gru"}))
def test_cells(name: str) -> None:
    model = Model(CELLS[name], every_step=bool(torch.randint(2, ())))
    inputs = data(model.cell, 8, 3)
    expected = gradients(model, lambda *a: model(*a, over_time=loop), inputs)
    assert relative_error(highway(model, inputs, iterations="exact"), expected) <= TOLERANCE
    assert relative_error(highway(model, inputs, iterations=8), expected) <= TOLERANCE
    for settings in SPLITS:
        found = highway(model, inputs, **asdict(settings))
        assert relative_error(found, reference(model, inputs, settings)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
@given(
    steps=st.integers(2, 7),
    batch=st.sampled_from([1, 3, 5]),
    every_step=st.booleans(),
    iterations=st.integers(0, 3),
    gamma=st.sampled_from([0.0, 0.0, 0.3]),
    group_size=st.integers(1, 3),
    exact_tail=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_cells_at_random(
    name: str,
    steps: int,
    batch: int,
    every_step: bool,
    iterations: int,
    gamma: float,
    group_size: int,
    exact_tail: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = Model(CELLS[name], every_step)
    inputs = data(model.cell, steps, batch)
    expected = gradients(model, lambda *a: model(*a, over_time=loop), inputs)
    splits: dict[str, Any] = {"gamma": gamma, "group_size": group_size, "exact_tail": exact_tail}
    assert relative_error(highway(model, inputs, iterations=steps, **splits), expected) <= TOLERANCE
    found = highway(model, inputs, iterations=iterations, **splits)
    assert relative_error(found, reference(model, inputs, Settings(iterations, **splits))) <= TOLERANCE


@pytest.mark.parametrize("name", some_slow(CELLS, {"s lstm", "block gru"}))
def test_an_approximation_is_one(name: str) -> None:
    """So that what is exact above is not so because nothing was rewritten; explain says the same."""
    model = Model(CELLS[name])
    inputs = data(model.cell, 6, 3)
    expected = gradients(model, lambda *a: model(*a, over_time=loop), inputs)
    assert relative_error(highway(model, inputs, iterations=0), expected) > 1e-3
    (chain,) = explain(model, *inputs, options={"iterations": 2, "apply": "always", "group_size": 1}).chains
    assert chain.applied
    assert chain.over == "time"
    assert chain.blocks == 6
    assert chain.iterations == 2
    assert len(chain.shapes) == model.cell.components
    assert "gate" in chain.residual


def test_weights_without_gradients() -> None:
    model = Model(CELLS["layer norm gru"])
    for p in list(model.weights)[:2]:
        p.requires_grad_(False)
    x, h = data(model.cell, 5, 3)
    values = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x.detach(), h.detach(), over_time=loop), values)
    for iterations in ("exact", 5):
        options = {"iterations": iterations, "apply": "always", "group_size": 1, "codegen": "eager"}
        compiled = torch.compile(model, backend="highway", options=options, fullgraph=True)
        found = torch.autograd.grad(compiled(x.detach(), h.detach()), values)
        assert relative_error(list(found), list(expected)) <= TOLERANCE


def test_directions_dimensions_and_structures() -> None:
    """Scans from the end, along another dimension, of dictionaries, whose outputs are states as they are."""
    model = Model(CELLS["layer norm lstm"])
    h, c = model.cell.carry(3)
    x = torch.randn(3, 5, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, over_time: Any = scan) -> Tensor:
        weights = tuple(model.weights)

        def step(state: dict[str, Tensor], x: dict[str, Tensor]) -> Any:
            before = state["c"]
            h, c = model.cell.function(lambda y: y, (state["h"], before), x["x"], *weights)
            return {"h": h, "c": c}, {"after": c.clone(), "before": before.clone(), "both": h + before}

        state = {"h": h, "c": c}
        if over_time is scan:
            last, y = scan(step, state, {"x": x}, dim=1, reverse=True)
            y = {name: value.transpose(0, 1) for name, value in y.items()}
        else:
            outputs = []
            for t in reversed(range(5)):
                state, each = step(state, {"x": x[:, t]})
                outputs.append(each)
            last, y = state, {k: torch.stack([o[k] for o in outputs[::-1]]) for k in outputs[0]}
        return sum((i + 1) * v.sin().sum() for i, v in enumerate((*y.values(), *last.values())))

    expected = gradients(model, lambda x: run(x, loop), [x])
    for iterations in ("exact", 5):
        options = {"iterations": iterations, "apply": "always", "group_size": 1, "codegen": "eager"}
        compiled = torch.compile(run, backend="highway", options=options, fullgraph=True)
        assert relative_error(gradients(model, compiled, [x]), expected) <= TOLERANCE


@pytest.mark.parametrize("apply", ["never", pytest.param("always", marks=pytest.mark.slow)])
def test_no_wrong_gradient_by_inductor(apply: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where a bias is added within a gate that is reset, Inductor's own scan has a wrong gradient."""
    gru = nn.GRU(4, 5).double()
    w_x, w_h, b_x, b_h = gru.parameters()
    x = torch.randn(6, 3, 4, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        def step(h: Tensor, of_x: Tensor) -> tuple[Tensor, Tensor]:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.chunk(3, -1), F.linear(h, w_h, b_h).chunk(3, -1)
            z = torch.sigmoid(z_x + z_h)
            h = (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h
            return h, h.clone()

        return scan(step, x.new_zeros(3, 5), F.linear(x, w_x, b_x))[1].sin().sum()

    weights = list(gru.parameters())
    expected = torch.autograd.grad(gru(x)[0].sin().sum(), weights)
    by_torch = torch.autograd.grad(torch.compile(run, backend="aot_eager")(x), weights)
    if apply == "never" and relative_error(list(by_torch), list(expected)) > TOLERANCE:
        pytest.skip("in this version of torch its own scan is wrong, whatever compiles it")
    options = {"apply": apply, "iterations": 6}
    with caplog.at_level(logging.WARNING, "hwbp_compile"):
        found = torch.autograd.grad(torch.compile(run, backend="highway", options=options)(x), weights)
    assert relative_error(list(found), list(expected)) <= TOLERANCE
    assert ("runs op by op" in caplog.text) == (apply == "never")


def test_outputs_that_are_written_to() -> None:
    """What a scan returns are tensors of their own, also where they are the same states."""
    model = Model(CELLS["layer norm gru"])

    def run(x: Tensor, h: Tensor, over_time: Any = scan) -> Tensor:
        weights = list(model.weights)

        def step(h: Tensor, x: Tensor) -> Any:
            (after,) = model.cell.function(lambda y: y, (h,), x, *weights)
            return after, torch.stack([h, after]) if over_time is loop else (h.clone(), after.clone())

        last, y = over_time(step, h, x)
        before, after = y.unbind(1) if over_time is loop else y
        if over_time is loop:
            return (before * 3 + 1).sin().sum() + (after * last).sin().sum()
        before.mul_(3).add_(1)
        return before.sin().sum() + (after * last).sin().sum()

    inputs = data(model.cell, 5, 3)
    expected = gradients(model, lambda *a: run(*a, over_time=loop), inputs)
    for iterations in ("exact", 5):
        options = {"iterations": iterations, "apply": "always", "group_size": 1, "codegen": "eager"}
        compiled = torch.compile(run, backend="highway", options=options, fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), run(*inputs, over_time=loop))
        assert relative_error(gradients(model, compiled, inputs), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "iterations", "group_size"),
    [
        pytest.param("layer norm gru", "exact", 1, marks=pytest.mark.slow),
        ("layer norm gru", 1, 3),
        pytest.param("s lstm", 1, 1, marks=pytest.mark.slow),
        pytest.param("block gru", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_lengths_and_batches_that_change(name: str, iterations: int | str, group_size: int) -> None:
    """One program for all lengths; of groups, whether the last is a short one does not matter."""
    model = Model(CELLS[name])
    options = {"iterations": iterations, "apply": "always", "group_size": group_size, "codegen": "eager"}

    def graphs(dynamic: bool | None) -> list[int]:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="highway", options=options, fullgraph=True, dynamic=dynamic)
        made = []
        for steps, batch in ((7, 4), (12, 4), (10, 4), (14, 4), (12, 7), (13, 2)):
            inputs = data(model.cell, steps, batch)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            found = gradients(model, compiled, inputs)
            made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
            settings = Settings(steps if isinstance(iterations, str) else iterations, group_size=group_size)
            assert relative_error(found, reference(model, inputs, settings)) <= TOLERANCE
        return made

    made = graphs(True), graphs(None)
    # torch.vmap of a product fixes all sizes there, and so what is returned besides the state.
    if torch.torch_version.TorchVersion(torch.__version__) >= "2.13":
        assert made == ([1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0])


@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("of", ["batch", "batch, to compute with", "one more", "a part", "epsilon", "length"])
def test_sizes_that_a_cell_reads(of: str, dynamic: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo hands symbolic ones to the cell. It is exact if it computes with one."""
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, over_time: Any = scan) -> Tensor:
        number = x.shape[0 if of == "length" else 1]

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            more = {
                "batch": lambda: torch.ones(number, 5, dtype=x.dtype),
                "one more": lambda: h.unsqueeze(1).expand(-1, number + 1, -1).sum(1),
                "a part": lambda: h.detach()[:, :number].sum(1, keepdim=True),
                "epsilon": lambda: F.layer_norm(h, (5,), eps=1 / number),
            }.get(of, lambda: torch.sin(h) / number)()
            h = 0.5 * h + torch.tanh((h + x) @ w + more)
            return h, h.clone()

        return over_time(step, x.new_zeros(x.shape[1], 5), x)[1].sin().sum()

    options = {"iterations": 9, "apply": "always", "group_size": 1, "codegen": "eager"}
    compiled = torch.compile(run, backend="highway", options=options, fullgraph=True, dynamic=dynamic)
    with caplog.at_level(logging.INFO, "hwbp_compile"):
        for steps, batch in ((6, 3), (9, 4), (8, 5)):
            x = torch.randn(steps, batch, 5, dtype=torch.float64)
            (expected,) = torch.autograd.grad(run(x, loop), [w])
            (found,) = torch.autograd.grad(compiled(x), [w])
            assert relative_error([found], [expected]) <= TOLERANCE
    if dynamic and of != "a part":  # which torch compiles for each batch
        assert ("parallel: scan" in caplog.text) == (of == "batch")
        assert ("no size of one" in caplog.text) == (of == "length")


@pytest.mark.parametrize("apply", ["never", "always"])
@pytest.mark.parametrize("together", [False, True])
def test_states_to_start_from_that_are_one(apply: str, together: bool) -> None:
    """The same zeros twice, or two rows of one tensor; torch's own scan refuses both."""
    model = Model(CELLS["layer norm lstm"])
    x = torch.randn(5, 3, 3, dtype=torch.float64)

    def run(x: Tensor, over_time: Any = scan) -> Tensor:
        zeros = x.new_zeros(2, 3, model.cell.hidden)
        states = (zeros[0], zeros[1]) if together else (zeros[0], zeros[0])
        return model(x, *states, over_time=over_time)

    expected = torch.autograd.grad(run(x, loop), list(model.parameters()))
    options = {"apply": apply, "iterations": 5, "group_size": 1, "codegen": "eager"}
    compiled = torch.compile(run, backend="highway", options=options, fullgraph=True)
    found = torch.autograd.grad(compiled(x), list(model.parameters()))
    assert relative_error(list(found), list(expected)) <= TOLERANCE


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class _Tripled(_Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 3


def _again(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)


@pytest.mark.parametrize(
    "pair",
    [(_Doubled.apply, _Tripled.apply), (_again(torch.sin), _again(torch.cos))],
    ids=["custom functions", "checkpoints"],
)
def test_cells_that_differ_in_what_is_inside_of_them(pair: Sequence[Callable[[Tensor], Tensor]]) -> None:
    """Dynamo hands these over as graphs in the cell's graph, under names that are the same for both."""
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    options = {"iterations": 6, "apply": "always", "group_size": 1, "codegen": "eager"}
    for inside in pair:

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = 0.5 * h + torch.tanh(inside((h + x) @ w))  # noqa: B023
            return h, h.clone()

        def run(over_time: Any) -> Tensor:
            return over_time(step, x.new_zeros(3, 5), x)[1].sin().sum()

        expected = torch.autograd.grad(run(loop), w)
        torch._dynamo.reset()
        compiled = torch.compile(run, backend="highway", options=options, fullgraph=True)
        assert relative_error(list(torch.autograd.grad(compiled(scan), w)), list(expected)) <= TOLERANCE


def test_without_gradients() -> None:
    model = Model(CELLS["s lstm"])
    inputs = data(model.cell, 6, 3)
    compiled = torch.compile(model, backend="highway", options={"codegen": "eager"}, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs, over_time=loop))


def _sorted(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return 0.9 * h + torch.tanh((h + x).sort(-1).values @ w)


def _dropped(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return 0.9 * h + F.dropout(torch.tanh((h + x) @ w), 0.5)


def _across_the_batch(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return 0.9 * h + torch.tanh((h + x - h.mean(0)) @ w)


def _no_residual(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh((h + x) @ w)


def _batch_normed(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return 0.9 * h + torch.tanh(F.batch_norm((h + x) @ w, None, None, training=True))


class Unusual:
    """A scan of a cell for which there is no kernel, or no chain."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.float64) -> None:
        self.function = function
        self.w = nn.Parameter(torch.randn(4, 4, dtype=dtype))
        self.inputs = [torch.randn(s, dtype=dtype).requires_grad_() for s in ((5, 3, 4), (3, 4))]

    def __call__(self, x: Tensor, h: Tensor, over_time: Any = scan) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.function(h, x, self.w)
            return h, h.clone()

        return over_time(step, h, x)[1].square().sum()

    def gradients(self, over_time: Any = None, **options: Any) -> list[Tensor]:
        torch._dynamo.reset()
        options = {"codegen": "eager", "apply": "always", "group_size": 1, **options}
        compiled = torch.compile(self, backend="highway", options=options, fullgraph=True)
        loss = self(*self.inputs, over_time) if over_time else compiled(*self.inputs)
        return list(torch.autograd.grad(loss, [*self.inputs, self.w]))


def test_random_numbers_leave_it_exact() -> None:
    model = Unusual(_dropped)
    (chain,) = explain(
        model, *model.inputs, options={"iterations": 1, "apply": "always", "group_size": 1}
    ).chains
    assert not chain.applied
    assert "random" in chain.reason


def test_no_residual_path() -> None:
    model = Unusual(_no_residual)
    (chain,) = explain(
        model, *model.inputs, options={"iterations": 1, "apply": "always", "group_size": 1}
    ).chains
    assert not chain.applied
    assert "no residual path" in chain.reason
    assert relative_error(model.gradients(iterations=1), model.gradients(loop)) <= TOLERANCE


@pytest.mark.parametrize("function", [_sorted, _across_the_batch, _batch_normed])
def test_loops_where_there_are_no_kernels(function: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An operator that has no translation, and samples that are mixed: the steps run operator by operator."""
    model = Unusual(function)
    expected = model.gradients(loop)
    with caplog.at_level(logging.INFO, "hwbp_compile"):
        assert relative_error(model.gradients(iterations="exact"), expected) <= TOLERANCE
    assert "loop of torch's operators" in caplog.text
    assert relative_error(model.gradients(iterations=5), expected) <= TOLERANCE
    (chain,) = explain(
        model, *model.inputs, options={"iterations": 1, "apply": "always", "group_size": 1}
    ).chains
    assert "loop of torch's operators" in chain.notes[0]
    if chain.applied:
        assert relative_error(model.gradients(iterations=0), expected) > 1e-3


def test_half_precision_runs_in_loops() -> None:
    model = Unusual(lambda h, x, w: 0.9 * h + torch.tanh((h + x) @ w), torch.bfloat16)
    expected = model.gradients(loop)
    for iterations in ("exact", 5):
        found = model.gradients(iterations=iterations)
        assert all(f.dtype == torch.bfloat16 for f in found)
        floats = ([g.float() for g in gradients] for gradients in (found, expected))
        assert relative_error(*floats) <= 0.05


@pytest.mark.parametrize("name", ["layer norm lstm", pytest.param("block gru", marks=pytest.mark.slow)])
def test_loops_without_a_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What loops and kernels compute is the same, exactly and at a small k."""
    model = Model(CELLS[name])
    inputs = data(model.cell, 5, 3)
    expected = [highway(model, inputs, iterations=k) for k in ("exact", 1)]

    def fails(*_: Any) -> None:
        raise RuntimeError("no compiler")

    recurrence._made.cache_clear()
    monkeypatch.setattr(_compat, "load_cpp_kernel", fails)
    try:
        found = [highway(model, inputs, iterations=k) for k in ("exact", 1)]
    finally:
        recurrence._made.cache_clear()
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) <= TOLERANCE


@pytest.mark.parametrize(("inputs", "hidden", "batch"), [(3, 600, 2), (3, 300, 70), (9000, 32, 2)])
def test_large_matrices(inputs: int, hidden: int, batch: int) -> None:
    """Weights that leave the cache, and batches of more rows than are taken through a step at once."""

    def run(x: Tensor, h: Tensor, w: Tensor, u: Tensor, over_time: Any = scan) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = 0.9 * h + torch.tanh(x @ u + h @ w)
            return h, h.clone()

        return over_time(step, h, x)[1].square().sum()

    shapes = [(3, batch, inputs), (batch, hidden), (hidden, hidden), (inputs, hidden)]
    arguments = [(torch.randn(s).double() / s[-1]).requires_grad_() for s in shapes]
    expected = torch.autograd.grad(run(*arguments, over_time=loop), arguments)
    for iterations in ("exact", 3):
        options = {"iterations": iterations, "apply": "always", "group_size": 1, "codegen": "eager"}
        compiled = torch.compile(run, backend="highway", options=options, fullgraph=True)
        found = torch.autograd.grad(compiled(*arguments), arguments)
        assert relative_error(list(found), list(expected)) <= TOLERANCE


def test_states_that_share_memory_and_mixed_precision() -> None:
    """A scan that stays what it is compiles, where torch refuses its states; so does one under autocast."""
    w = nn.Parameter(torch.randn(4, 4))

    def step(state: tuple[Tensor, Tensor], x: Tensor) -> Any:
        h, c = state
        both = torch.tanh((h + x) @ w).sort(-1).values.float()
        return (both, both + c), both * 2

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return scan(step, (torch.zeros(3, 4), torch.zeros(3, 4)), x)[1].float().sum()

    def sorted_states(x: Tensor) -> Tensor:
        return scan(step, (torch.zeros(3, 4), torch.zeros(3, 4)), x)[1].sum()

    x = torch.randn(5, 3, 4)
    compiled = torch.compile(sorted_states, backend="highway", options={"codegen": "eager"}, fullgraph=True)
    _, y = loop(step, (torch.zeros(3, 4), torch.zeros(3, 4)), x)
    torch.testing.assert_close(compiled(x), y.sum())
    (chain,) = explain(run, x).chains
    assert "mixed precision" in chain.reason


@pytest.mark.parametrize("name", some_slow(CELLS, set(CELLS) - {"layer norm gru"}))
def test_single_precision(name: str) -> None:
    model = Model(CELLS[name]).float()
    inputs = [t.detach().float().requires_grad_() for t in data(model.cell, 20, 4)]
    expected = gradients(model, lambda *a: model(*a, over_time=loop), inputs)
    for iterations in ("exact", 20):
        assert relative_error(highway(model, inputs, iterations=iterations), expected) <= 1e-4


@pytest.mark.slow
def test_inductor_in_single_precision() -> None:
    model = Model(CELLS["layer norm gru"]).float()
    inputs = [t.detach().float().requires_grad_() for t in data(model.cell, 20, 4)]
    expected = gradients(model, lambda *a: model(*a, over_time=loop), inputs)
    for iterations in ("exact", 20):
        found = highway(model, inputs, iterations=iterations, codegen="inductor")
        assert relative_error(found, expected) <= 1e-4
