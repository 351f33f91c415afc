"""What launchers print and write."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def aligned(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: columns aligned to the right."""
    rows = [headers, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(headers))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def write_json(path: str | None, content: Any) -> None:
    """Writes a result file; "-" is standard output, None writes nothing."""
    text = json.dumps(content, indent=1)
    if path == "-":
        print(text)
    elif path:
        Path(path).write_text(text + "\n")
