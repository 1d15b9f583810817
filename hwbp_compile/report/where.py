"""Where in the user's model a block is: the names of its modules and the lines of its source."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ..chain import Block
from ..passes.linear_ops import is_heavy

_PACKAGES = (Path(torch.__file__).parent, Path(__file__).parents[1])
_NOT_THE_USERS = (*(str(path) + os.sep for path in _PACKAGES), "<frozen", "<string>")
_FRAME = re.compile(r'File "(.+?)", line (\d+)')


@dataclass(frozen=True, slots=True)
class Names:
    """The modules of a model: the name by identity, as graphs record it, and which of them are mere lists."""

    by_identity: dict[str, str] = field(default_factory=dict)
    lists: frozenset[str] = frozenset()


def module_names(model: Any) -> Names:
    """The names of all modules of ``model``; empty for a function."""
    if not isinstance(model, nn.Module):
        return Names()
    found = [(_without_wrappers(name), module) for name, module in model.named_modules()]
    lists = frozenset(name for name, module in found if isinstance(module, nn.ModuleList))
    return Names({str(id(module)): name for name, module in found}, lists)


def block_modules(blocks: Sequence[Block], names: Names) -> tuple[str, ...]:
    """The module of each block of a chain."""
    stacks = [_heavy_stacks(block, names) for block in blocks]
    found = [_innermost(each, names) for each in stacks]
    # A block with a single heavy operator is rather the module around it, if that is not around all of them.
    around = [
        each[0][-2] if len(each) == 1 and len(each[0]) > 1 else name
        for each, name in zip(stacks, found, strict=True)
    ]
    distinct = len(set(around)) == len(around) and all(around) and names.lists.isdisjoint(around)
    return tuple(around if distinct else found)


def _heavy_stacks(block: Block, names: Names) -> list[list[str]]:
    stacks = [stack for node in block.nodes if is_heavy(node) and (stack := module_stack(node, names))]
    return stacks or [stack for node in block.nodes if (stack := module_stack(node, names))]


def _innermost(stacks: Sequence[Sequence[str]], names: Names) -> str:
    """The innermost module that holds all heavy operators of a block.

    Where that is the whole model, because the residual code stands in its own ``forward``, the module of the
    block's first operator (in the order of the forward pass).
    """
    if not stacks:
        return ""
    if (common := _common_prefix(stacks)) and common[-1]:
        return common[-1]
    parent = ".".join(_common_prefix([stack[-1].split(".") for stack in stacks]))
    return parent if parent and parent not in names.lists else stacks[-1][-1]


def _common_prefix(lists: Sequence[Sequence[str]]) -> Sequence[str]:
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))
    return [column[0] for column in same]


def module_stack(node: Node, names: Names) -> list[str]:
    """The modules that a node's forward operator ran in, from the outermost to the innermost."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack") or {}
    named = ((names.by_identity.get(_identity(key)), str(entry[0])) for key, entry in stack.items())
    return [readable(path) if name is None else name for name, path in named]


def _identity(key: str) -> str:
    """The key without the count that Dynamo appends when a module is called again (``"@1"``)."""
    return str(key).split("@")[0]


def readable(path: str) -> str:
    """A module's name from one of the ways in which graphs spell it: ``L['self']._modules['h'][0].attn``."""
    path = re.sub(r"getattr\((.+?), '(\w+)'\)", r"\1.\2", path)
    path = re.sub(r"\._modules\['(\w+)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    path = re.sub(r"^L__(self|function|model)_+", "", path)
    path = re.sub(r"^[LG]\.(self|fn|function|args\.\d+)(\.|$)", "", path)
    path = re.sub(r"^[LG]\.", "", path)
    path = re.sub(r"__closure__\.(\d+)\.cell_contents(\.|$)", "", path)
    return _without_wrappers(path)


def _without_wrappers(path: str) -> str:
    """A name without what ``torch.compile``, checkpointing and FSDP put into it."""
    wrappers = "_orig_mod|_modules|_checkpoint_wrapped_module|_fsdp_wrapped_module"
    return re.sub(rf"(^|\.)({wrappers})(?=\.|$)", "", path).strip(".")


def block_lines(block: Block) -> tuple[str, ...]:
    """The lines of the user's source that a block comes from, in the order of the forward pass."""
    lines: dict[str, None] = {}
    for node in reversed(block.nodes):
        if (line := user_line(node)) is not None:
            lines.setdefault(line)
    return tuple(lines)


def user_line(node: Node) -> str | None:
    """The innermost ``file:line`` of a node's trace that is not in torch."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return next((f"{f}:{line}" for f, line in reversed(frames) if not f.startswith(_NOT_THE_USERS)), None)


def shorten(names: Sequence[str]) -> str:
    """Many names in one line: ``h.0.attn ... h.11.mlp`` becomes ``h.0 ... h.11 (attn, mlp)``."""
    distinct = list(dict.fromkeys(n for n in names if n))
    if not distinct:
        return "(the model itself)" if names else ""
    if len(distinct) == 1:
        return f"{distinct[0]} (x {len(names)})" if len(names) > 1 else distinct[0]
    numbered = _numbered(distinct)
    if numbered is not None:
        first, last, rests = numbered
        parts = [r for r in rests if r]
        if len(rests) > 1:
            return f"{first} ... {last} ({', '.join(r or 'itself' for r in rests)})"
        ending = f".{parts[0]}" if parts else ""
        return f"{first}{ending} ... {last}{ending}"
    return ", ".join(distinct) if len(distinct) <= 3 else f"{distinct[0]} ... {distinct[-1]}"


def _numbered(names: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """Names that differ in one number and in what follows it: the first, the last and what follows."""
    split = [n.split(".") for n in names]
    for position in range(min(map(len, split))):
        tokens = {tuple(s[:position]) for s in split}
        if len(tokens) != 1:
            return None
        numbers = [s[position] for s in split]
        if all(n.isdigit() for n in numbers) and len(set(numbers)) > 1:
            prefix = split[0][:position]
            rests = dict.fromkeys(".".join(s[position + 1 :]) for s in split)
            return (
                ".".join([*prefix, numbers[0]]),
                ".".join([*prefix, numbers[-1]]),
                sorted(rests, key=list(rests).index),
            )
    return None


def shorten_lines(lines: Iterable[str], describe: Callable[[str], str] = os.path.basename) -> str:
    """``model.py:10, 12, 15`` from full paths and lines."""
    files: dict[str, list[int]] = {}
    for line in lines:
        file, number = line.rsplit(":", 1)
        files.setdefault(file, []).append(int(number))
    return "; ".join(f"{describe(f)}:{_ranges(sorted(set(numbers)))}" for f, numbers in files.items())


def _ranges(numbers: Sequence[int]) -> str:
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)
