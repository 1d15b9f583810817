"""How many sweeps each way to split the residual path takes to come close to the exact gradient.

A sweep is one VJP of all blocks. For each of the paper's models, small, as initialised and as trained with
exact gradients: the sweeps to a mean cosine of 0.99 and of 0.999 over the parameters, on one held-out batch.
Below the package's own splits come candidates that it does not have.

    OMP_NUM_THREADS=1 python benchmarks/sweeps.py --threads 1 --only "GPT, pre-LN"
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from candidates import CANDIDATES, OVER_TIME, Iterate, instead
from paper import loss_of
from paper_tasks import Batch, PaperTask, tasks
from torch import Tensor, nn

from hwbp_compile.report.closeness import mean_cosine
from hwbp_compile.report.recommend import name_of, sweeps_of
from hwbp_compile.report.table import table
from hwbp_compile.report.trial import trial

TARGETS = (0.99, 0.999)
PLAIN: dict[str, Any] = {"gamma": 0.0, "group_size": 1, "exact_tail": 0}
STATES = ("as initialised", "trained")
ITERATIONS = (1, 2, 3, 4, 6)
Way = tuple[dict[str, Any], str, Iterate | None]
"""How the residual path is split, and the name of a candidate, if it takes the place of the iteration."""


def ways(over_time: bool) -> list[Way]:
    """What is tried."""
    splits: list[dict[str, Any]] = [{}, {"gamma": 0.1}, {"gamma": 0.2}, {"group_size": 2}, {"group_size": 4}]
    if over_time:
        splits += [{"group_size": 8}, {"group_size": 16}]
    else:
        splits += [{"gamma": 0.35}, *({"exact_tail": n} for n in (1, 2, 4)), {"exact_tail": 2, "gamma": 0.1}]
    found: list[Way] = [(split, "", None) for split in splits]
    found += [({}, name, candidate) for name, candidate in CANDIDATES.items()]
    if over_time:
        return found + [({}, name, candidate) for name, candidate in OVER_TIME.items()]
    return [*found, ({"exact_tail": 2}, "Krylov", CANDIDATES["Krylov"])]


def rows_of(task: PaperTask, model: nn.Module) -> list[list[str]]:
    """One row for each way."""
    batch = task.data.validation[0]
    model.zero_grad()
    loss_of(model, batch).backward()
    exact = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    over_time = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with trial(model, loss_of, batch, "sweeps") as tried:
        _, chains = tried.gradients(batch, PLAIN | {"iterations": 1})
    blocks = max(c.blocks for c in chains)
    return [row_of(model, batch, exact, blocks, *way) for way in ways(over_time)]


def row_of(
    model: nn.Module,
    batch: Batch,
    exact: dict[str, Tensor],
    blocks: int,
    split: dict[str, Any],
    name: str,
    candidate: Iterate | None,
) -> list[str]:
    """k grows until the last target is reached."""
    cosines: dict[int, float] = {}
    with instead(candidate), trial(model, loss_of, batch, "sweeps") as tried:
        for k in ITERATIONS:
            found, _ = tried.gradients(batch, PLAIN | split | {"iterations": k})
            cosines[k] = mean_cosine(found, exact)
            if cosines[k] >= max(TARGETS):
                break
    cells = [" + ".join([name_of(split)] * bool(split or not name) + [name] * bool(name))]
    for target in TARGETS:
        k = min((k for k, cosine in cosines.items() if cosine >= target), default=None)
        cells.append("-" if k is None else f"{sweeps_of(k, split, blocks):.2g} (k = {k})")
    return [*cells, " ".join(f"{cosine:.4f}".lstrip("0") for cosine in cosines.values())]


def train(task: PaperTask, model: nn.Module) -> None:
    """Exactly, in eager mode."""
    optimizer, schedule = task.optimizer(model)
    for step in range(task.steps):
        optimizer.zero_grad()
        loss_of(model, task.data.train(step)).backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = tasks()
    parser.add_argument("--only", choices=list(known), action="append")
    parser.add_argument("--state", choices=STATES, action="append")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only or known:
        task = known[name]()
        torch.manual_seed(0)
        model = task.make(task.data)
        for state in STATES:
            if state == "trained":
                train(task, model)
            if state not in (arguments.state or STATES):
                continue
            print(f"\n{name}, {state}", flush=True)
            cosines = f"cosines with k = {', '.join(map(str, ITERATIONS))}"
            header = ["", *(f"sweeps to {t}" for t in TARGETS), cosines]
            print(table(header, rows_of(task, model), words=[0, 3]), flush=True)


if __name__ == "__main__":
    main()
