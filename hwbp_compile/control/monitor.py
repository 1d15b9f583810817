"""What the iterations of a model that trains recorded, to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .runs import ChainRecord, Runs, all_runs
from .settings import module_of


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step of one compiled graph."""

    step: int
    """Counted per graph, from 0: how many forward passes with gradients came before."""
    iterations: int | str
    """The setting: k or "exact"."""
    watched: bool
    """Whether the gradients are exact and the iterations were made to look at them only."""
    chains: tuple[ChainRecord, ...]
    """Recurrences first, then chains over depth, each in the order of the forward pass."""


class Monitor:
    """Reads the records of a model's graphs. Reading waits for the device; recording does not.

    Args:
        model: a module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def graphs(self) -> list[list[StepRecord]]:
        """Per compiled graph the last 256 steps whose backward pass recorded something, the oldest first.

        More than one graph comes of graph breaks, of parts compiled on their own, and of recompilation.
        """
        return [steps for _, steps in self._recorded()]

    @property
    def history(self) -> list[StepRecord]:
        """The records of the graph that was run last and has any; see :meth:`graphs`."""
        return max(self._recorded(), key=lambda pair: pair[0].last, default=(None, []))[1]

    @property
    def current(self) -> tuple[ChainRecord, ...]:
        """The last record of every chain; of graphs for several sizes those of the one that was run last."""
        recorded = self._recorded()
        latest = {runs.frame: runs for runs, _ in sorted(recorded, key=lambda pair: pair[0].last)}
        return tuple(c for runs, steps in recorded if latest[runs.frame] is runs for c in steps[-1].chains)

    def record_blocks(self, on: bool = True) -> None:
        """Have the next steps record every block's last step by itself, as ``block_steps``.

        Of a chain up to 512 blocks are. It costs a compilation, the first time for each setting, and a little
        time in each step; with False it ends. It holds for the graphs that were compiled so far.
        """
        for runs in self._runs():
            runs.records_blocks = on

    def scalars(self) -> dict[str, float]:
        """The last estimate and k of each chain by a name, as ``SummaryWriter.add_scalar`` takes them."""
        found: dict[str, float] = {}
        for i, chain in enumerate(self.current, 1):
            found[f"highway/chain {i}/estimate"] = chain.estimate
            found[f"highway/chain {i}/iterations"] = float(chain.iterations)
        return found

    def __str__(self) -> str:
        lines = [
            f"chain {i}: {chain.blocks} {'groups or steps' if chain.over_time else 'blocks'}, "
            f"k = {chain.iterations}, estimate {chain.estimate:.2g}, "
            f"steps {' '.join(f'{s:.2g}' for s in chain.steps)}"
            for i, chain in enumerate(self.current, 1)
        ]
        return "\n".join(lines) or "nothing is recorded yet: no backward pass was iterated"

    def _recorded(self) -> list[tuple[Runs, list[StepRecord]]]:
        """The graphs that have any records, and these."""
        return [(runs, steps) for runs in self._runs() if (steps := list(_steps(runs)))]

    def _runs(self) -> list[Runs]:
        parameters = {id(p) for p in self._model.parameters()}
        return [r for r in all_runs() if any(id(p) in parameters for p in r.parameters())]


def _steps(runs: Runs) -> Iterator[StepRecord]:
    runs.fetch()
    for entry in tuple(runs.history):  # other threads may begin steps
        if chains := entry.chains():
            iterations = entry.options.iterations
            yield StepRecord(entry.number, iterations, entry.options.watch > 0, chains)


def monitor(model: nn.Module) -> Monitor:
    """What the backward passes of a model record of their error: always, and without waiting for the device.

        seen = hwbp_compile.monitor(model)
        print(seen)                                        # the last step
        for name, value in seen.scalars().items():         # TensorBoard
            writer.add_scalar(name, value, step)

    Per chain and iteration j = 1 .. k it is ``step_j``, the mean over blocks of ``|w_j - w_(j-1)| / |w_k|``.
    So ``step_(j+1)`` tells how good j iterations would have been; the ``estimate`` extrapolates to k. With
    k = 0 there is nothing to record, nor where a chain is exact.

    Args:
        model: what was compiled, or what ``torch.compile`` made of it, or a part of it.

    Raises:
        TypeError: ``model`` is no module.
        ModelError: ``model`` is compiled with another backend.
    """
    return Monitor(module_of(model, "monitor"))
