"""Draw what benchmarks kept: final losses against k, losses against wall time, and how much faster steps are.

python benchmarks/figures.py --paper paper.jsonl --curves curves.jsonl --depth depth.jsonl --folder benchmarks
python benchmarks/figures.py --sizes sizes.jsonl --folder benchmarks
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from json_lines import read_lines

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLUMNS = 3


@contextmanager
def page(panels: int, path: Path) -> Iterator[list[Any]]:
    """Axes, drawn into a file at the end."""
    rows = -(-panels // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 2.9 * rows), squeeze=False)
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    yield list(axes.flat[:panels])
    axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def draw_paper(found: list[dict[str, Any]], path: Path) -> None:
    """Final validation loss of each setting, with the seeds' standard deviation."""
    models = list(dict.fromkeys(row["model"] for row in found))
    with page(len(models), path) as axes:
        for axis, model in zip(axes, models, strict=True):
            rows = {row["setting"]: row["loss"] for row in found if row["model"] == model}
            mean, deviation = rows["exact"]
            axis.axhline(mean, color="black", label="exact")
            axis.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.15)
            ks = [setting for setting in rows if setting.startswith("k = ")]
            means, deviations = zip(*(rows[k] for k in ks), strict=True)
            axis.errorbar(range(len(ks)), means, deviations, fmt="o-", capsize=3, label="k fixed")
            others = [("auto", "auto", "^"), ("fixed point, k = 4", "FPI, 4", "s")]
            for i, (setting, _, marker) in enumerate(others, len(ks)):
                mean, deviation = rows[setting]
                axis.errorbar([i], [mean], [deviation], fmt=marker, capsize=3, label=setting)
            axis.set_xticks(
                range(len(ks) + len(others)), [*(k[4:] for k in ks), *(name for _, name, _ in others)]
            )
            axis.set(title=model, ylabel="validation loss", xlabel="k")
            axis.grid(alpha=0.3)


def draw_curves(found: list[dict[str, Any]], path: Path) -> None:
    """Validation loss against seconds of training."""
    with page(len(found), path) as axes:
        for axis, row in zip(axes, found, strict=True):
            for setting, (clock, losses) in row["curves"].items():
                axis.plot(clock, losses, marker=".", label=setting)
            axis.set(title=row["model"], ylabel="validation loss", xlabel="seconds", yscale="log")
            axis.grid(alpha=0.3)


def draw_depth(found: list[dict[str, Any]], path: Path) -> None:
    """How many times as fast as Inductor's a step is, of each model; dashed, where both are CUDA graphs."""
    families = list(dict.fromkeys(row["family"] for row in found))
    with page(len(families), path) as axes:
        for axis, family in zip(axes, families, strict=True):
            rows = [row for row in found if row["family"] == family]
            rows.sort(key=lambda row: [row[size] for size in ("width", "batch", "sequence", "depth")])
            names = dict.fromkeys(name for row in rows for name in row["settings"])
            for i, name in enumerate(names):
                for what, line in (("step", "o-"), ("replay", "^--")):
                    ratios = [ratio(row["settings"], name, what) for row in rows]
                    label = name if what == "step" else f"{name}, CUDA graph"
                    if i and not all(map(math.isnan, ratios)):
                        axis.plot(ratios, line, color=f"C{i}", label=label)
            axis.axhline(1, color="black", linewidth=1)
            labels = [f"d {row['width']}, B {row['batch']}\nL {row['depth']}" for row in rows]
            axis.set_xticks(range(len(rows)), labels, fontsize="x-small")
            axis.set(title=family, ylabel="speedup of a step")
            axis.grid(alpha=0.3)


def draw_sizes(found: list[dict[str, Any]], path: Path) -> None:
    """Speedup of a step against width, a line a batch size; backward passes against depth, a line a k.

    The rows are one family's. Those of the depth that most of them have are drawn against width, those of the
    width and batch that most have against depth.
    """
    depth = statistics.mode(row["depth"] for row in found)
    wide = sorted((r for r in found if r["depth"] == depth), key=lambda r: (r["batch"], r["width"]))
    sizes = statistics.mode((row["width"], row["batch"]) for row in found)
    deep = sorted((r for r in found if (r["width"], r["batch"]) == sizes), key=lambda r: r["depth"])
    with page(3, path) as axes:
        for axis, name in zip(axes, ("k = 2", "stacked, k = 2"), strict=False):
            for batch in dict.fromkeys(row["batch"] for row in wide):
                rows = [row for row in wide if row["batch"] == batch]
                if len(rows) == 1:
                    continue
                ratios = [ratio(row["settings"], name, "step") for row in rows]
                axis.plot([row["width"] for row in rows], ratios, "o-", label=f"B {batch}")
            axis.axhline(1, color="black", linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set(title=f"{name}, L {depth}", ylabel="speedup of a step", xlabel="width")
            axis.grid(alpha=0.3)
        for name in deep[0]["settings"]:
            rows = [row for row in deep if name in row["settings"]]
            times = [row["settings"][name].get("backward", math.nan) for row in rows]
            axes[2].plot([row["depth"] for row in rows], times, "o-", label=name)
        axes[2].set(
            title=f"d {sizes[0]}, B {sizes[1]}", ylabel="backward pass, ms", xlabel="depth", ylim=(0, None)
        )
        axes[2].legend(fontsize="x-small")
        axes[2].grid(alpha=0.3)


def ratio(settings: dict[str, dict[str, Any]], name: str, what: str) -> float:
    """Of the times of the first setting and of this one; nan where one is missing."""
    base = next(iter(settings.values())).get(what, math.nan)
    return base / settings.get(name, {}).get(what, math.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--paper", type=Path, metavar="FILE")
    parser.add_argument("--curves", type=Path, metavar="FILE")
    parser.add_argument("--depth", type=Path, metavar="FILE")
    parser.add_argument("--sizes", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    if arguments.paper:
        draw_paper(read_lines(arguments.paper), arguments.folder / "paper.png")
    if arguments.curves:
        draw_curves(read_lines(arguments.curves), arguments.folder / "curves.png")
    if arguments.depth:
        draw_depth(read_lines(arguments.depth), arguments.folder / "depth.png")
    if arguments.sizes:
        draw_sizes(read_lines(arguments.sizes), arguments.folder / "sizes.png")


if __name__ == "__main__":
    main()
