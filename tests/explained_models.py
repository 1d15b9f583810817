"""The models that ``explain`` and its drawings are tested with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORT = {"iterations": 2}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Mlp(nn.Module):
    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.h = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.h:
            x = block(x)
        return self.head(x)


class Layer(nn.Module):
    """A transformer layer: two residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, layers: int = 2, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class ConvBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1, *, project: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(outside)
        self.short = (
            nn.Conv2d(inside, outside, 1, stride, bias=False) if project or stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.bn(self.conv(x)))


def resnet(stride: int) -> nn.Module:
    """Two stages of four blocks, with a block between them whose shortcut is a convolution."""
    after = 4 * stride
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1),
        *(ConvBlock(4, 4) for _ in range(4)),
        ConvBlock(4, after, stride, project=True),
        *(ConvBlock(after, after) for _ in range(4)),
    )


class Inlined(nn.Module):
    """Residual code in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.up = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.down = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x


class Breaking(Mlp):
    """A graph break after the second block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.h[1](self.h[0](self.embed(x)))
        torch._dynamo.graph_break()
        for block in self.h[2:]:
            x = block(x)
        return self.head(x)


class BreakingInLoop(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8)
