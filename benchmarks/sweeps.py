"""How many sweeps each way to split the residual path takes to come close to the exact gradient.

A sweep is one VJP of all blocks. For each of the paper's models, small, as initialised and as trained with
exact gradients: the sweeps to a mean cosine of 0.99 and of 0.999 over the parameters, on one held-out batch.

    python benchmarks/sweeps.py --only "GPT, pre-LN"
"""

from __future__ import annotations

import argparse

import torch
from paper import loss_of
from paper_tasks import PaperTask, tasks
from torch import nn

import hwbp_compile
from hwbp_compile.report.recommend import SPLITS, name_of, sweeps_of
from hwbp_compile.report.table import table

TARGETS = (0.99, 0.999)


def rows_of(task: PaperTask, model: nn.Module, most: int) -> list[list[str]]:
    """One row for each split."""
    batch = task.data.validation[0]
    found = hwbp_compile.recommend(model, loss_of, [batch], target=max(TARGETS), max_iterations=most)
    by_split = {name_of(t.splits): t for t in found.tried}
    rows = []
    for split in SPLITS:
        tried = by_split[name_of(split)]
        cells = [name_of(split)]
        for target in TARGETS:
            k = min((k for k, cosine in tried.cosines.items() if cosine >= target), default=None)
            cells.append("-" if k is None else f"{sweeps_of(k, split, tried.blocks):.2g} (k = {k})")
        last = max(tried.cosines)
        rows.append([*cells, f"{tried.cosines[last]:.4f} at k = {last}"])
    return rows


def train(task: PaperTask, model: nn.Module) -> None:
    """Exactly, in eager mode."""
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.learning_rate, total_steps=task.steps)
    for step in range(task.steps):
        optimizer.zero_grad()
        loss_of(model, task.data.train(step)).backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = tasks()
    parser.add_argument("--only", choices=list(known), action="append")
    parser.add_argument("--most", type=int, default=8, help="the largest k that is tried")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only or known:
        task = known[name]()
        torch.manual_seed(0)
        model = task.make(task.data)
        for state in ("as initialised", "trained"):
            if state == "trained":
                train(task, model)
            print(f"\n{name}, {state}", flush=True)
            header = ["", *(f"sweeps to {t}" for t in TARGETS), "best cosine"]
            print(table(header, rows_of(task, model, arguments.most), words=[0]), flush=True)


if __name__ == "__main__":
    main()
