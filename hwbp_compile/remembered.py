"""Rates that stay known: in this process, and in a small file beside Inductor's caches.

So another process decides alike, and need not measure. The file is named by all that its rates depend on, and
replaced as a whole. Whatever is wrong with it, a rate is measured anew.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec

import torch

from . import _compat

log = logging.getLogger(__name__)
P = ParamSpec("P")

SWITCH = "HWBP_COMPILE_CALIBRATION"
"""The environment variable that, set to 0, leaves each process to itself."""
_PATIENCE = 10.0
"""Seconds to wait for another process that is measuring."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a measurement gave."""

    value: float
    certain: bool = True
    """False if something else kept the machine busy; then it is kept out of the file."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What every rate of a device depends on, besides its own arguments."""

    device: str
    """Its name."""
    cores: int
    """Those that this process may use."""
    torch: str
    precision: str
    """That products are computed in, where float32 does not say it."""
    method: str
    """A hash of how is measured."""

    @property
    def file(self) -> str:
        """The name of the file for these conditions."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16] + ".json"


class Known:
    """The rates known under some conditions.

    Args:
        conditions: written into the file, for people to read.
        folder: where the file is kept; None for no file.
    """

    def __init__(self, conditions: Conditions, folder: Path | None) -> None:
        self.conditions = conditions
        self.path = None if folder is None else folder / conditions.file
        self.rates = self._read()

    def rate(self, key: str, measure: Callable[[], Found]) -> float:
        """What is known, or else measured, while no other process that shares the file measures."""
        if key not in self.rates:
            with self._alone():
                # What this process has used already holds for it.
                self.rates = self._read() | self.rates
                if key not in self.rates:
                    self._learn(key, measure())
        return self.rates[key]

    def again(self, key: str, measure: Callable[[], Found]) -> tuple[float | None, Found]:
        """What was known, and what is measured now, which is known from here on if it is certain."""
        with self._alone():
            before, found = self.rates.get(key), measure()
            if found.certain or before is None:
                self._learn(key, found)
        return before, found

    def _learn(self, key: str, found: Found) -> None:
        self.rates[key] = found.value
        if found.certain:
            self._write({key: found.value})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process measures; without a file from now on where that cannot be had."""
        lock = None
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = _compat.file_lock(self.path.with_suffix(".lock"), _PATIENCE)
                lock.acquire()
            except (OSError, NotImplementedError):  # a timeout is an OSError
                log.debug("Rates are kept in this process only.", exc_info=True)
                lock = self.path = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _read(self) -> dict[str, float]:
        if self.path is None:
            return {}
        try:
            return {str(k): _checked(v) for k, v in json.loads(self.path.read_text())["rates"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            log.debug("Rates are measured anew: %s cannot be read.", self.path, exc_info=True)
            return {}

    def _write(self, new: dict[str, float]) -> None:
        if self.path is None:
            return
        content = {"conditions": asdict(self.conditions), "rates": self._read() | new}
        try:
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(content, file, indent=1)
                Path(name).replace(self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError:
            log.debug("Rates are kept in this process only.", exc_info=True)
            self.path = None


def _checked(value: Any) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{value} is no rate")
    return float(value)


class Rate(Generic[P]):
    """A function that measures; called, it does so once for the same arguments on the same device.

    One of its arguments is ``device``.
    """

    def __init__(self, measure: Callable[P, Found]) -> None:
        self._measure = measure
        self._signature = inspect.signature(measure)
        self.name = measure.__name__
        functools.update_wrapper(self, measure)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> float:
        """What is known of these arguments, or else measured."""
        known, key = self._place(*args, **kwargs)
        return known.rate(key, lambda: self._measure(*args, **kwargs))

    def again(self, *args: P.args, **kwargs: P.kwargs) -> tuple[float | None, Found]:
        """What was known of these arguments, and what is measured now."""
        known, key = self._place(*args, **kwargs)
        return known.again(key, lambda: self._measure(*args, **kwargs))

    def _place(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Known, str]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {k: _plain(v) for k, v in bound.arguments.items() if k != "device"}
        return known_of(bound.arguments["device"]), json.dumps([self.name, given])


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def known_of(device: torch.device) -> Known:
    """What is known of a device as things are now."""
    name, cores = _hardware(device)
    conditions = Conditions(name, cores, torch.__version__, _compat.precision_of_products(), _method())
    return _known(conditions, _folder())


@functools.cache
def _known(conditions: Conditions, folder: Path | None) -> Known:
    return Known(conditions, folder)


def forget() -> None:
    """Begin anew with what the files hold."""
    _known.cache_clear()


def _folder() -> Path | None:
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        cache = _compat.cache_folder()
    except OSError:
        log.debug("Rates are kept in this process only.", exc_info=True)
        return None
    return None if cache is None else cache / "hwbp_compile"


@functools.cache
def _method() -> str:
    return hashlib.sha256((Path(__file__).parent / "rates.py").read_bytes()).hexdigest()[:16]


@functools.cache
def _hardware(device: torch.device) -> tuple[str, int]:
    """The name of a device, and how many cores there are to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), cores
    if device.type != "cpu":
        return str(device), cores
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}", cores


def _processor() -> str:
    """What Linux calls the model of the processor; elsewhere what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
