"""Highway-BP written from its definition: block by block, path by path, with nothing shared with the package.

``ReferenceChain`` is an autograd function whose backward is the paper's iteration. A model that runs its
blocks through :func:`reference_run` has highway gradients in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
BlockFunction = Callable[..., State]
"""``block(*state, *extras) -> state``: one step of the chain."""
Diagonals = Callable[..., list[list[Tensor | None]]]
"""``diagonals(*state, *extras) -> K`` with ``K[i][j]`` the derivative of output i by input j, elementwise."""


@dataclass(frozen=True)
class Step:
    """One block of a chain, with its residual path by hand."""

    block: BlockFunction
    diagonals: Diagonals
    parameters: tuple[Tensor, ...]


@dataclass(frozen=True)
class Settings:
    iterations: int
    gamma: float = 0.0
    group_size: int = 1
    exact_tail: int = 0


Run = Callable[[Sequence[Step], State, Sequence[Tensor]], list[State]]


def plain_run(steps: Sequence[Step], state: State, extras: Sequence[Tensor]) -> list[State]:
    """Ordinary forward: all states from the first to the last."""
    states = [state]
    for step in steps:
        states.append(step.block(*states[-1], *extras))
    return states


def reference_run(settings: Settings) -> Run:
    """A forward whose backward is the reference iteration."""

    def run(steps: Sequence[Step], state: State, extras: Sequence[Tensor]) -> list[State]:
        parameters = list({id(p): p for s in steps for p in s.parameters if p.requires_grad}.values())
        flat = ReferenceChain.apply(steps, settings, len(state), len(extras), *state, *extras, *parameters)
        n = len(state)
        return [state] + [tuple(flat[i : i + n]) for i in range(0, len(flat), n)]

    return run


class ReferenceChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Any, settings: Any, n_state: int, n_extra: int, *values: Tensor) -> Any:
        state, extras = values[:n_state], values[n_state : n_state + n_extra]
        parameters = values[n_state + n_extra :]
        with torch.no_grad():
            states = plain_run(steps, tuple(v.detach() for v in state), extras)
        ctx.info = (steps, settings, states, extras, parameters)
        # A block that passes a value on must not make two outputs one tensor.
        return tuple(v.clone() for s in states[1:] for v in s)

    @staticmethod
    def backward(ctx: Any, *direct: Tensor) -> Any:
        steps, settings, states, extras, parameters = ctx.info
        n = len(states[0])
        b = [tuple(torch.zeros_like(v) for v in states[0])]
        b += [direct[i : i + n] for i in range(0, len(direct), n)]
        w = cotangents(steps, states, extras, b, settings)
        grads: list[Any] = [None] * (len(extras) + len(parameters))
        for i, step in enumerate(steps):
            found = vjp(step, states[i], extras, w[i + 1], [*extras, *parameters])
            grads = [g if f is None else f if g is None else g + f for g, f in zip(grads, found, strict=True)]
        return (None, None, None, None, *w[0], *grads)


def vjp(
    step: Step, state: State, extras: Sequence[Tensor], w: State, wrt: Sequence[Tensor]
) -> list[Tensor | None]:
    """``w`` times the Jacobian of one block by ``wrt``."""
    with torch.enable_grad():
        out = step.block(*state, *extras)
    pairs = [(o, v) for o, v in zip(out, w, strict=True) if o.requires_grad]
    wanted = [t for t in wrt if t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wrt)
    outputs, vectors = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, vectors, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in wrt]


def full_vjp(step: Step, state: State, extras: Sequence[Tensor], w: State) -> State:
    """``w (K + J)`` by the input state."""
    inputs = tuple(v.detach().requires_grad_() for v in state)
    with torch.enable_grad():
        out = step.block(*inputs, *extras)
    pairs = [(o, v) for o, v in zip(out, w, strict=True) if o.requires_grad]
    outputs, vectors = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, inputs, vectors, allow_unused=True)
    return tuple(torch.zeros_like(i) if f is None else f for i, f in zip(inputs, found, strict=True))


def residual_vjp(step: Step, state: State, extras: Sequence[Tensor], w: State) -> State:
    """``w K`` with K by hand."""
    with torch.no_grad():
        k = step.diagonals(*state, *extras)
    out = [torch.zeros_like(v) for v in state]
    for i, row in enumerate(k):
        for j, d in enumerate(row):
            if d is not None:
                out[j] = out[j] + w[i] * d
    return tuple(out)


def add(a: State, b: State) -> State:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def scaled(c: float, a: State) -> State:
    return tuple(c * x for x in a)


def cotangents(
    steps: Sequence[Step], states: list[State], extras: Sequence[Tensor], b: list[State], settings: Settings
) -> list[State]:
    """All ``w_i``, i = 0 .. L (forward numbering), after the given number of iterations."""
    count = len(steps)
    tail = min(settings.exact_tail, count)
    # Groups of block indices, counted from the loss; the blocks of the exact tail stay out.
    ends = list(range(count, tail, -settings.group_size))
    groups = [range(max(end - settings.group_size, tail), end) for end in ends]
    bounds = [count, *(g.start for g in groups)]

    def group_full(g: range, w: State) -> State:
        for i in reversed(g):
            w = full_vjp(steps[i], states[i], extras, w)
        return w

    def group_residual(g: range, w: State) -> State:
        for i in reversed(g):
            w = residual_vjp(steps[i], states[i], extras, w)
        return w

    def kept(g: range, w: State) -> State:
        return scaled(1.0 - settings.gamma, group_residual(g, w))

    def moved(g: range, w: State) -> State:
        return add(group_full(g, w), scaled(-1.0, kept(g, w)))

    # The direct gradients seen at a group's end: those inside it, carried there exactly.
    direct = [b[count]]
    for g in groups:
        w = tuple(torch.zeros_like(x) for x in b[0])
        for i in reversed(g):
            w = add(full_vjp(steps[i], states[i], extras, w), b[i])
        direct.append(w)

    def accumulate(v: list[State]) -> list[State]:
        """S(v) from its definition: every term carried along the residual path on its own."""
        out = []
        for p in range(len(v)):
            total = v[p]
            for q in range(p):
                term = v[q]
                for g in groups[q:p]:
                    term = kept(g, term)
                total = add(total, term)
            out.append(total)
        return out

    w0 = accumulate(direct)
    at_bounds = w0
    for _ in range(settings.iterations):
        v = [scaled(0.0, direct[0])] + [moved(g, at_bounds[p]) for p, g in enumerate(groups)]
        at_bounds = [add(x, y) for x, y in zip(w0, accumulate(v), strict=True)]

    w: dict[int, State] = dict(zip(bounds, at_bounds, strict=True))
    for g in groups:
        x = w[g.stop]
        for i in reversed(g[1:]):
            x = add(full_vjp(steps[i], states[i], extras, x), b[i])
            w[i] = x
    x = w[tail]
    for i in reversed(range(tail)):
        x = add(full_vjp(steps[i], states[i], extras, x), b[i])
        w[i] = x
    return [w[i] for i in range(count + 1)]


def module_step(module: nn.Module, diagonals: Diagonals, block: BlockFunction | None = None) -> Step:
    """A step from a module that maps one tensor to one tensor."""
    return Step(block or (lambda x, *e: (module(x, *e),)), diagonals, tuple(module.parameters()))


def identity(x: Tensor, *_: Tensor) -> list[list[Tensor | None]]:
    """K = I."""
    return [[torch.ones_like(x)]]
