"""Where a rewrite could go wrong: the gradient is right, or the chain is left exact with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import recorded, rewritten
from families import Attention, PreAct, Residual, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D = 6
LENGTH = 6


def chain(depth: int = LENGTH, d: int = D) -> list[nn.Module]:
    return [Residual(nn.LayerNorm(d), mlp(d, 2 * d)) for _ in range(depth)]


def model(depth: int = LENGTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, D), *chain(depth), nn.Linear(D, 3)).double()


def compiled(m: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    options = {"codegen": "eager", "iterations": LENGTH} | options
    return torch.compile(m, backend="highway", options=options, dynamic=dynamic)


def grads(m: nn.Module, forward: Callable[..., Any], *inputs: Tensor, repeat: int = 1) -> list[Tensor]:
    m.zero_grad()
    for _ in range(repeat):
        forward(*inputs).square().sum().backward()
    return [p.grad.clone() for p in m.parameters() if p.grad is not None]


def check_exact(
    m: nn.Module, *inputs: Tensor, chains: int | None = 1, tolerance: float = 1e-10, **kwargs: Any
) -> None:
    """With as many iterations as blocks the gradients are exact, and so many chains were rewritten."""
    expected = grads(m, m, *inputs)
    with recorded() as records:
        found = grads(m, compiled(m, **kwargs), *inputs)
    if chains is not None:
        assert len(rewritten(records)) == chains, [o.reason for r in records for o in r.outcomes]
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)


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


def test_model_without_residuals() -> None:
    m = nn.Sequential(*[nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(6)]).double()
    check_exact(m, torch.randn(3, D).double(), chains=0, iterations=0)


def test_frozen_early_blocks() -> None:
    m = model(9)
    m[:4].requires_grad_(False)
    check_exact(m, torch.randn(5, 4).double())


def test_frozen_blocks_in_the_middle() -> None:
    m = model()
    m[3].requires_grad_(False)
    check_exact(m, torch.randn(5, 4).double())


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
    loss = compiled(m, codegen=codegen)(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for p, e in zip(m.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


@pytest.mark.parametrize("dynamic", [None, True])
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


@pytest.mark.parametrize("shape", [(2, 5), (3, 5), (3, 7)])
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


def test_graph_break_leaves_short_chains_exact() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(*chain(5)), nn.Sequential(*chain(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    check_exact(Broken().double(), torch.randn(5, D).double(), chains=1)


class Clip(torch.autograd.Function):
    """Clips the gradient: not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.05, 0.05)


class Square(torch.autograd.Function):
    """Squares the gradient: every operator is known, their use is not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * g


class AddOne(torch.autograd.Function):
    """Adds a constant to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + 1


class Floor(torch.autograd.Function):
    """Quantises the gradient by a division that rounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.div(g, 0.25, rounding_mode="floor") * 0.25


class Quantise(torch.autograd.Function):
    """Quantises the gradient by a cast to integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (g * 4).to(torch.int32).to(g.dtype) / 4


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Clip, "clamp"),
        (Square, "multiplies two gradients"),
        (AddOne, "constant"),
        (Floor, "rounds"),
        (Quantise, "floating-point"),
    ],
)
def test_blocks_that_are_not_linear(function: Any, reason: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + function.apply(self.f(x))

    m = nn.Sequential(nn.Linear(D, D), *chain(4), Odd(), *chain(4)).double()
    x = torch.randn(5, D).double()
    expected = grads(m, m, x)
    with recorded() as records:
        found = grads(m, compiled(m), x)
    assert [n for n, _ in rewritten(records)] == [4, 4]
    assert any(reason in o.reason for r in records for o in r.outcomes)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_backward_that_depends_on_the_memory_layout_is_left_exact() -> None:
    class Flip(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g.contiguous().as_strided(g.shape, g.stride())

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + Flip.apply(self.f(x))

    m = nn.Sequential(nn.Linear(D, D), *[Odd() for _ in range(5)]).double()
    check_exact(m, torch.randn(5, D).double(), chains=0, iterations=0)


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


def test_failure_while_inserting_leaves_everything_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    import hwbp_compile.passes.pipeline as pipeline

    original = pipeline.insert_schedule

    def fail_afterwards(*args: Any) -> None:
        original(*args)
        raise KeyError("a bug")

    monkeypatch.setattr(pipeline, "insert_schedule", fail_afterwards)
    m, x = model(), torch.randn(5, 4).double()
    expected = grads(m, m, x)
    with recorded() as records:
        found = grads(m, compiled(m, iterations=0), x)
    assert "internal error" in records[0].outcomes[0].reason
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


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


def test_failure_inside_a_pass_leaves_the_chain_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    import hwbp_compile.passes.pipeline as pipeline

    def fail(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(pipeline, "trace_schedule", fail)
    m, x = model(), torch.randn(5, 4).double()
    expected = grads(m, m, x)
    with recorded() as records:
        found = grads(m, compiled(m, iterations=0), x)
    assert "internal error" in records[0].outcomes[0].reason
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_operator_that_cannot_be_batched_is_refused_by_name() -> None:
    @torch.library.custom_op("hwbp_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return twice(g)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + Twice.apply(self.f(x))

    from hwbp_compile.passes.linear_ops import FIRST, LINEARITY, register_linear

    m, x = nn.Sequential(*[Block() for _ in range(5)]).double(), torch.randn(3, D).double()
    expected = grads(m, m, x)
    for known in (False, True):
        torch._dynamo.reset()
        if known:
            register_linear("hwbp_test::twice", FIRST)
        with recorded() as records:
            found = grads(m, compiled(m, iterations=1), x)
        assert rewritten(records) == []
        assert all("hwbp_test.twice" in o.reason for r in records for o in r.outcomes)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)
    del LINEARITY["hwbp_test::twice"]


def global_state() -> dict[str, Any]:
    return {
        "inductor": torch._inductor.config.get_config_copy(),
        "dynamo": torch._dynamo.config.get_config_copy(),
        "functorch": torch._functorch.config.get_config_copy(),
        "vmap": torch._C._functorch._is_vmap_fallback_enabled(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "environment": dict(os.environ),
    }


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_no_global_setting_is_left_changed(codegen: str) -> None:
    import torch._inductor

    before = global_state()
    m, x = model(), torch.randn(5, 4).double()
    grads(m, compiled(m, codegen=codegen), x)
    after = global_state()
    for name, value in before.items():
        assert after[name] == value, name


def test_the_users_own_pass_still_runs() -> None:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    calls: list[str] = []

    class Mine(CustomGraphPass):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, graph: torch.fx.Graph) -> None:
            calls.append(self.name)

        def uuid(self) -> str:
            return self.name

    m, x = model(4), torch.randn(5, 4).double()
    for codegen in ("eager", "inductor"):
        torch._dynamo.reset()
        calls.clear()
        with recorded() as records:
            grads(m, compiled(m, codegen=codegen, joint_custom_pre_pass=Mine(f"option {codegen}")), x)
        assert calls == [f"option {codegen}"]
        assert len(rewritten(records)) == 1
        torch._dynamo.reset()
        calls.clear()
        with (
            torch._inductor.config.patch(joint_custom_pre_pass=Mine(f"global {codegen}")),
            recorded() as records,
        ):
            grads(m, compiled(m, codegen=codegen), x)
        assert calls == [f"global {codegen}"]
        assert len(rewritten(records)) == 1


def test_exact_and_never_apply_no_approximation() -> None:
    m, x = model(), torch.randn(5, 4).double()
    expected = grads(m, m, x)
    for options in (
        {"iterations": "exact"},
        {"apply": "never", "iterations": 0},
        {"min_blocks": 7, "iterations": 0},
    ):
        torch._dynamo.reset()
        for f, e in zip(grads(m, compiled(m, **options), x), expected, strict=True):
            torch.testing.assert_close(f, e)


SCRIPT = """
import sys, torch
from torch import nn
from torch._dynamo.utils import counters
k = sys.argv[1]
torch.manual_seed(0)
class R(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    def forward(self, x):
        return x + self.f(x)
m = nn.Sequential(*[R() for _ in range(5)])
f = torch.compile(m, backend="highway", options={"iterations": k if k == "exact" else int(k)})
f(torch.randn(3, 6)).square().sum().backward()
print(sum(p.grad.abs().sum().double().item() for p in m.parameters()))
print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_caches_stay_right_when_options_change(tmp_path: Path) -> None:
    """One process after the other with a shared cache: the same options hit it, others do not."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(k: str) -> tuple[float, int]:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        out = subprocess.run(
            [sys.executable, str(script), k], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        return float(out[-2]), int(out[-1])

    values = {k: run(k)[0] for k in ("0", "2", "exact")}
    assert len(set(values.values())) == 3
    for k, value in values.items():
        again, hits = run(k)
        assert again == value
        assert hits > 0


def test_identity_for_the_caches_changes_with_options_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    import hwbp_compile.backend as backend
    from hwbp_compile import Options

    ids = [backend.HighwayPass(Options(iterations=k)).uuid() for k in (1, 2)]
    ids += [backend.HighwayPass(Options(iterations=1, gamma=0.5)).uuid()]
    monkeypatch.setattr(backend, "_source_hash", lambda: "other")
    ids += [backend.HighwayPass(Options(iterations=1)).uuid()]
    assert len(set(ids)) == len(ids)
