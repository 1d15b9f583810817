"""The rows of the paper's Table 2, small enough for two cores, on data that is on the machine already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from char_gpt import CharGPT
from data import Batch, Data, characters, digits, pixels
from digits_resnet import DigitsResNet
from recurrent import CharGRU, PixelGRU
from translation import number_words, translator


@dataclass(frozen=True)
class PaperTask:
    """A model, data, and how long and how fast it learns."""

    make: Callable[[Data], nn.Module]
    data: Data
    steps: int
    learning_rate: float

    def optimizer(
        self, model: nn.Module
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """What every run trains with, and its learning rate."""
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=self.steps)
        return optimizer, schedule


class AfterAdd(nn.Module):
    """``relu(x + f(x))``, as in the first residual networks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.f(x))


class AfterAddResNet(nn.Module):
    """Two stages of nine blocks; as many as in a third of ResNet-56 each."""

    def __init__(self, blocks: int = 9, channels: tuple[int, int] = (8, 16)) -> None:
        super().__init__()
        a, b = channels
        self.body = nn.Sequential(
            nn.Conv2d(1, a, 3, padding=1),
            *(AfterAdd(a) for _ in range(blocks)),
            nn.Conv2d(a, b, 3, stride=2, padding=1),
            *(AfterAdd(b) for _ in range(blocks)),
        )
        self.head = nn.Linear(b, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


class PostNormLayer(nn.Module):
    """A layer of a post-LN transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.mlp(x))


class RowsClassifier(nn.Module):
    """A post-LN encoder over the rows of an image."""

    def __init__(self, classes: int, layers: int = 8, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.positions = nn.Parameter(0.02 * torch.randn(8, width))
        self.layers = nn.Sequential(*(PostNormLayer(width, 4) for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.enter(images.squeeze(1)) + self.positions)
        return self.head(x.mean(1))


class CharLSTM(nn.Module):
    """Character ids to logits of the next one."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.lstm(self.characters(characters))[0])


class DeepCharGRU(nn.Module):
    """Three GRUs with a residual connection around each."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(3))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(x)


def tasks() -> dict[str, Callable[[], PaperTask]]:
    """By name; each is made when it is asked for."""

    def text(model: Callable[[int], nn.Module], length: int, learning_rate: float) -> PaperTask:
        return PaperTask(lambda d: model(d.classes), characters(8, length), 300, learning_rate)

    def images(model: Callable[[], nn.Module], steps: int, learning_rate: float) -> PaperTask:
        return PaperTask(lambda _: model(), digits(32), steps, learning_rate)

    return {
        "ResNet, pre-activation": lambda: images(lambda: DigitsResNet(5, (8, 16)), 150, 4e-3),
        "ResNet, ReLU after add": lambda: images(AfterAddResNet, 150, 4e-3),
        "GPT, pre-LN": lambda: text(lambda n: CharGPT(n, 48, 8, width=32), 48, 4e-3),
        "encoder, post-LN": lambda: images(lambda: RowsClassifier(10), 300, 2e-3),
        "LSTM, characters": lambda: text(CharLSTM, 64, 1e-2),
        "GRU, characters": lambda: text(lambda n: CharGRU(n, 64), 64, 1e-2),
        "3 x GRU, characters": lambda: text(DeepCharGRU, 64, 1e-2),
        "GRU, pixels": lambda: PaperTask(lambda d: PixelGRU(d.classes, 64, 48), pixels(32, 8), 600, 1e-2),
        "translation": lambda: PaperTask(translator, number_words(16), 300, 4e-3),
    }


__all__ = ["Batch", "Data", "PaperTask", "tasks"]
