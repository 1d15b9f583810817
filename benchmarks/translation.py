"""Numbers in English words to German ones, character by character, by a pre-LN encoder and decoder.

The order of tens and units differs between the languages, and words are joined in one and not in the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import Data, shuffled
from num2words import num2words
from torch import Tensor, nn

PADDING, START, END = 0, 1, 2
IGNORED = -100
"""The class of what cross entropy leaves out."""


def number_words(batch: int, largest: int = 9999) -> Data:
    """Inputs are a source and, behind it, the target so far; :func:`translator` knows where that begins."""
    english, german = ([num2words(n, lang=lang) for n in range(largest + 1)] for lang in ("en", "de"))
    letters = sorted(set("".join(english + german)))
    number = {letter: END + 1 + i for i, letter in enumerate(letters)}
    width = max(map(len, german)) + 1

    def rows(texts: list[str], before: list[int], after: list[int], length: int, padding: int) -> Tensor:
        ids = [before + [number[letter] for letter in text] + after for text in texts]
        return torch.tensor([each + [padding] * (length - len(each)) for each in ids])

    sources = rows(english, [], [], max(map(len, english)), PADDING)
    so_far, wanted = rows(german, [START], [], width, PADDING), rows(german, [], [END], width, IGNORED)
    inputs = torch.cat([sources, so_far], 1)
    what = f"the numbers to {largest:,} in English and German words"
    return shuffled(inputs, wanted, batch, len(inputs) // 20, END + 1 + len(letters), what)


class Attention(nn.Module):
    """Multi-head attention of one sequence to another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, to: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(to).view(batch, to.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Sequential):
    """The other block of a layer."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderLayer(nn.Module):
    """Two residual blocks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, mask)
        return x + self.mlp(self.norms[1](x))


class DecoderLayer(nn.Module):
    """Three residual blocks; the second reads what the encoder made of the source."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention, self.across, self.mlp = Attention(width, heads), Attention(width, heads), MLP(width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, causal=True)
        x = x + self.across(self.norms[1](x), source, mask)
        return x + self.mlp(self.norms[2](x))


class Translator(nn.Module):
    """Ids ``[batch, source_length + length]`` to logits of the target ``[batch, length, vocabulary]``."""

    def __init__(self, vocabulary: int, source_length: int, length: int, layers: int, width: int) -> None:
        super().__init__()
        self.source_length = source_length
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(source_length + length, width))
        self.encoder = nn.ModuleList(EncoderLayer(width, 4) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, 4) for _ in range(layers))
        self.between, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        source, x = (self.characters(ids) + self.positions).split(
            [self.source_length, ids.shape[1] - self.source_length], 1
        )
        mask = ids[:, None, None, : self.source_length] != PADDING
        for encoder in self.encoder:
            source = encoder(source, mask)
        source = self.between(source)
        for decoder in self.decoder:
            x = decoder(x, source, mask)
        return self.head(self.norm(x))


def translator(data: Data, layers: int = 6, width: int = 32) -> Translator:
    """For the numbers' words."""
    inputs, wanted = data.train(0)
    length = wanted.shape[1]
    return Translator(data.classes, inputs.shape[1] - length, length, layers, width)
