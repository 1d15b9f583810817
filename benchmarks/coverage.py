"""Which chains are found in models of transformers and timm, and whether their gradients are exact at k = L.

    python benchmarks/coverage.py                # all models, 10 to 20 minutes
    python benchmarks/coverage.py GPT-2 ConvNeXt

It needs both libraries (``pip install .[coverage]``). Models are small, in float64, and run op by op.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections import Counter

import torch
from library_models import MODELS, Built
from torch import Tensor, nn

import hwbp_compile
from hwbp_compile.report.closeness import closeness

ENOUGH = {"iterations": 1000, "apply": "always", "codegen": "eager"}


def build(name: str) -> Built:
    torch.manual_seed(0)
    built = MODELS[name]()
    built.model.double().train()
    for parameter in built.model.parameters():
        # Heads, and scales of branches, that begin at zero would let no gradient through.
        parameter.data += 0.05 * torch.randn_like(parameter)
    for module in built.model.modules():
        # Both passes are to compute the same.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    for key, value in built.inputs.items():
        built.inputs[key] = value.double() if value.is_floating_point() else value
    return built


def gradients(built: Built, forward: nn.Module) -> list[Tensor]:
    built.model.zero_grad()
    output = built.output(forward(**built.inputs))
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    ((output * direction).sum() / output.numel() ** 0.5 + output.square().mean()).backward()
    # Compiled, a parameter of an output that nobody uses has a gradient of zeros.
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in built.model.parameters()]


def row(name: str) -> list[str]:
    built = build(name)
    expected = gradients(built, built.model)
    found = gradients(built, torch.compile(built.model, backend="highway", options=ENOUGH))
    error = closeness(found, expected).relative_error
    torch._dynamo.reset()
    chains = hwbp_compile.explain(built.model, options=ENOUGH, **built.inputs).chains
    rewritten = [f"{c.blocks} ({c.residual})" for c in chains if c.applied]
    reasons = Counter(c.reason.partition(":")[0] for c in chains if not c.applied)
    exact = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return [name, ", ".join(rewritten) or "none", exact, f"{error:.0e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    models = parser.parse_args().models
    if unknown := set(models) - set(MODELS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print("| model | chains rewritten: blocks (K) | left exact | error at k = L |\n|---|---|---|---|")
    for name in models:
        try:
            print(f"| {' | '.join(row(name))} |", flush=True)
        except Exception:
            print(f"| {name} | fails | | |", flush=True)
            traceback.print_exc(file=sys.stderr)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
