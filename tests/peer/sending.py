"""What tests of control sockets share."""

from __future__ import annotations

from swarm.peer.websocket import ControlSocket


async def send(socket: ControlSocket, message: bytes) -> None:
    """A whole message, as a link sends one."""
    if not socket.send_nowait(message):
        await socket.send_rest()
