"""Families of residual models for benchmarks, each with an input and a loss's direction."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """A model of the grid: ``depth`` counts layers, of which a transformer's hold two blocks each.

    ``sequence`` is the number of tokens or patches, of an image the number of pixels along a side.
    """

    family: str
    depth: int
    width: int
    batch: int
    sequence: int = 1

    def __str__(self) -> str:
        return f"{self.family} L {self.depth} d {self.width} B {self.batch} T {self.sequence}"


class ResidualMLP(nn.Module):
    """``x + W2 gelu(W1 norm(x))``, the hidden layer twice as wide."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Causal self-attention, heads of 32 channels."""

    def __init__(self, d: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = max(d // 32, 1), causal
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward(d: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))


class PreNorm(nn.Module):
    """``x + f(norm(x))``"""

    def __init__(self, d: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(d), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class PostNorm(PreNorm):
    """``norm(x + f(x))``"""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.inner(x))


class Transposed(nn.Sequential):
    """A module that mixes tokens instead of channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvBlock(nn.Module):
    """``relu(x + bn(conv(relu(bn(conv(x))))))``; between stages the shortcut is a convolution."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        same = inputs == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


def residual_mlp(row: Row) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(ResidualMLP(row.width) for _ in range(row.depth))), _tokens(row)[:, 0]


def pre_norm(row: Row) -> tuple[nn.Module, Tensor]:
    d = row.width
    blocks = [PreNorm(d, f(d)) for _ in range(row.depth) for f in (Attention, feed_forward)]
    return nn.Sequential(*blocks, nn.LayerNorm(d)), _tokens(row)


def post_norm(row: Row) -> tuple[nn.Module, Tensor]:
    d = row.width
    inner = [f for _ in range(row.depth) for f in (Attention(d, causal=False), feed_forward(d))]
    return nn.Sequential(*(PostNorm(d, f) for f in inner)), _tokens(row)


def mixer(row: Row) -> tuple[nn.Module, Tensor]:
    d, tokens = row.width, row.sequence
    inner = [f for _ in range(row.depth) for f in (Transposed(feed_forward(tokens)), feed_forward(d))]
    return nn.Sequential(*(PreNorm(d, f) for f in inner), nn.LayerNorm(d)), _tokens(row)


def resnet(row: Row) -> tuple[nn.Module, Tensor]:
    """Three stages, two convolutions a block, as in the ResNets for CIFAR: ResNet-110 has depth 110."""
    d, each = row.width, (row.depth - 2) // 6
    blocks: list[nn.Module] = [nn.Conv2d(3, d, 3, 1, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU()]
    for stage in range(3):
        width = d << stage
        first = ConvBlock(width // 2, width, 2) if stage else ConvBlock(d, d)
        blocks += [first, *(ConvBlock(width, width) for _ in range(each - 1))]
    blocks += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d << 2, 10)]
    return nn.Sequential(*blocks), torch.randn(row.batch, 3, row.sequence, row.sequence)


def _tokens(row: Row) -> Tensor:
    return torch.randn(row.batch, row.sequence, row.width)


FAMILIES: dict[str, Callable[[Row], tuple[nn.Module, Tensor]]] = {
    "mlp": residual_mlp,
    "pre-norm": pre_norm,
    "post-norm": post_norm,
    "mixer": mixer,
    "resnet": resnet,
}


def add_row(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """Have a script take a row of the user's own: ``--row mlp 32 64 4 1``."""
    names = ("FAMILY", "DEPTH", "WIDTH", "BATCH", "SEQUENCE")
    parser.add_argument("--row", nargs=5, metavar=names, **settings)


def row_of(parser: argparse.ArgumentParser, values: list[str]) -> Row:
    """The row that was asked for so."""
    family, *sizes = values
    if family not in FAMILIES:
        parser.error(f"there is no family {family!r}; there are {', '.join(FAMILIES)}")
    if not all(size.isdecimal() and int(size) for size in sizes):
        parser.error(f"the sizes of a row are positive integers, not {' '.join(sizes)}")
    return Row(family, *map(int, sizes))
