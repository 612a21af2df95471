"""What the mirror counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from swarm.metrics import Histogram

MAX_REGISTRIES: Final = 64
"""Registries with counters of their own: clients choose the names, and each costs a monitoring system a row for ever."""

OTHERS: Final = "others"

FIRST_BYTE_BOUNDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds, seconds: from a blob that is here to one that a slow registry is read for."""


@dataclass(slots=True)
class Tally:
    """Counters since start.

    Attributes:
        answers: By registry, kind (`manifest`, `blob`, ...) and status.
        sent: Bytes of bodies, by registry and where they came from: `store`, `peers`, `origin`.
        stale: Tags answered without asking, because the registry did not answer.
        cut: Bodies that ended early, by reason.
        first_byte: Seconds from a request for a blob to its first byte.
        clients: Connections open now.
    """

    answers: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    first_byte: Histogram = field(default_factory=lambda: Histogram(FIRST_BYTE_BOUNDS))
    clients: int = 0
    _registries: set[str] = field(default_factory=set)

    def label(self, registry: str, *, new: bool = True) -> str:
        """The registry, or `others` where there are too many, or where it is not `new` and was never counted before."""
        if registry not in self._registries:
            if not new or len(self._registries) >= MAX_REGISTRIES:
                return OTHERS
            self._registries.add(registry)
        return registry
