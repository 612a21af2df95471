"""What commands print: JSON for programs, aligned text for people, errors as one line.  Standard library only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from swarm.control.protocol import error_message
from swarm.errors import SwarmError


def emit_json(value: Any) -> None:
    """One JSON value on one line of standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def fail(error: SwarmError, as_json: bool) -> int:
    """Say what went wrong, on one line, and return the exit code."""
    message = printable(str(error))
    print(f"swarm: {message}", file=sys.stderr)
    if as_json:
        emit_json(error_message(error))
    return error.exit_code


def printable(text: str) -> str:
    """Text from elsewhere on one line, without control characters: an origin's reason phrase cannot move the cursor."""
    return "".join(c if c.isprintable() else " " if c in "\r\n\t" else "\ufffd" for c in text)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> None:
    """Aligned columns; those in `right` to the right."""
    lines = [list(head), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """`name  value` lines."""
    width = max((len(name) for name, _ in fields), default=0)
    for name, value in fields:
        print(f"{name.ljust(width)}  {printable(str(value))}")


def ago(wall: float) -> str:
    """How long ago, in one unit."""
    seconds = max(0.0, time.time() - wall)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
