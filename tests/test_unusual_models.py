"""Models that are not a plain stack of blocks: their chains are rewritten, and the gradient is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import recorded, rewritten
from families import PreAct, Residual
from small_models import LENGTH, D, chain, check_exact, compiled, grads
from torch import Tensor, nn


def test_one_block_used_many_times() -> None:
    m = nn.Sequential(nn.Linear(4, D), *([chain(1)[0]] * 6)).double()
    check_exact(m, torch.randn(5, 4).double())


def test_head_tied_to_the_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.blocks = nn.Embedding(7, D), nn.Sequential(*chain())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.blocks(self.embedding(x)), self.embedding.weight)

    check_exact(Tied().double(), torch.randint(0, 7, (3, 4)))


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_states_with_permuted_strides(codegen: str) -> None:
    """The views in the backward were recorded for the layout of the old cotangents."""

    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks, self.head = nn.Linear(D, D), nn.Sequential(*chain(5)), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(x).transpose(0, 1)).transpose(0, 1))

    check_exact(TokensFirst().double(), torch.randn(3, 4, D).double(), codegen=codegen)


def test_channels_last() -> None:
    m = nn.Sequential(nn.Conv2d(4, 4, 1), *[PreAct(4) for _ in range(4)]).double()
    m = m.to(memory_format=torch.channels_last)
    check_exact(m, torch.randn(2, 4, 5, 6).double().contiguous(memory_format=torch.channels_last))


def test_chains_that_depend_on_each_other() -> None:
    """Two towers that read each other half way: as two schedules each would wait for the other."""

    class Exchange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, D), nn.Linear(4, D)
            self.left = nn.ModuleList(chain(8))
            self.right = nn.ModuleList(chain(8))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            for i, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
                a, b = left(a), right(b)
                if i == 3:
                    a, b = a + 0.5 * b, b + 0.5 * a
            return torch.cat([a, 2 * b])

    check_exact(Exchange().double(), torch.randn(5, 4).double(), chains=None, iterations=20)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_attention_mask_shared_by_all_layers(kind: torch.dtype) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = self.q(x).unsqueeze(1)
            return x + self.out(F.scaled_dot_product_attention(q, q, q, attn_mask=mask).squeeze(1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Linear(D, D), nn.ModuleList([Masked() for _ in range(4)])

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, mask)
            return x

    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = mask if kind == torch.bool else torch.where(mask, 0.0, -1e9).double()
    check_exact(Model().double(), torch.randn(3, 5, D).double(), mask)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_transformer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True, norm_first=norm_first)
    m = nn.Sequential(nn.Linear(D, D), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)).double()
    check_exact(m, torch.randn(3, 5, D).double())


def test_gradient_noise_is_an_affine_term() -> None:
    """A tensor added to the gradient inside a block is carried along like a direct gradient."""

    class Noise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g + 0.1 * ctx.saved_tensors[0]

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(Noise.apply(torch.tanh(self.a(x))))

    check_exact(nn.Sequential(*[Noisy() for _ in range(5)]).double(), torch.randn(5, D).double())


class FewRows(nn.Module):
    """A block that reads some rows of its state, one by one: of the others no gradient comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.linear(x[0])) * x[2]
        return y.expand(4, D)


def test_blocks_that_read_some_rows_of_their_state() -> None:
    m = nn.Sequential(*(Residual(nn.Identity(), FewRows()) for _ in range(LENGTH))).double()
    check_exact(m, torch.randn(4, D, dtype=torch.float64))


class Preconditioned(torch.autograd.Function):
    """The identity, whose backward pass multiplies with a matrix and then changes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.matrix = matrix
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        out = g @ ctx.matrix
        ctx.matrix.mul_(0.5)
        return out, None


class Changing(nn.Module):
    """Its matrix is changed by the backward pass and, if ``forward``, by the forward pass too."""

    def __init__(self, forward: bool = False) -> None:
        super().__init__()
        self.changes = forward
        self.linear = nn.Linear(D, D)
        self.register_buffer("matrix", torch.randn(D, D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.changes:
            self.matrix.add_(0.1)
        y: Tensor = Preconditioned.apply(torch.tanh(self.linear(x)), self.matrix)
        return y


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_what_the_backward_pass_reads_and_then_changes(codegen: str) -> None:
    m = nn.Sequential(*(Residual(nn.LayerNorm(D), Changing()) for _ in range(LENGTH))).double()
    before = {name: buffer.clone() for name, buffer in m.named_buffers()}
    x = torch.randn(5, D, dtype=torch.float64)
    expected = grads(m, m, x)
    m.load_state_dict(before, strict=False)
    with recorded() as records:
        found = grads(m, compiled(m, codegen=codegen, apply="always"), x)
    assert rewritten(records) == [(LENGTH - 1, "identity")], "nobody asks for a gradient before the first"
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    for name, buffer in m.named_buffers():
        torch.testing.assert_close(buffer, 0.5 * before[name])
