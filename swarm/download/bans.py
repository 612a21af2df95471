"""Nodes we keep away from, for a growing time.  No I/O, no clock."""

from __future__ import annotations

from swarm.edges import NodeId

BAN_SECONDS = 60.0
MAX_BAN_SECONDS = 3600.0
MAX_BANS = 4096
"""Bans double from a minute to an hour; the oldest are forgotten first."""


class Bans:
    """Who is banned until when."""

    def __init__(self) -> None:
        self._bans: dict[NodeId, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._bans)

    def ban(self, node_id: NodeId, now: float) -> None:
        """Ban for twice as long as last time."""
        _, last = self._bans.pop(node_id, (0.0, BAN_SECONDS / 2))
        seconds = min(2 * last, MAX_BAN_SECONDS)
        while len(self._bans) >= MAX_BANS:
            del self._bans[next(iter(self._bans))]
        self._bans[node_id] = (now + seconds, seconds)

    def is_banned(self, node_id: NodeId, now: float) -> bool:
        until, _ = self._bans.get(node_id, (0.0, 0.0))
        return until > now
