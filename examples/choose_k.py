"""Choose k for a small GPT on real text: look at the gradients, let k be chosen while training, try settings.

python examples/choose_k.py            # two to three minutes on two CPU cores
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from char_gpt import CharGPT
from data import Batch, characters
from torch import Tensor, nn

import hwbp_compile

LENGTH = 64


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy of the next characters."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=6)
    steps, layers = (parsed := parser.parse_args()).steps, parsed.layers
    torch.manual_seed(0)
    data = characters(batch=8, length=LENGTH)
    model = CharGPT(data.classes, LENGTH, layers, width=32)

    print("Gradients at the start, against the exact ones:\n")
    print(hwbp_compile.fidelity(model, loss_fn, data.train(0), iterations=[0, 1, 2, 4, 8]))

    # apply="always", as these layers are too large for the iteration to pay on a CPU.
    options: dict[str, str | int | bool] = {"iterations": "auto", "apply": "always", "codegen": "eager"}
    compiled = torch.compile(model, backend="highway", options=options)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # The last fifth of the training is exact.
    schedule = hwbp_compile.IterationsSchedule(model, {0: "auto", steps * 4 // 5: "exact"})
    seen = hwbp_compile.monitor(model)
    print("\nTraining with iterations chosen, and at the end exact:\n")
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(compiled, data.train(step))
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 5 == 0:
            last = seen.history[-1]
            record = (
                f"{'watched' if last.watched else last.iterations}; {seen}" if last.step == step else "exact"
            )
            print(f"step {step:3}  loss {loss.item():.3f}  {record}")

    # Set by hand, it holds from the next step on.
    hwbp_compile.set_iterations(model, 2, exact_tail=2)
    loss_fn(compiled, data.train(steps)).backward()
    print(f"\nWith k = 2 and an exact tail of 2:\n{seen}")
    hwbp_compile.set_iterations(model, "exact", exact_tail=None)

    print("\nSettings that come close to the exact gradient now, cheapest first:\n")
    batches = [data.train(steps + i) for i in range(2)]
    splits = [{}, {"gamma": 0.1}, {"gamma": 0.2}, {"exact_tail": 2}, {"group_size": 2}, {"group_size": 4}]
    print(hwbp_compile.recommend(model, loss_fn, batches, splits=splits, max_iterations=6))


if __name__ == "__main__":
    main()
