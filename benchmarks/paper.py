"""The paper's Table 2, small: each model trained with each k from several seeds, and with k chosen.

Per setting the last validation loss and accuracy, mean and standard deviation over the seeds. With "auto"
every tenth step is compared with the exact gradient. Graphs run op by op: it is about what is learned, and
times are elsewhere.

    python benchmarks/paper.py --only "GPT, pre-LN" --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from json_lines import add_line
from paper_tasks import Data, PaperTask, tasks
from torch import Tensor, nn

import hwbp_compile
from hwbp_compile.report.closeness import mean_cosine

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"iterations": "exact"},
    **{f"k = {k}": {"iterations": k, "group_size": 1} for k in (0, 1, 2, 4, 8)},
    "auto": {"iterations": "auto"},
    "fixed point, k = 4": {"iterations": 4, "group_size": 1, "gamma": 1.0},
}
EVERY = 10


@dataclass
class Outcome:
    """One training run."""

    loss: float
    accuracy: float
    sampled: list[tuple[float, bool]] = field(default_factory=list)
    """Of sampled steps the mean cosine, and whether the step was exact."""
    iterations: list[int] = field(default_factory=list)
    """k of each step that was iterated."""


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def run(task: PaperTask, setting: dict[str, Any], seed: int) -> Outcome:
    """Train from a seed. Equal models share what was compiled."""
    torch.manual_seed(seed)
    model = task.make(task.data)
    options: dict[str, Any] = {"apply": "always", "codegen": "eager"}
    compiled = torch.compile(model, backend="highway", options=options)
    hwbp_compile.set_iterations(model, **setting)
    optimizer, schedule = task.optimizer(model)
    twin = copy.deepcopy(model)
    seen, outcome, first = hwbp_compile.monitor(model), Outcome(0.0, 0.0), steps_so_far(model)
    for step in range(task.steps):
        batch = task.data.train(1000 * seed + step)
        optimizer.zero_grad()
        loss_of(compiled, batch).backward()
        if setting["iterations"] == "auto":
            last = seen.history[-1] if seen.history else None
            # Exact steps record nothing.
            iterated = last is not None and last.step == first + step and not last.watched
            if iterated and last is not None:
                outcome.iterations.append(int(last.iterations))
            if step % EVERY == 0:
                outcome.sampled.append((compare(model, twin, batch), not iterated))
        optimizer.step()
        schedule.step()
    outcome.loss, outcome.accuracy = validate(model, task.data)
    return outcome


def validate(model: nn.Module, data: Data) -> tuple[float, float]:
    """Mean loss and accuracy over the validation data."""
    losses, right = [], []
    with torch.no_grad():
        model.eval()
        for batch in data.validation:
            logits, wanted = model(batch[0]).flatten(0, -2), batch[1].flatten()
            losses.append(float(F.cross_entropy(logits, wanted)))
            right.append(float((logits.argmax(-1) == wanted)[wanted >= 0].double().mean()))
        model.train()
    return statistics.fmean(losses), statistics.fmean(right)


def steps_so_far(model: nn.Module) -> int:
    """Of the compiled graph."""
    return max((runs.steps for runs in hwbp_compile.monitor(model)._runs()), default=0)


def compare(model: nn.Module, twin: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """The mean cosine of the gradients that a model holds to the exact ones."""
    twin.load_state_dict(model.state_dict())
    twin.zero_grad()
    loss_of(twin, batch).backward()
    exact = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    return mean_cosine({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = tasks()
    parser.add_argument("--only", choices=list(known), action="append")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="append the results as JSON, a line a setting"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only or known:
        task = known[name]()
        count = sum(p.numel() for p in task.make(task.data).parameters())
        print(f"\n{name}: {count} parameters, {task.steps} steps", flush=True)
        for label in arguments.settings:
            start = time.perf_counter()
            outcomes = [run(task, SETTINGS[label], seed) for seed in range(arguments.seeds)]
            print(f"  {label:20}{line(outcomes)}  ({time.perf_counter() - start:.0f} s)", flush=True)
            if arguments.save:
                kept = {"model": name, "setting": label, "loss": spread([o.loss for o in outcomes])}
                add_line(arguments.save, kept)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def line(outcomes: list[Outcome]) -> str:
    """Means and deviations."""
    text = "loss {:.4f} +- {:.4f}".format(*spread([o.loss for o in outcomes]))
    text += "  accuracy {:.4f} +- {:.4f}".format(*spread([o.accuracy for o in outcomes]))
    sampled = [s for o in outcomes for s in o.sampled]
    if sampled:
        good = sum(cosine >= 0.99 or exact for cosine, exact in sampled) / len(sampled)
        iterated = [cosine for cosine, exact in sampled if not exact]
        ks = [k for o in outcomes for k in o.iterations]
        text += f"  good {good:.1%}, iterated {len(iterated)}/{len(sampled)}"
        if iterated:
            text += f", cosine mean {statistics.fmean(iterated):.4f} min {min(iterated):.4f}"
        if ks:
            text += f", k mean {statistics.fmean(ks):.1f}"
    return text


if __name__ == "__main__":
    main()
