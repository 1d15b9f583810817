"""k as a schedule over the training steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from ..errors import OptionError
from ..options import Options
from .settings import NAMES, module_of, set_iterations

Setting = int | Literal["exact", "auto"] | Mapping[str, Any]
"""k, or options by name: ``iterations``, ``gamma``, ``group_size``, ``exact_tail``."""


class IterationsSchedule:
    """Changes a model's settings as training goes on; used like a learning-rate scheduler.

        schedule = IterationsSchedule(model, {0: 1, 2000: 4, 9000: "exact"})
        for x, y in batches:
            ...
            optimizer.step()
            schedule.step()

    The settings of step 0 hold at once. In each phase they are those that the model was compiled with, except
    for what the phase gives. For what a change costs see :func:`.settings.set_iterations`.

    Args:
        model: what was compiled, or what ``torch.compile`` made of it.
        phases: settings by the step at which they begin; or a function from the step (0, 1, ...) to settings,
            which is called at every step.

    Raises:
        OptionError: a setting is wrong; of phases all are checked before training.
        TypeError: ``model`` is no module.
        ValueError: ``model`` has no parameters or is compiled with another backend, or there is no phase, or
            one begins at a step that is no integer >= 0.
    """

    def __init__(self, model: nn.Module, phases: Mapping[int, Setting] | Callable[[int], Setting]) -> None:
        self._model = module_of(model, "IterationsSchedule")
        self._phases = phases if callable(phases) else None
        self._starts: dict[int, Setting] = {} if callable(phases) else dict(sorted(phases.items()))
        if not callable(phases):
            if not phases:
                raise ValueError("IterationsSchedule needs at least one phase, such as {0: 4}.")
            for start, setting in phases.items():
                if isinstance(start, bool) or not isinstance(start, int) or start < 0:
                    raise ValueError(
                        f"A phase must begin at a step, an integer >= 0, but one begins at {start!r}."
                    )
                Options(**_values(setting))
        self.last_step = 0
        self._in_force: dict[str, Any] | None = None
        self._apply()

    def step(self) -> None:
        """A training step is done: the settings of the next one hold from now on."""
        self.last_step += 1
        self._apply()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in force, as far as the schedule gives any."""
        return dict(self._in_force or {})

    def _apply(self) -> None:
        if self._phases is not None:
            values = _values(self._phases(self.last_step))
        else:
            begun = [setting for start, setting in self._starts.items() if start <= self.last_step]
            values = _values(begun[-1]) if begun else {}
        if values != self._in_force:
            set_iterations(self._model, **{name: values.get(name) for name in NAMES})
            self._in_force = values

    def state_dict(self) -> dict[str, Any]:
        """The number of steps done. The phases belong to the program, not to its state."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another one was; its settings hold at once."""
        self.last_step = int(state["last_step"])
        self._in_force = None
        self._apply()


def _values(setting: Setting) -> dict[str, Any]:
    if not isinstance(setting, Mapping):
        return {"iterations": setting}
    for name in setting:
        if name not in NAMES:
            raise OptionError(f"Option {name!r} cannot change while a model trains; {', '.join(NAMES)} can.")
    return dict(setting)
