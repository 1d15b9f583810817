"""However a model is trained or called, the gradient is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import recorded, rewritten
from families import Attention, PreAct, Residual, mlp
from small_models import D, chain, check_exact, compiled, grads, model
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint


def test_inference_no_grad_and_eval() -> None:
    m, x = model(), torch.randn(5, 4).double()
    f = compiled(m)
    expected = m(x)
    with torch.no_grad():
        torch.testing.assert_close(f(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(f(x.clone()), expected)
    m.eval()
    torch.testing.assert_close(f(x), expected)
    torch._dynamo.reset()
    check_exact(m, x)


def test_parameters_that_need_no_gradient() -> None:
    m, x = model().requires_grad_(False), torch.randn(5, 4).double()
    torch.testing.assert_close(compiled(m)(x), m(x))


def test_frozen_early_blocks() -> None:
    m = model(9)
    m[:4].requires_grad_(False)
    check_exact(m, torch.randn(5, 4).double())


def test_frozen_blocks_in_the_middle() -> None:
    m = model()
    m[3].requires_grad_(False)
    check_exact(m, torch.randn(5, 4).double())


def test_gradient_accumulation() -> None:
    m, x = model(), torch.randn(5, 4).double()
    expected = grads(m, m, x, repeat=3)
    for f, e in zip(grads(m, compiled(m), x, repeat=3), expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_second_backward(codegen: str) -> None:
    m, x = model(), torch.randn(5, 4).double()
    expected = grads(m, m, x, repeat=2)
    m.zero_grad()
    # From its cache torch could take a backward that was first run without retain_graph, which it refuses
    # to run with it, with any backend.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        loss = compiled(m, codegen=codegen)(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for p, e in zip(m.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_cached_code_overwrites_nothing_that_a_second_backward_pass_reads() -> None:
    """Inductor caches it without regard to which saved tensors may be overwritten."""
    m, x = model(4), torch.randn(5, 4).double()
    expected = grads(m, m, x)
    with fresh_cache():
        grads(m, compiled(m, codegen="inductor"), x)  # may overwrite what is read once
        torch._dynamo.reset()
        m.zero_grad()
        with torch._functorch.config.patch(enable_autograd_cache=False):
            loss = compiled(m, codegen="inductor")(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
    for p, e in zip(m.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * e)


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True])
def test_batch_sizes_that_change(dynamic: bool | None) -> None:
    m = model()
    f = compiled(m, dynamic=dynamic)
    for batch in (5, 3, 8, 1, 2):
        x = torch.randn(batch, 4).double()
        expected = grads(m, m, x)
        with recorded() as records:
            found = grads(m, f, x)
        assert all(not o.reason for r in records for o in r.outcomes)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "shape", [*(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 5), (3, 5))), (3, 7)]
)
def test_dynamic_shapes_in_attention(shape: tuple[int, int]) -> None:
    m = nn.Sequential(nn.Linear(D, D), *[Residual(nn.LayerNorm(D), Attention(D)) for _ in range(4)]).double()
    check_exact(m, torch.randn(*shape, D).double(), dynamic=True)


def test_dynamic_image_sizes() -> None:
    m = nn.Sequential(nn.Conv2d(4, 4, 1), *[PreAct(4) for _ in range(4)]).double()
    check_exact(m, torch.randn(2, 4, 5, 6).double(), dynamic=True)


def test_automatic_mixed_precision() -> None:
    m = nn.Sequential(nn.Linear(4, 16), *chain(6, 16), nn.Linear(16, 3))
    x = torch.randn(8, 4)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    expected = grads(m, forward, x)
    with recorded() as records:
        found = grads(m, compiled(forward), x)
    assert rewritten(records) == [(6, "identity")]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0.05, atol=0.05 * float(e.abs().max()))


def test_bfloat16_parameters() -> None:
    m = nn.Sequential(nn.Linear(4, 16), *chain(6, 16), nn.Linear(16, 3)).bfloat16()
    x = torch.randn(8, 4).bfloat16()
    expected = grads(m, m, x)
    with recorded() as records:
        found = grads(m, compiled(m), x)
    assert rewritten(records) == [(6, "identity")]
    for f, e in zip(found, expected, strict=True):
        cosine = F.cosine_similarity(f.float().flatten(), e.float().flatten(), 0)
        assert float(cosine) > 0.99


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_checkpointed_blocks(codegen: str) -> None:
    blocks = nn.ModuleList(chain()).double()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    check_exact(Checkpointed(), torch.randn(5, D).double(), codegen=codegen)


class DropPath(nn.Module):
    """Stochastic depth: leaves out the block for some samples."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.empty(x.shape[0], 1, dtype=x.dtype, device=x.device).bernoulli_(0.8)
        return x * keep / 0.8


@pytest.mark.parametrize("random", [nn.Dropout(0.5), DropPath()], ids=["dropout", "stochastic depth"])
def test_random_numbers_inside_the_blocks(random: nn.Module) -> None:
    """The masks are the forward's, so the gradient is that of the forward that was run."""
    blocks = [Residual(nn.LayerNorm(D), nn.Sequential(mlp(D, D), random)) for _ in range(5)]
    m = nn.Sequential(nn.Linear(D, D), *blocks).double()
    x = torch.randn(64, D).double()
    with recorded() as records:
        torch.manual_seed(5)
        found = grads(m, compiled(m), x)
    assert rewritten(records) == [(5, "identity")]
    torch._dynamo.reset()
    torch.manual_seed(5)
    expected = grads(m, torch.compile(m, backend="aot_eager_decomp_partition"), x)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
