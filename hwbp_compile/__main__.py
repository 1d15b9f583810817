"""The same from a shell: ``python -m hwbp_compile explain package.module:factory``."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .calibrate import calibrate, to_text
from .control.settings import module_of
from .errors import ModelError, OptionError
from .options import list_options
from .remembered import known_of
from .report.explain import explain
from .report.explanation import Explanation
from .report.fidelity import fidelity


class UsageError(Exception):
    """What was typed cannot be done; the message is one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return _COMMANDS[given.command](given)
    except (UsageError, OptionError, ModelError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hwbp_compile", description=sys.modules["hwbp_compile"].__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser(
        "explain",
        help="say which residual chains of a model are rewritten, and why others are not",
        description="Say which residual chains of a model are rewritten, and why others are not.",
    )
    command.add_argument(
        "factory",
        help="package.module:function or path/to/file.py:function; called without arguments, it returns "
        "(model, args) or (model, args, kwargs)",
    )
    _add_options(command, "an option of the backend")
    command.add_argument(
        "--draw", type=Path, metavar="FILE", help="draw the backward pass into an .svg or .png file"
    )
    command.add_argument(
        "--graphs", type=Path, metavar="DIR", help="write the graphs before and after as text"
    )
    command = commands.add_parser(
        "fidelity",
        help="compare a model's highway gradients with the exact ones",
        description="Compare a model's highway gradients with the exact ones, for one k after the other.",
    )
    command.add_argument(
        "factory",
        help="package.module:function or path/to/file.py:function; called without arguments, it returns "
        "(model, loss_fn, batch), where loss_fn(model, batch) is the loss",
    )
    command.add_argument(
        "--iterations",
        "-k",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4, 6, 8],
        metavar="K",
        help="values of k",
    )
    _add_options(command, "gamma, group_size, exact_tail or codegen")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw it into a .png, .svg or .pdf file")
    command = commands.add_parser(
        "calibrate",
        help='measure again what the decisions of apply="auto" go by',
        description='Measure again what the decisions of apply="auto" go by, best while nothing else runs. '
        "It is kept beside torch's caches, and holds for all processes with as many threads.",
    )
    command.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    command.add_argument("--threads", type=int, help="as the training has; by default, as torch chooses")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command = commands.add_parser("options", help="list the options of the backend")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _add_options(command: argparse.ArgumentParser, what: str) -> None:
    """Options by name and value, and how to print the result."""
    command.add_argument(
        "--option",
        "-o",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"{what}; repeat it for more",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _options(given: argparse.Namespace) -> int:
    options = list_options()
    if given.json:
        print(json.dumps(options, indent=2))
        return 0
    width = max(map(len, options))
    for name, facts in options.items():
        print(f"{name:{width}}  {facts['doc']} (default {facts['default']!r})")
    return 0


def _explain(given: argparse.Namespace) -> int:
    options = dict(_parse_option(text) for text in given.option)
    if given.draw is not None and given.draw.suffix not in (".svg", ".png"):
        raise UsageError(f"the file to draw must end in .svg or .png, but is {given.draw.name!r}.")
    model, args, kwargs = _explained(given.factory)
    # A compiled model brings its own options; without any here they are used.
    explanation = explain(model, *args, options=options or None, **kwargs)
    print(json.dumps(explanation.to_dict(), indent=2) if given.json else explanation)
    if given.graphs is not None:
        _write_graphs(explanation, given.graphs)
    if given.draw is not None:
        try:
            explanation.draw(given.draw)
        except (ValueError, ImportError) as error:
            raise UsageError(f"nothing is drawn: {error}") from None
    return 0


def _fidelity(given: argparse.Namespace) -> int:
    options = dict(_parse_option(text) for text in given.option)
    if given.plot is not None and given.plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"the file to plot must end in .png, .svg or .pdf, but is {given.plot.name!r}.")
    made = _call_factory(given.factory)
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[1]):
        raise UsageError(f"{given.factory} must return (model, loss_fn, batch), but returned {_kind(made)}.")
    try:
        module_of(made[0], "fidelity")
    except TypeError as error:
        raise UsageError(str(error)) from None
    report = fidelity(*made, given.iterations, **options)
    print(json.dumps(report.to_dict(), indent=2) if given.json else report)
    if given.plot is not None:
        try:
            report.plot(given.plot)
        except ImportError as error:
            raise UsageError(f"nothing is drawn: {error}") from None
    return 0


def _calibrate(given: argparse.Namespace) -> int:
    if given.threads is not None and given.threads < 1:
        raise UsageError(f"there must be at least one thread, not {given.threads}.")
    try:
        device = torch.device(given.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # what torch raises where it is built without CUDA
        raise UsageError(f"there is no device {given.device!r}.") from None
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    measured = calibrate(device)
    if given.json:
        print(json.dumps([m.to_dict() for m in measured], indent=2))
        return 0
    known, threads = known_of(device), torch.get_num_threads()
    where = known.path or "no file"
    print(f"{known.conditions.device}, {threads} thread{'s' * (threads != 1)}; kept in {where}")
    print(to_text(measured))
    return 0


_COMMANDS = {"explain": _explain, "options": _options, "fidelity": _fidelity, "calibrate": _calibrate}


def _write_graphs(explanation: Explanation, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, graph in enumerate(explanation.graphs):
        (folder / f"graph{i}_before.txt").write_text(graph.before)
        (folder / f"graph{i}_after.txt").write_text(graph.after)


def _parse_option(text: str) -> tuple[str, Any]:
    """``iterations=4`` as a name and a Python value; what is no Python literal is a string."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UsageError(f"an option must be given as name=value, but is {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _call_factory(spec: str) -> Any:
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise UsageError(f"{spec!r} must be package.module:function or path/to/file.py:function.")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    factory = getattr(module, name, None)
    if factory is None:
        raise UsageError(f"{place} has no {name!r}.")
    if not callable(factory):
        raise UsageError(f"{spec} must be a function, but is of type {type(factory).__name__}.")
    return factory()


def _explained(spec: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, arguments and keyword arguments that a factory returns."""
    made = _call_factory(spec)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[1], (tuple, list)):
        raise UsageError(
            f"{spec} must return (model, args) or (model, args, kwargs), but returned {_kind(made)}."
        )
    kwargs = made[2] if len(made) == 3 else {}
    if not isinstance(kwargs, dict):
        raise UsageError(
            f"{spec} must return its keyword arguments as a dictionary, but returned {_kind(kwargs)}."
        )
    return made[0], tuple(made[1]), kwargs


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(v).__name__ for v in value) or 'nothing'}"
    return f"a value of type {type(value).__name__}"


def _load_module(name: str) -> Any:
    sys.path.insert(0, "")  # as python -m does for the module it runs
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"there is no module {error.name!r}.") from None
    finally:
        sys.path.remove("")


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # pickling and dataclasses look it up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


if __name__ == "__main__":
    sys.exit(main())
