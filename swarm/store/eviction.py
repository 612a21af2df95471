"""What is deleted when room is needed: pure policy, numbers in and decisions out.

Least recently used first; never what is pinned or in use.  Nothing is deleted for a request that could not be met
even by deleting everything that may be deleted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One content.  `used` orders by last use; it need not be a time."""

    key: int
    size: int
    used: float
    protected: bool


@dataclass(frozen=True, slots=True)
class Room:
    """How full the store is, in bytes.

    Attributes:
        used: Lengths of all contents, whether their pieces are there yet or not: what is reserved counts.
        quota: Most that `used` may be, or `None`.
        free: What the file system has left beyond the part we always leave alone and beyond what running tasks
            reserved without allocating it; negative when others filled it.  `None` if unlimited.
    """

    used: int
    quota: int | None
    free: int | None

    def missing(self, wanted: int) -> int:
        """Bytes that must go before `wanted` more fit; 0 if they fit."""
        over_quota = self.used + wanted - self.quota if self.quota is not None else 0
        over_disk = wanted - self.free if self.free is not None else 0
        return max(0, over_quota, over_disk)

    @property
    def capacity(self) -> int | None:
        """Most the store may hold as things stand, or `None` if unlimited."""
        limits = [limit for limit in (self.quota, None if self.free is None else self.used + self.free) if limit is not None]
        return max(0, min(limits)) if limits else None

    def excess(self, high: float, low: float) -> int:
        """Bytes to delete: none until `high` of the capacity is used, then down to `low` of it.

        Two marks, so that a full store deletes now and then, and not a little before every new task.
        """
        capacity = self.capacity
        if capacity is None or self.used <= high * capacity:
            return 0
        return self.used - int(low * capacity)


def choose(candidates: Iterable[Candidate], wanted: int, *, all_or_nothing: bool) -> list[int]:
    """Keys to delete, in order, for `wanted` bytes.

    Args:
        all_or_nothing: If even everything that may be deleted is not enough, delete nothing.
    """
    free = sorted((c for c in candidates if not c.protected), key=lambda c: (c.used, c.key))
    if all_or_nothing and sum(c.size for c in free) < wanted:
        return []
    chosen = []
    for candidate in free:
        if wanted <= 0:
            break
        chosen.append(candidate.key)
        wanted -= candidate.size
    return chosen
