"""A closed network on disk, for tests: an authority directory and issued nodes."""

from __future__ import annotations

import time
from pathlib import Path

from swarm import network, network_admin
from swarm.network import Network

DAY = 24 * 3600.0


class Wall:
    """A wall clock that a test sets."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class ClosedNetwork:
    """Made by `swarm network`'s own code; dates follow `wall`, the real clock if none is given."""

    def __init__(self, directory: Path, wall: Wall | None = None, *, days: float = 3650) -> None:
        self.directory = directory / "authority"
        self.wall = wall or Wall(time.time())
        self._nodes = directory
        self.authority = network_admin.create(self.directory, "test", days=days, now=self.wall())

    def issue(self, name: str, *, roles: tuple[str, ...] = (), days: float = 365) -> Path:
        """Issue (or renew) the node of this name; return its directory."""
        return network_admin.issue(self.directory, self._nodes / name, roles=roles, days=days, now=self.wall()).directory

    def load(self, name: str, **options: object) -> Network:
        """Issue the node of this name and join."""
        return network.load(self.issue(name, **options), clock=self.wall)  # type: ignore[arg-type]  # passed through

    def revoke(self, *members: str, days: float = 365) -> bytes:
        """Revoke by node id or file; return the new list."""
        network_admin.revoke(self.directory, members, days=days, now=self.wall())
        return (self.directory / "ca.crl").read_bytes()
