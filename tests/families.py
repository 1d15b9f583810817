"""The families of residual models, small: each an ordinary model, and its chains with K by hand.

``model(*inputs)`` is what a user writes. ``model.run`` is the loop over a chain's blocks; the tests replace
it by the reference to get the gradients that the package must produce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from reference import Run, State, Step, identity, module_step, plain_run
from torch import Tensor, nn


@dataclass
class Case:
    """One model with inputs, and what the backend has to find in it."""

    model: Chained
    inputs: tuple[Tensor, ...]
    blocks: list[int]
    """The lengths of its chains, in any order."""
    kinds: list[str] = field(default_factory=list)
    """For each chain, a word that its residual path must be named with."""


class Chained(nn.Module):
    """A model whose chains run through ``self.run``."""

    run: Run

    def __init__(self) -> None:
        super().__init__()
        self.run = plain_run

    def last(self, steps: Sequence[Step], x: Tensor, *extras: Tensor) -> Tensor:
        return self.run(steps, (x,), extras)[-1][0]


class Residual(nn.Module):
    """x + f(norm(x))"""

    def __init__(self, norm: nn.Module, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = norm, f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x))


def mlp(d: int, hidden: int, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, hidden), act(), nn.Linear(hidden, d))


class Plain(Chained):
    """A stem, a chain of one-tensor blocks, a head."""

    def __init__(
        self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module, diagonals: Any = identity
    ) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.steps = [module_step(b, _for(diagonals, b)) for b in blocks]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.steps, self.stem(x)))


def _for(diagonals: Any, block: nn.Module) -> Any:
    return diagonals(block) if getattr(diagonals, "per_block", False) else diagonals


def per_block(f: Callable[..., Any]) -> Callable[..., Any]:
    f.per_block = True  # type: ignore[attr-defined]
    return f


@dataclass(frozen=True)
class Size:
    depth: int = 4
    width: int = 6
    batch: int = 3
    length: int = 4


def residual_mlp(s: Size) -> Case:
    d = s.width
    blocks = [Residual(nn.LayerNorm(d), mlp(d, 2 * d)) for _ in range(s.depth)]
    model = Plain(nn.Linear(5, d), blocks, nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3)))
    return Case(model, (torch.randn(s.batch, 5),), [s.depth], ["identity"])


class Attention(nn.Module):
    def __init__(self, d: int, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(d, 3 * d), nn.Linear(d, d), causal

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


def pre_ln_transformer(s: Size) -> Case:
    d = s.width // 2 * 2
    blocks: list[nn.Module] = []
    for _ in range(s.depth):
        blocks += [Residual(nn.LayerNorm(d), Attention(d)), Residual(nn.LayerNorm(d), mlp(d, 2 * d))]
    model = Plain(nn.Embedding(7, d), blocks, nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 7)))
    return Case(model, (torch.randint(0, 7, (s.batch, s.length)),), [2 * s.depth], ["identity"])


class PostNorm(nn.Module):
    """norm(x + f(x))"""

    def __init__(self, d: int, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(d), f

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.f(x))


@per_block
def alpha_over_sigma(block: PostNorm) -> Any:
    def diagonals(x: Tensor) -> list[list[Tensor | None]]:
        u = x + block.f(x)
        sigma = (u.var(-1, unbiased=False, keepdim=True) + block.norm.eps).sqrt()
        return [[(block.norm.weight / sigma).expand_as(x)]]

    return diagonals


def post_ln_transformer(s: Size) -> Case:
    d = s.width // 2 * 2
    blocks: list[nn.Module] = []
    for _ in range(s.depth):
        blocks += [PostNorm(d, Attention(d, causal=False)), PostNorm(d, mlp(d, 2 * d))]
    model = Plain(nn.Embedding(7, d), blocks, nn.Linear(d, 2), alpha_over_sigma)
    return Case(model, (torch.randint(0, 7, (s.batch, s.length)),), [2 * s.depth], ["normalisation"])


class TokenMixing(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.f = mlp(tokens, 2 * tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x.transpose(1, 2)).transpose(1, 2)


def mixer(s: Size) -> Case:
    d, t = s.width, s.length
    blocks: list[nn.Module] = []
    for _ in range(s.depth):
        blocks += [Residual(nn.LayerNorm(d), TokenMixing(t)), Residual(nn.LayerNorm(d), mlp(d, 2 * d))]
    head = nn.Sequential(nn.LayerNorm(d), MeanOverTokens(), nn.Linear(d, 3))
    return Case(
        Plain(nn.Linear(5, d), blocks, head), (torch.randn(s.batch, t, 5),), [2 * s.depth], ["identity"]
    )


class MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class PreAct(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x))))))"""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, padding=1, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class PoolHead(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.out = nn.Linear(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mean((2, 3)))


def preact_resnet(s: Size) -> Case:
    c = s.width
    model = Plain(nn.Conv2d(2, c, 3, padding=1), [PreAct(c) for _ in range(s.depth)], PoolHead(c))
    return Case(model, (torch.randn(s.batch, 2, 5, 5),), [s.depth], ["identity"])


class PostAct(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), as in torchvision's BasicBlock."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, padding=1, bias=False),
            nn.BatchNorm2d(c),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.f(x))


class Down(nn.Module):
    """A block with a strided convolution as its shortcut."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.Conv2d(b, b, 3, padding=1, bias=False),
            nn.BatchNorm2d(b),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride=2, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.f(x))


@per_block
def relu_mask(block: nn.Module) -> Any:
    def diagonals(x: Tensor) -> list[list[Tensor | None]]:
        return [[(block(x) > 0).to(x.dtype)]]

    return diagonals


class ResNet(Chained):
    """Two stages with a convolutional downsampling shortcut between them."""

    def __init__(self, c: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        self.one = nn.ModuleList([PostAct(c) for _ in range(depth)])
        self.down = Down(c, 2 * c)
        self.two = nn.ModuleList([PostAct(2 * c) for _ in range(depth + 1)])
        self.head = PoolHead(2 * c)
        self.steps = [[module_step(b, relu_mask(b)) for b in stage] for stage in (self.one, self.two)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.steps[0], self.stem(x))
        return self.head(self.last(self.steps[1], self.down(x)))


def resnet(s: Size) -> Case:
    model = ResNet(s.width, s.depth)
    return Case(model, (torch.randn(s.batch, 2, 6, 6),), [s.depth, s.depth + 1], ["mask", "mask"])


class HighwayLayer(nn.Module):
    """t * x + (1 - t) * g(x)"""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gate, self.g = nn.Linear(d, d), mlp(d, d, nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return t * x + (1 - t) * self.g(x)


@per_block
def highway_gate(block: HighwayLayer) -> Any:
    return lambda x: [[torch.sigmoid(block.gate(x))]]


def highway_layers(s: Size) -> Case:
    d = s.width
    model = Plain(nn.Linear(5, d), [HighwayLayer(d) for _ in range(s.depth)], nn.Linear(d, 3), highway_gate)
    return Case(model, (torch.randn(s.batch, 5),), [s.depth], ["gate"])


class Recurrent(Chained):
    """A Python loop over a cell; weights are shared. A loss per step, or only one of the last state.

    From a state of zeros nothing flows back through the first step, so the chain starts at the second.
    """

    def __init__(
        self,
        cell: nn.Module,
        d: int,
        state: int,
        step: Callable[[int], Step],
        every_step: bool,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.cell, self.out, self.state, self.every_step, self.d = cell, nn.Linear(d, 3), state, every_step, d
        self.step_at = step
        self.initial = nn.Parameter(torch.randn(d)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        steps = [self.step_at(t) for t in range(x.shape[0])]
        zero = x.new_zeros(x.shape[1], self.d)
        if self.initial is not None:
            states = self.run(steps, (zero + self.initial,), (x,))[1:]
        else:
            states = self.run(steps[1:], steps[0].block(*(zero.clone() for _ in range(self.state)), x), (x,))
        if self.every_step:
            return self.out(torch.stack([s[0] for s in states]))
        return self.out(sum(states[-1][1:], states[-1][0]))


def gru_loop(s: Size, every_step: bool = True, learned: bool = False) -> Case:
    d = s.width
    cell = nn.GRUCell(3, d)

    def step(t: int) -> Step:
        def diagonals(h: Tensor, x: Tensor) -> list[list[Tensor | None]]:
            gates = F.linear(x[t], cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)
            return [[torch.sigmoid(gates.chunk(3, -1)[1])]]

        return Step(lambda h, x: (cell(x[t], h),), diagonals, tuple(cell.parameters()))

    model = Recurrent(cell, d, 1, step, every_step, learned)
    return Case(model, (torch.randn(s.depth + 1 - learned, s.batch, 3),), [s.depth], ["gate"])


def lstm_loop(s: Size, every_step: bool = True) -> Case:
    d = s.width
    cell = nn.LSTMCell(3, d)

    def step(t: int) -> Step:
        def diagonals(h: Tensor, c: Tensor, x: Tensor) -> list[list[Tensor | None]]:
            gates = F.linear(x[t], cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)
            i, f, g, o = gates.chunk(4, -1)
            i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
            new = f * c + i * g
            return [[None, f * o * (1 - torch.tanh(new) ** 2)], [None, f]]

        return Step(lambda h, c, x: cell(x[t], (h, c)), diagonals, tuple(cell.parameters()))

    model = Recurrent(cell, d, 2, step, every_step)
    return Case(model, (torch.randn(s.depth + 1, s.batch, 3),), [s.depth], ["gate"])


class GatedCell(nn.Module):
    """A minimal gated unit with a normalisation inside."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.f, self.n, self.norm = nn.Linear(3 + d, d), nn.Linear(3 + d, d), nn.LayerNorm(d)

    def gate(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(self.f(torch.cat([x, h], -1)))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        f = self.gate(x, h)
        return (1 - f) * torch.tanh(self.norm(self.n(torch.cat([x, f * h], -1)))) + f * h


def gated_loop(s: Size, every_step: bool = True) -> Case:
    cell = GatedCell(s.width)

    def step(t: int) -> Step:
        return Step(
            lambda h, x: (cell(x[t], h),), lambda h, x: [[cell.gate(x[t], h)]], tuple(cell.parameters())
        )

    model = Recurrent(cell, s.width, 1, step, every_step)
    return Case(model, (torch.randn(s.depth + 1, s.batch, 3),), [s.depth], ["gate"])


class LayerScale(nn.Module):
    """x + gamma * mask * f(norm(x)): layer scale and stochastic depth with a given mask."""

    def __init__(self, d: int, index: int) -> None:
        super().__init__()
        self.norm, self.f, self.scale, self.index = (
            nn.LayerNorm(d),
            mlp(d, 2 * d),
            nn.Parameter(torch.rand(d)),
            index,
        )

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return x + keep[self.index].unsqueeze(-1) * (self.scale * self.f(self.norm(x))) / 0.8


class Scaled(Chained):
    def __init__(self, d: int, depth: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, d), nn.Linear(d, 3)
        self.blocks = nn.ModuleList([LayerScale(d, i) for i in range(depth)])
        self.steps = [module_step(b, identity) for b in self.blocks]

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.head(self.last(self.steps, self.stem(x), keep))


def layer_scale(s: Size) -> Case:
    keep = (torch.rand(s.depth, s.batch) < 0.8).to(torch.get_default_dtype())
    return Case(Scaled(s.width, s.depth), (torch.randn(s.batch, 5), keep), [s.depth], ["identity"])


class Branches(nn.Module):
    """x + f(norm(x)) + g(norm'(x)): attention and MLP side by side, as some language models have them."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(d), Attention(d))
        self.mlp = nn.Sequential(nn.LayerNorm(d), mlp(d, 2 * d))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x) + self.mlp(x)


def parallel_branches(s: Size) -> Case:
    d = s.width // 2 * 2
    model = Plain(nn.Linear(5, d), [Branches(d) for _ in range(s.depth)], nn.Linear(d, 3))
    return Case(model, (torch.randn(s.batch, s.length, 5),), [s.depth], ["identity"])


class AuxiliaryHeads(Chained):
    """A head on the states after some of the blocks, beside the last."""

    def __init__(self, d: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(5, d)
        self.blocks = nn.ModuleList([Residual(nn.LayerNorm(d), mlp(d, d)) for _ in range(depth)])
        self.at = sorted({depth // 2, depth})
        self.heads = nn.ModuleList(
            [nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, 3)) for _ in self.at]
        )
        self.steps = [module_step(b, identity) for b in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        states = self.run(self.steps, (self.stem(x),), ())
        return torch.stack([head(states[i][0]) for head, i in zip(self.heads, self.at, strict=True)])


def auxiliary_heads(s: Size) -> Case:
    return Case(AuxiliaryHeads(s.width, s.depth), (torch.randn(s.batch, 5),), [s.depth], ["identity"])


class CrossAttention(nn.Module):
    """x + attention of x to a memory, then an MLP: one decoder block reads the encoder's output."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.q, self.kv, self.out = (
            nn.LayerNorm(d),
            nn.Linear(d, d),
            nn.Linear(d, 2 * d),
            nn.Linear(d, d),
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        k, v = self.kv(memory).chunk(2, -1)
        q = self.q(self.norm(x))
        y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.out(y)


class EncoderDecoder(Chained):
    def __init__(self, d: int, depth: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(7, d), nn.Embedding(7, d)
        self.encoder = nn.ModuleList([Residual(nn.LayerNorm(d), mlp(d, 2 * d)) for _ in range(depth)])
        self.decoder = nn.ModuleList(
            [
                CrossAttention(d) if i % 2 == 0 else Residual(nn.LayerNorm(d), mlp(d, 2 * d))
                for i in range(2 * depth)
            ]
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 7)
        self.encoder_steps = [module_step(b, identity) for b in self.encoder]
        self.decoder_steps = [
            module_step(b, identity)
            if isinstance(b, CrossAttention)
            else Step(lambda x, m, b=b: (b(x),), identity, tuple(b.parameters()))
            for b in self.decoder
        ]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.norm(self.last(self.encoder_steps, self.source(source)))
        return self.head(self.last(self.decoder_steps, self.target(target), memory))


def encoder_decoder(s: Size) -> Case:
    d = s.width
    tokens = tuple(torch.randint(0, 7, (s.batch, s.length + i)) for i in range(2))
    return Case(EncoderDecoder(d, s.depth), tokens, [s.depth, 2 * s.depth], ["identity", "identity"])


class TwoTowers(Chained):
    """Two chains that meet in a product or a sum: a chain each."""

    def __init__(self, d: int, depth: int, product: bool) -> None:
        super().__init__()
        self.product, self.head = product, nn.Linear(d, 3)
        self.left = nn.ModuleList([Residual(nn.LayerNorm(d), mlp(d, d)) for _ in range(depth)])
        self.right = nn.ModuleList([HighwayLayer(d) for _ in range(depth + 1)])
        self.l_steps = [module_step(b, identity) for b in self.left]
        self.r_steps = [module_step(b, highway_gate(b)) for b in self.right]
        self.a, self.b = nn.Linear(5, d), nn.Linear(5, d)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left, right = self.last(self.l_steps, self.a(x)), self.last(self.r_steps, self.b(y))
        return self.head(left * right if self.product else left + right)


def two_towers(s: Size, product: bool = True) -> Case:
    inputs = tuple(torch.randn(s.batch, 5) for _ in range(2))
    model = TwoTowers(s.width, s.depth, product)
    return Case(model, inputs, [s.depth, s.depth + 1], ["identity", "gate"])


FAMILIES: dict[str, Callable[[Size], Case]] = {
    "residual_mlp": residual_mlp,
    "preact_resnet": preact_resnet,
    "resnet": resnet,
    "pre_ln_transformer": pre_ln_transformer,
    "post_ln_transformer": post_ln_transformer,
    "mixer": mixer,
    "highway_layers": highway_layers,
    "gru_loop": gru_loop,
    "gru_last_step": lambda s: gru_loop(s, every_step=False),
    "gru_learned_start": lambda s: gru_loop(s, learned=True),
    "lstm_loop": lstm_loop,
    "lstm_last_step": lambda s: lstm_loop(s, every_step=False),
    "gated_loop": gated_loop,
    "gated_last_step": lambda s: gated_loop(s, every_step=False),
    "layer_scale": layer_scale,
    "parallel_branches": parallel_branches,
    "auxiliary_heads": auxiliary_heads,
    "encoder_decoder": encoder_decoder,
    "two_towers": two_towers,
    "two_towers_sum": lambda s: two_towers(s, product=False),
}
__all__ = ["FAMILIES", "Case", "Size", "State"]
