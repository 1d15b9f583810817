"""Two GRUs in plain PyTorch: one predicts every next character, one reads images pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CharGRU(nn.Module):
    """Character ids ``[batch, length]`` to logits of the next character ``[batch, length, vocabulary]``."""

    def __init__(self, vocabulary: int, width: int = 128) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        states, _ = self.gru(self.characters(characters))
        return self.head(states)


class PixelGRU(nn.Module):
    """Pixels ``[batch, length, 1]``, one after the other, to logits of the class ``[batch, classes]``.

    Args:
        length: number of pixels. At first the units forget over times from one step up to all of them
            (Tallec and Ollivier, 2018), else nothing of the first pixels is left at the end.
    """

    def __init__(self, classes: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, classes)
        with torch.no_grad():
            self.gru.bias_hh_l0.zero_()
            self.gru.bias_ih_l0.zero_()
            self.gru.bias_ih_l0[width : 2 * width] = torch.empty(width).uniform_(1, length - 1).log()

    def forward(self, pixels: Tensor) -> Tensor:
        states, _ = self.gru(pixels)
        return self.head(states[:, -1])
