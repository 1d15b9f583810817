"""A table in plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

NOTHING = "no chain of this model is iterated, and all gradients are exact; hwbp_compile.explain says why"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int]) -> str:
    """Columns as wide as they need be; those with ``words`` flush left, numbers flush right."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in columns).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(r) for r in rows)])


def amount(value: float) -> str:
    """A number with a unit's prefix."""
    prefix = ""
    for larger in ("k", "M", "G", "T"):
        if value >= 1000:
            value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}"
