"""A pre-activation ResNet with batch normalisation for 8 x 8 images, in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block that keeps its input's shape: ``x + conv(relu(bn(conv(relu(bn(x))))))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class DigitsResNet(nn.Module):
    """Images ``[batch, 1, 8, 8]`` to logits of ten digits; each stage halves the image and ends a chain."""

    def __init__(self, blocks_per_stage: int = 6, channels: tuple[int, ...] = (16, 32)) -> None:
        super().__init__()
        widths = (1, *channels)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=1 if before == 1 else 2, padding=1, bias=False),
                    *(Block(after) for _ in range(blocks_per_stage)),
                )
                for before, after in pairwise(widths)
            )
        )
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stages(images)))
        return self.head(x.mean((2, 3)))
