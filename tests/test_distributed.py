"""Data-parallel training: the gradients of all processes together are what eager torch's are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from compare import relative_error
from small_models import LENGTH, D, chain
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import hwbp_compile


class Model(nn.Module):
    """With a forward of its own: Dynamo takes that of nn.Sequential apart behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, D), *chain(), nn.Linear(D, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def train(rank: int, file: str, stacked: bool) -> None:
    """One of two processes: the compiled model is wrapped, with stacks, or the wrapped one is compiled."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    ours = Model().double()
    eager = DistributedDataParallel(copy.deepcopy(ours))
    if stacked:
        hwbp_compile.stack_parameters(ours)
        net: Callable[..., Tensor] = DistributedDataParallel(torch.compile(ours, **highway()))
    else:
        net = torch.compile(DistributedDataParallel(ours), **highway())
    torch.manual_seed(1 + rank)
    x = torch.randn(5, 4, dtype=torch.float64)
    for forward in (eager, net):
        forward(x).square().sum().backward()
    assert [record.blocks for record in hwbp_compile.monitor(net).current] == [LENGTH]
    plain = copy.deepcopy(ours)
    for own, p in zip(plain.parameters(), ours.parameters(), strict=True):
        own.grad = p.grad
    if stacked:
        for change in (hwbp_compile.stack_parameters, hwbp_compile.unstack_parameters):
            with pytest.raises(ValueError, match="DistributedDataParallel module has parameters that"):
                change(eager.module if change is hwbp_compile.stack_parameters else ours)
        hwbp_compile.unstack_parameters(plain)
    expected = [p.grad for p in eager.parameters()]
    found = [p.grad for p in plain.parameters()]
    assert relative_error(found, expected) <= 1e-10
    torch.distributed.destroy_process_group()


def highway() -> dict[str, Any]:
    return {"backend": "highway", "options": {"codegen": "eager", "apply": "always", "iterations": LENGTH}}


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_data_parallel(tmp_path: Path, stacked: bool) -> None:
    spawn(train, (str(tmp_path / "store"), stacked), nprocs=2)
