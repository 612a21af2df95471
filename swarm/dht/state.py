"""Small state kept between runs: a CBOR map in a file, replaced as a whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Final

import structlog

from swarm import wire
from swarm.errors import RemoteProtocolError

_log = structlog.get_logger(__name__)

VERSION: Final = 1
MAX_BYTES: Final = 1 << 20


def load(path: Path | None) -> dict[str, Any]:
    """What was saved; empty if there is nothing, or nothing that can be read: it only makes a start faster."""
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            value = wire.decode_untyped(file.read(MAX_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, RemoteProtocolError) as error:
        _log.warning("state is not readable and is made anew", path=str(path), error=str(error))
        return {}
    return value if isinstance(value, dict) and value.get("version") == VERSION else {}


def save(path: Path, values: dict[str, Any]) -> bool:
    """Replace the file: old or new after a crash, never half of one.  `False` (and a warning) if the disk refuses."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(wire.encode({"version": VERSION, **values}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        _log.warning("state is not saved", path=str(path), error=str(error))
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True
