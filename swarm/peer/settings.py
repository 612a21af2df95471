"""What the peer layer is told, and what it tells."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from swarm.edges import Address, Membership
from swarm.peer.limits import ProgressRule


class TlsMembership(Membership, Protocol):
    """A membership with TLS contexts: `network.Network`."""

    def server_context(self) -> ssl.SSLContext: ...
    def client_context(self) -> ssl.SSLContext: ...
    def on_change(self, callback: Callable[[], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """
    Attributes:
        encrypt: All pieces travel over TLS, in both directions.
        advertise: Addresses told to peers beside the one they see.
        upload_rate, download_rate: Bytes a second for the node; 0 does not limit.
        task_upload_rate, task_download_rate: The same for each task.
        congestion_control: Of TCP, for the pieces we send; empty for the system's.
        max_links: Members connected at a time; a download keeps 16 to 24 neighbours for each task.
        max_handshakes: Connections not yet authenticated, on both ports; the oldest gives way.
        max_handshakes_per_host: The same from one address: 500 half-open connections must not keep a member out.
        rule: When a transfer has failed.
        agent: Name and version, told to peers.
    """

    encrypt: bool = False
    advertise: tuple[Address, ...] = ()
    upload_rate: float = 0
    download_rate: float = 0
    task_upload_rate: float = 0
    task_download_rate: float = 0
    congestion_control: str = ""
    max_links: int = 512
    max_handshakes: int = 256
    max_handshakes_per_host: int = 64
    rule: ProgressRule = field(default_factory=ProgressRule)
    agent: str = "swarm"


class Ports(NamedTuple):
    """Where the hub listens."""

    control: int
    pieces: int


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """Counts since start, and what is there now (`links`, `channels`, `handshakes`, `uploads`, `queued`).

    Attributes:
        sent, received: Bytes of pieces.
        refused: Accepted connections that did not become a link or a channel.
    """

    links: int
    channels: int
    handshakes: int
    uploads: int
    queued: int
    sent: int
    received: int
    dials: int
    dials_failed: int
    accepted: int
    refused: int
    violations: int
    frames_sent: int
    frames_received: int
    messages_sent: int
    messages_received: int
