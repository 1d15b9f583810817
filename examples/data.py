"""Real data that is already on the machine: Python's reference manual, scikit-learn's handwritten digits.

Batches are numbered by step, so that every training run sees the same ones in the same order.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Inputs, and the class that is right for each of them."""


@dataclass(frozen=True)
class Data:
    """Batches of a classification task: ``train(step)`` for training, ``validation`` for judging."""

    train: Callable[[int], Batch]
    validation: tuple[Batch, ...]
    classes: int
    description: str


def characters(batch: int, length: int) -> Data:
    """Predict each next character of English prose; the last tenth of the text is kept for validation."""
    text, source = _text()
    vocabulary = sorted(set(text))
    number = {character: i for i, character in enumerate(vocabulary)}
    ids = torch.tensor([number[character] for character in text])
    split = len(ids) * 9 // 10
    held_out = ids[split:]
    windows = held_out[: (len(held_out) - 1) // length * length].view(-1, length)[: 16 * batch]
    following = held_out[1 : 1 + windows.numel()].view(-1, length)

    def train(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(split - length, (batch, 1), generator=generator)
        positions = starts + torch.arange(length)
        return ids[positions], ids[positions + 1]

    return Data(
        train,
        tuple(zip(windows.split(batch), following.split(batch), strict=True)),
        len(vocabulary),
        f"{len(text):,} characters of {source}, {len(vocabulary)} different ones",
    )


def digits(batch: int) -> Data:
    """Recognise 8 x 8 images of handwritten digits; a fifth of them is kept for validation."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target)
    what = f"{len(images):,} images of handwritten digits from scikit-learn"
    return shuffled(images, labels, batch, len(images) // 5, 10, what)


def shuffled(
    inputs: Tensor, targets: Tensor, batch: int, held_out: int, classes: int, description: str
) -> Data:
    """Rows in random batches; so many of them are held out for validation."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    validation, kept = order.split([held_out, len(order) - held_out])

    def train(step: int) -> Batch:
        rows = kept[torch.randint(len(kept), (batch,), generator=torch.Generator().manual_seed(step))]
        return inputs[rows], targets[rows]

    held = tuple((inputs[rows], targets[rows]) for rows in validation.split(batch))
    return Data(train, held, classes, description)


def pixels(batch: int, size: int) -> Data:
    """The same digits, enlarged to ``size`` x ``size`` and read one pixel after the other, row by row."""
    found = digits(batch)

    def read(data: Batch) -> Batch:
        images, labels = data
        large = F.interpolate(images, (size, size), mode="bilinear")
        return large.flatten(1).unsqueeze(-1), labels

    return Data(
        lambda step: read(found.train(step)),
        tuple(map(read, found.validation)),
        found.classes,
        f"{found.description}, {size * size} pixels one by one",
    )


def _text() -> tuple[str, str]:
    """English prose that comes with Python, and what it is."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return _docstrings(), "docstrings of Python's standard library"
    return "\n\n".join(topics.values()), "Python's language reference"


def _docstrings() -> str:
    """All docstrings of the standard library's modules, classes and functions."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        found += [doc for node in nodes if (doc := ast.get_docstring(node)) and doc.isascii()]
    return "\n\n".join(found)
