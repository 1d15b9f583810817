"""Files of JSON, a value a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_line(path: Path, value: Any) -> None:
    with path.open("a") as file:
        print(json.dumps(value), file=file)
