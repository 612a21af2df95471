"""What a kubelet asks of containerd: pulling over the CRI, which is gRPC over HTTP/2 on a Unix socket."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

import h2.config
import h2.connection
import h2.events

_OK: Final = "0"


class CallFailed(Exception):
    """The call ended with another status than OK; the message is the server's."""


def pull(control: Path, reference: str, *, user: str = "", password: str = "", timeout: float = 60) -> None:
    """Pull an image.

    Args:
        control: containerd's socket.
        user: With `password`, what a pod's pull secret says.

    Raises:
        CallFailed: containerd could not pull it.
        TimeoutError: It said nothing for `timeout` seconds.
    """
    request = _field(1, _field(1, reference.encode()))
    if user:
        request += _field(2, _field(1, user.encode()) + _field(2, password.encode()))
    _call(control, "/runtime.v1.ImageService/PullImage", request, timeout)


def remove(control: Path, reference: str) -> None:
    _call(control, "/runtime.v1.ImageService/RemoveImage", _field(1, _field(1, reference.encode())), 20)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _call(control: Path, method: str, request: bytes, timeout: float) -> None:
    # Not validated: containerd's messages may end in a space.
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8", validate_inbound_headers=False))
    connection.initiate_connection()
    headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost"}
    headers |= {"content-type": "application/grpc", "te": "trailers"}
    connection.send_headers(1, list(headers.items()))
    connection.send_data(1, b"\0" + len(request).to_bytes(4, "big") + request, end_stream=True)
    said: dict[str, str] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(timeout)
        server.connect(str(control))
        while "grpc-status" not in said:
            server.sendall(connection.data_to_send())
            received = server.recv(65536)
            if not received:
                raise CallFailed("containerd hung up")
            for event in connection.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    said |= {str(name): str(value) for name, value in event.headers}
    if said["grpc-status"] != _OK:
        raise CallFailed(said.get("grpc-message", said["grpc-status"]))
