"""Blocks of operators that other models do not have, batched: they are still what they were."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import exact, float64, highway, reference, relative_error, rewritten
from families import Case, Plain
from marks import some_slow
from reference import Settings
from small_models import grads
from torch import Tensor, nn

import hwbp_compile

DEPTH, B, T, D = 4, 2, 6, 8


class Block(nn.Module):
    """x + f(W x, V x), of [B, T, D]"""

    def __init__(self, f: Callable[[Tensor, Tensor, nn.Module], Tensor], module: nn.Module | None) -> None:
        super().__init__()
        self.f, self.v, self.w = f, nn.Linear(D, D), nn.Linear(D, D)
        self.module = nn.Identity() if module is None else module

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.f(torch.tanh(self.w(x)), self.v(x), self.module)


def assigned(a: Tensor, b: Tensor, _: nn.Module) -> Tensor:
    y = torch.empty_like(a)
    y[..., :3] = b[..., :3]
    y[..., 3:] = a[..., 3:] * b[..., :1]
    y[:, 0] = 0.5 * b[:, 1]
    y[:, 1:3] += a[:, :2]
    return y


def assigned_to_several(a: Tensor, b: Tensor, _: nn.Module) -> Tensor:
    y = a.clone()
    y[..., :3] = b[..., 3:4]
    y[:, 1] = b[:, :1, 0]
    return y


def assigned_step_by_step(a: Tensor, b: Tensor, _: nn.Module) -> Tensor:
    y = a.new_empty(T, B, D)
    for t in range(T):
        y[t] = a[:, t] * b[:, -t]
    return y.transpose(0, 1)


def pooled_with_channels_last(a: Tensor, b: Tensor, _: nn.Module) -> Tensor:
    return a * F.adaptive_avg_pool1d(b.transpose(1, 2), 1).transpose(1, 2)


def as_image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(B, D, 2, T // 2)


def as_tokens(x: Tensor) -> Tensor:
    return x.reshape(B, D, T).transpose(1, 2)


def padded(a: Tensor, b: Tensor, conv: nn.Module) -> Tensor:
    image, other = as_image(a), as_image(b)
    reflected = conv(F.pad(image, (1, 1, 1, 1), mode="reflect"))
    return as_tokens(reflected + F.pad(other, (1, 1, 1, 1), mode="replicate")[..., :-2, 2:])


def pooled(a: Tensor, b: Tensor, _: nn.Module) -> Tensor:
    image, volume = as_image(a), as_image(b).reshape(B, 2, D // 2, 2, T // 2)
    most = F.adaptive_max_pool2d(image, 1) + F.adaptive_max_pool3d(volume, 1).reshape(B, 2, 1, 1).sum(1, True)
    blurred = F.max_pool3d(volume, 3, 1, 1) + F.adaptive_avg_pool3d(volume, 1)
    return as_tokens(image * most + blurred.reshape(B, D, 2, T // 2))


def sampled(a: Tensor, b: Tensor, _: nn.Module) -> Tensor:
    image = as_image(a)
    grid = torch.tanh(as_image(b)[:, :2].permute(0, 2, 3, 1))
    volume = F.interpolate(image.unsqueeze(2), scale_factor=(2, 1, 1), mode="trilinear").mean(2)
    return as_tokens(F.grid_sample(image, grid, align_corners=False) + volume)


def solved(a: Tensor, b: Tensor, matrix: nn.Module) -> Tensor:
    assert isinstance(matrix, nn.Linear)
    near_one = torch.eye(D, dtype=a.dtype) + 0.1 * matrix.weight
    lower = torch.linalg.cholesky(near_one @ near_one.T)
    columns = a.transpose(1, 2)
    x = torch.linalg.solve(near_one, columns) + torch.linalg.solve_triangular(lower, columns, upper=False)
    return x.transpose(1, 2) + torch.cdist(a, b) @ b


def indexed(a: Tensor, b: Tensor, table: nn.Module) -> Tensor:
    """The gradients of what is read are added up in memory, at places that all blocks share or do not."""
    assert isinstance(table, nn.Embedding)
    shared = torch.tensor([1, 0, 2, 2, 4, 5])
    own = b.detach().argsort(-1)
    moved = torch.zeros_like(a).index_add(1, shared, a).scatter_add(-1, own, b)
    between = F.interpolate(a.transpose(1, 2), scale_factor=2, mode="linear")[..., ::2].transpose(1, 2)
    return between * b.gather(-1, own) + a[:, shared] + moved * table((b.detach()[..., 0] > 0).long())


def sampled_from_an_image(a: Tensor, b: Tensor, _: nn.Module) -> Tensor:
    """Of two gradients of one operator nobody wants the first."""
    image = torch.linspace(0, 1, B * 25, dtype=a.dtype).view(B, 1, 5, 5)
    grid = torch.tanh(b.reshape(B, T, D // 2, 2))
    return a * F.grid_sample(image, grid, align_corners=False).mean((1, 3)).unsqueeze(-1)


def normalised(a: Tensor, b: Tensor, norm: nn.Module) -> Tensor:
    return norm(a.transpose(1, 2)).transpose(1, 2) * b


CASES: dict[str, tuple[Callable[[Tensor, Tensor, nn.Module], Tensor], Callable[[], nn.Module | None]]] = {
    "parts assigned to": (assigned, lambda: None),
    "parts assigned the same": (assigned_to_several, lambda: None),
    "steps assigned to": (assigned_step_by_step, lambda: None),
    "pooling with channels last": (pooled_with_channels_last, lambda: None),
    "padding": (padded, lambda: nn.Conv2d(D, D, 3)),
    "pooling": (pooled, lambda: None),
    "sampling": (sampled, lambda: None),
    "indices": (indexed, lambda: nn.Embedding(2, D)),
    "sampling from an image": (sampled_from_an_image, lambda: None),
    "instances normalised": (normalised, lambda: nn.InstanceNorm1d(D, affine=True)),
    "linear algebra": (solved, lambda: nn.Linear(D, D)),
}


class Pooled(nn.Module):
    """As transformers for images end: its gradient is read from memory by strides, outside of the chain."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1)


def build(name: str) -> Case:
    f, module = CASES[name]
    torch.manual_seed(0)
    blocks = [Block(f, module()) for _ in range(DEPTH)]
    head = nn.Sequential(Pooled(), nn.Linear(D, 3))
    return float64(Case(Plain(nn.Linear(5, D), blocks, head), (torch.randn(B, T, 5),), [DEPTH]))


IN_CI = {"parts assigned to", "pooling with channels last", "padding"}


@pytest.mark.parametrize("name", some_slow(CASES, set(CASES) - IN_CI))
def test_batched(name: str) -> None:
    case = build(name)
    expected = exact(case)
    found, records = highway(case, iterations=DEPTH)
    assert rewritten(records) == [(DEPTH, "identity")], [o.reason for r in records for o in r.outcomes]
    assert relative_error(found, expected) <= 1e-10
    found, _ = highway(case, iterations=1)
    assert relative_error(found, reference(case, Settings(1))) <= 1e-10
    assert relative_error(found, expected) > 1e-6, "one iteration must differ from the exact gradient"


def test_explained() -> None:
    """The nodes of its chains are not those that autograd wrote."""
    case = build("parts assigned to")
    explained = hwbp_compile.explain(case.model, *case.inputs, options={"iterations": 1, "apply": "always"})
    assert [chain.applied for chain in explained.chains] == [True]
    assert "as_strided_scatter" not in explained.before[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_batched_in_generated_code(name: str) -> None:
    """Inductor (2.13) writes at indices into expanded memory as if its rows did not lie on each other."""
    case = build(name)
    found, records = highway(case, iterations=1, codegen="inductor", apply="always")
    assert len(rewritten(records)) == 1
    assert relative_error(found, reference(case, Settings(1))) <= 1e-10


@pytest.mark.parametrize(
    "name",
    [
        "pooling with channels last",
        "parts assigned the same",
        pytest.param("instances normalised", marks=pytest.mark.slow),
    ],
)
def test_sizes_left_open(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = build(name)
    torch._dynamo.reset()
    options = {"codegen": "eager", "apply": "always", "iterations": DEPTH}
    compiled = torch.compile(case.model, backend="highway", options=options, dynamic=True, fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, T, 5, dtype=torch.float64)
        assert relative_error(grads(case.model, compiled, x), grads(case.model, case.model, x)) <= 1e-10
    assert [record.blocks for record in hwbp_compile.monitor(compiled).current] == [DEPTH]
    assert "internal error" not in caplog.text


FIRST = """
import torch
from torch import nn
m = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(3, 2, 1), nn.Flatten())
torch.compile(m, backend="highway", options={"codegen": "eager"})(torch.randn(1, 1, 8, 8)).sum().backward()
"""


def test_maximum_pooling_in_the_first_model_of_a_process() -> None:
    """Its decomposition reads a module of Inductor's that it does not import."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
