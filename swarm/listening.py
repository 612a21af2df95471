"""Listening sockets of the faces that clients on this machine use: bound at start, so that a port in use is said then."""

from __future__ import annotations

import socket
from typing import Protocol

from swarm.errors import ConfigError


class Endpoint(Protocol):
    """Host and port, as configured."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


def listen(endpoint: Endpoint | None, *, refusal: str, advice: str, backlog: int) -> socket.socket | None:
    """A bound, non-blocking socket, which the caller closes; `None` where the face is off.

    Args:
        refusal: How the message begins, with {} for the endpoint; `advice` says at its end what to do.

    Raises:
        ConfigError: The address is in use or not ours.
    """
    if endpoint is None:
        return None
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"{refusal.format(endpoint)}: {error.strerror or error}; {advice}") from error
    return listener
