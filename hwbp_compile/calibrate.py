"""Measure again what ``apply="auto"`` goes by: the rates in use, and those that many models need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .rates import bandwidth, operator_seconds, product_rate
from .remembered import Rate, known_of
from .report.table import amount, table

_RATES: dict[str, tuple[Rate[...], str]] = {
    "operator_seconds": (operator_seconds, "s"),
    "bandwidth": (bandwidth, "B/s"),
    "product_rate": (product_rate, "FLOP/s"),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A rate, measured again."""

    rate: str
    arguments: dict[str, Any]
    before: float | None
    """None if it was not known."""
    value: float
    certain: bool
    """False if something else kept the machine busy; then it is not kept."""
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """The record as numbers, strings and dictionaries."""
        return asdict(self)


def calibrate(device: torch.device) -> list[Measured]:
    """Measure what is known of a device, with the threads in force, and what many models need."""
    threads = torch.get_num_threads()
    found = []
    for name, arguments in (*_common(threads), *_in_use(device, threads)):
        rate, unit = _RATES[name]
        given = {k: getattr(torch, v) if k == "dtype" else v for k, v in arguments.items()}
        before, now = rate.again(device=device, **given)
        found.append(Measured(name, arguments, before, now.value, now.certain, unit))
    return found


def _common(threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "operator_seconds", {"threads": threads}
    for exponent in range(12, 26):
        for fresh in (False, True):
            yield "bandwidth", {"threads": threads, "size": 1 << exponent, "fresh": fresh}
    for exponent in range(4, 11):
        side = 1 << exponent
        sizes = {"rows": side, "inner": side, "columns": side}
        yield "product_rate", sizes | {"dtype": "float32", "threads": threads, "batch": 1, "turns": 1}


def _in_use(device: torch.device, threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is known already, and not common."""
    common = [json.dumps(each) for each in _common(threads)]
    for key in list(known_of(device).rates):
        name, arguments = json.loads(key)
        if arguments["threads"] == threads and json.dumps([name, arguments]) not in common:
            yield name, arguments


def to_text(measured: list[Measured]) -> str:
    """A table."""
    rows = [
        [
            m.rate,
            ", ".join(f"{k} {v}" for k, v in m.arguments.items() if k != "threads"),
            _shown(m.value, m.unit),
            "" if m.before is None else _shown(m.before, m.unit),
            "" if m.certain else "disturbed: not kept",
        ]
        for m in measured
    ]
    return table(["rate", "of", "now", "before", ""], rows, words=(0, 1, 4))


def _shown(value: float, unit: str) -> str:
    return f"{value * 1e6:.3g} us" if unit == "s" else amount(value) + unit
