"""The command line's side of the control socket: synchronous, standard library only, because it runs on every `swarm fetch`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from swarm.control.protocol import MAX_REPLY_BYTES, SOCKET_NAME, decode_line, encode_line, error_from, reachable_path
from swarm.errors import DaemonUnreachable, NotPermitted

RECEIVE_BYTES: Final = 64 * 1024

CONNECT_SECONDS: Final = 5.0
"""A node that is alive accepts at once; its backlog is only full when it hangs."""


class DaemonWentAway(DaemonUnreachable):
    """A node took the request and left before it answered; another one may take over from its store."""


@dataclass(slots=True)
class Answer:
    """What a request came to.

    Attributes:
        result: The result object.
        fd: A descriptor that came with it, or -1; whoever holds the answer closes it.
    """

    result: dict[str, Any]
    fd: int = -1

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Arriving(Protocol):
    """Told of content while it arrives: `export.Export`.  Its errors end the wait."""

    def arriving(self, fd: int, name: str, length: int, piece_length: int) -> None: ...
    def verified(self, first: int, stop: int) -> None: ...
    def lost(self) -> None: ...


class ControlConnection:
    """One connection, one request.  Use as a context manager."""

    def __init__(self, data_dir: Path) -> None:
        """Connect.

        Raises:
            DaemonUnreachable: No node runs on this data directory.
            NotPermitted: The socket belongs to somebody else.
        """
        path = data_dir / SOCKET_NAME
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(CONNECT_SECONDS)
            with reachable_path(path) as name:
                self._socket.connect(name)
            self._socket.settimeout(None)
        except PermissionError as error:
            self._socket.close()
            raise NotPermitted(
                f"not allowed to use the control socket {path}: run the command as the user who runs the daemon"
            ) from error
        except OSError as error:
            self._socket.close()
            raise DaemonUnreachable(
                f"no daemon answers at {path} ({error.strerror or error}); start `swarm daemon`, or give --data-dir"
            ) from error

    def __enter__(self) -> ControlConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(
        self,
        operation: str,
        parameters: dict[str, Any] | None = None,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        arriving: Arriving | None = None,
    ) -> Answer:
        """Send the request and wait for its result; `arriving` is told of content that can be copied meanwhile.

        Raises:
            DaemonWentAway: The node left before it answered.
            SwarmError: What the node says went wrong.
        """
        try:
            early = {"early": True} if arriving is not None else {}
            self._socket.sendall(encode_line({"op": operation, **(parameters or {}), **early}))
            return self._receive(on_progress, arriving)
        except ConnectionError as error:
            raise DaemonWentAway("the daemon went away before it answered; run the command again to resume") from error

    def _receive(self, on_progress: Callable[[dict[str, Any]], None] | None, arriving: Arriving | None) -> Answer:
        buffer = bytearray()
        searched = 0  # where no line end was found yet: a long line is not searched from its beginning again
        descriptors: list[int] = []
        try:
            while True:
                end = buffer.find(b"\n", searched)
                if end < 0:
                    searched = len(buffer)
                    if searched > MAX_REPLY_BYTES:
                        raise DaemonUnreachable("the daemon's answer does not end; is it the same version as this command?")
                    data, received, _, _ = socket.recv_fds(self._socket, RECEIVE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
                    descriptors += received
                    if not data:
                        raise ConnectionResetError("end of stream")
                    buffer += data
                    continue
                message = decode_line(bytes(buffer[:end]))
                del buffer[: end + 1]
                searched = 0
                if "result" in message:
                    return Answer(message["result"], descriptors.pop() if descriptors else -1)
                if "error" in message:
                    raise error_from(message)
                if on_progress is not None and "progress" in message:
                    on_progress(message["progress"])
                if arriving is not None and "arriving" in message and descriptors:
                    what = message["arriving"]
                    arriving.arriving(descriptors.pop(0), what["task"], what["length"], what["piece_length"])
                if arriving is not None and "lost" in message:
                    arriving.lost()
                if arriving is not None and "verified" in message:
                    for first, stop in message["verified"]:
                        arriving.verified(first, stop)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def ask(
    data_dir: Path,
    operation: str,
    parameters: dict[str, Any] | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    arriving: Arriving | None = None,
) -> Answer:
    """Connect, ask once, close.

    Raises:
        As `ControlConnection` and its `ask`.
    """
    with ControlConnection(data_dir) as connection:
        return connection.ask(operation, parameters, on_progress, arriving)
