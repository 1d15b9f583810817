"""Cosines and errors of gradients against the exact ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError

NOISE = 1e-6
"""The share of the whole gradient's norm below which a parameter's is rounding, and has no direction."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """One gradient against the exact one."""

    cosine: float
    relative_error: float
    """``|g - exact| / |exact|``."""


def norm(tensors: Sequence[Tensor]) -> float:
    """Of all as one vector, in double precision."""
    return math.hypot(*(float(torch.linalg.vector_norm(x.double())) for x in tensors))


def closeness(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Closeness:
    """Of all as one vector; NaN where one of the two is zero."""
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(found, exact, strict=True))
    norms = norm(found) * norm(exact)
    error = norm([a.double() - b.double() for a, b in zip(found, exact, strict=True)])
    return Closeness(dot / norms if norms else math.nan, error / norm(exact) if norms else math.nan)


def with_direction(exact: Mapping[str, Tensor]) -> list[str]:
    """The parameters whose gradient is more than rounding."""
    norms = {name: norm([g]) for name, g in exact.items()}
    whole = math.hypot(*norms.values())
    return [name for name in exact if norms[name] > NOISE * whole]


def check_finite(exact: Mapping[str, Tensor], caller: str) -> None:
    """Refuse gradients that nothing can be compared with.

    Raises:
        ModelError: one has a NaN or an Inf.
    """
    for name, gradient in exact.items():
        if not bool(gradient.isfinite().all()):
            raise ModelError(
                f"The exact gradient of {name} is not finite; {caller} needs a batch and a loss without "
                f"NaN and Inf."
            )


def mean_cosine(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Over the parameters that have a direction; zero counts as no likeness at all."""
    each = [closeness([found[n]], [exact[n]]).cosine for n in with_direction(exact)]
    return sum(0.0 if math.isnan(c) else c for c in each) / len(each) if each else math.nan
