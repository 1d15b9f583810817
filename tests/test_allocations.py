"""The benchmarks' way to measure memory, on work whose allocations are known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hwbp_compile.recurrent import layer as layers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from allocations import Part, allocated, memory_of
from measuring import Step

KB = 1024
CPU = torch.device("cpu")


def kilobytes(n: int) -> Tensor:
    return torch.empty(n * KB, dtype=torch.uint8)


def test_peak_and_end_of_each_part() -> None:
    before = [kilobytes(64)]

    def work() -> Iterator[None]:
        a = kilobytes(100)
        b = kilobytes(200)
        del a
        yield  # 300 at most, 200 at the end
        before.clear()  # was there before: counts as if it were to the end
        c = kilobytes(50)
        del b
        d = kilobytes(400)
        yield  # 450 at most
        del c, d
        yield

    assert allocated(work(), CPU) == [
        Part(300 * KB, 200 * KB),
        Part(450 * KB, 450 * KB),
        Part(450 * KB, 0),
    ]


def test_memory_of_an_earlier_measurement_does_not_count_when_it_is_freed() -> None:
    kept: list[Tensor] = []

    def allocate() -> Iterator[None]:
        kept.append(kilobytes(100))
        yield

    def free() -> Iterator[None]:
        kept.clear()
        kept.append(kilobytes(10))
        yield

    assert allocated(allocate(), CPU) == [Part(100 * KB, 100 * KB)]
    assert allocated(free(), CPU) == [Part(10 * KB, 10 * KB)]


class Products(nn.Module):
    """``layers`` products with one shared weight, with nothing in between."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.weight, self.layers = nn.Parameter(torch.eye(size)), layers

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            x = x @ self.weight
        return x


@pytest.mark.parametrize("layers", [2, 5])
def test_memory_of_a_step_by_hand(layers: int) -> None:
    size, rows = 8, 1000
    module = Products(size, layers)
    x = torch.randn(rows, size)
    step = Step(module, module, x, torch.randn(rows, size))
    state, weight = rows * size * 4, size * size * 4
    for _ in range(2):  # also with gradients there from the step before
        memory = memory_of(step)
        # The forward pass keeps each layer's input but the given one, its result, and the loss; while the
        # loss is summed, also the product with its direction.
        assert memory.kept == (layers - 1) * state + state + 4
        # In the first layer's backward pass the second's input, its cotangent and the new one are there, and
        # the loss: far less than in the last layer's, where all inputs are.
        assert memory.peak >= memory.kept + state
        assert memory.peak <= memory.kept + 2 * state + 2 * weight + 64


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_layers_take_no_more_than_those_of_torch(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are exact, by our kernels."""
    monkeypatch.setattr(layers, "kernels_are_faster", lambda *_, **__: True)
    module, x = kind(3, 32), torch.randn(200, 8, 3)
    options = {"iterations": "exact", "codegen": "eager"}
    compiled = torch.compile(module, backend="highway", options=options, fullgraph=True)
    direction = torch.randn(200, 8, 32)
    steps = [Step(module, forward, x, direction) for forward in (module, compiled)]
    for step in steps:
        step()
    library, ours = (memory_of(step).peak for step in steps)
    assert ours <= library
