"""The control socket: how the command line and a daemon on the same machine talk.

Participants: a client (the `swarm` command) and the node that owns the data directory.  One request per connection: the
client sends one JSON line, the node answers with any number of `{"progress": ...}` lines and exactly one
`{"result": ...}` or `{"error": ...}` line.  The result of a fetch carries a read-only descriptor of the content
(SCM_RIGHTS), so that the command writes the file as its own user and the node never writes outside its own directory.
A fetch with `"early": true` gets, between them, `{"arriving": ...}` with a descriptor of what there is, then
`{"verified": [[first, stop], ...]}` (pieces, the last not included) as they come, and `{"lost": true}` when some of it was
wrong.

Goals: nothing heavier than the standard library on the client's side; a client that goes away cancels its own wait and
nothing else.  Non-goals: other machines, other users: whoever may open the socket (mode 0600, in a directory of mode
0700) is the node's administrator.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from swarm import errors
from swarm.errors import LocalProtocolError, SwarmError

SOCKET_NAME: Final = "control.sock"

MAX_REQUEST_BYTES: Final = 256 * 1024
"""One request line: room for the longest headers any origin takes; bounds what a stuck client makes the node hold."""

MAX_REPLY_BYTES: Final = 16 * 1024 * 1024
"""One reply line: `task ls` of 20,000 tasks; bounds what a broken node makes the command hold."""

MAX_UNIX_PATH_BYTES: Final = 100
"""Below the 108 of `sun_path`, whose last byte is zero; a longer path goes through /proc/self/fd."""


def encode_line(message: Mapping[str, Any]) -> bytes:
    """One line of the protocol; JSON escapes every line break inside."""
    return json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"


def decode_line(line_untrusted: bytes) -> dict[str, Any]:
    """Read one line.

    Raises:
        LocalProtocolError: Not a JSON object.
    """
    try:
        message = json.loads(line_untrusted)
    except (ValueError, RecursionError) as error:
        raise LocalProtocolError(f"the control socket carried something that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise LocalProtocolError("the control socket carried something that is not a JSON object")
    return message


def error_message(error: SwarmError) -> dict[str, Any]:
    """The object that tells a client, or a script reading `--json`, what went wrong."""
    return {"error": error.kind, "message": str(error), "exit_code": error.exit_code}


class RelayedError(SwarmError):
    """An error of a kind this version does not know, as the node told it."""

    def __init__(self, message: str, kind: str, exit_code: int) -> None:
        super().__init__(message)
        self._kind = kind
        self.exit_code = exit_code

    @property
    def kind(self) -> str:
        return self._kind


def error_from(message: Mapping[str, Any]) -> SwarmError:
    """The exception a node's error line stands for."""
    kind, text = str(message.get("error")), str(message.get("message"))
    cls = getattr(errors, kind, None)
    if isinstance(cls, type) and issubclass(cls, SwarmError):
        return cls(text)
    code = message.get("exit_code")
    return RelayedError(text, kind, code if isinstance(code, int) and 0 < code < 256 else 1)


@contextmanager
def reachable_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits a socket address, however deep the data directory lies."""
    if len(os.fsencode(path)) <= MAX_UNIX_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
