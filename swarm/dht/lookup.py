"""Kademlia's iterative lookup, without I/O: whom to ask next, and when it is over.

After Maymounkov and Mazieres, section 2.3: ask the nearest known, alpha at a time, take in whom they name, until the k
nearest have answered.  One change: a contact that is slow keeps its chance to answer, but no longer its place among the
alpha, and one that is silent makes room for the next, so neither holds up the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from swarm.dht.routing import Contact, Shortlist

MAX_QUERIES: Final = 64
"""A lookup over 10,000 nodes takes about 20; members that keep naming nearer strangers do not get us to go on for ever."""


class Lookup:
    """One lookup.  Call `next_queries`, ask them, report each with `answered`, `slow` or `failed`, and again."""

    def __init__(self, target: bytes, own_id: bytes, contacts: Iterable[Contact], *, k: int, alpha: int) -> None:
        self._own_id = own_id
        self._k = k
        self._alpha = alpha
        self._shortlist = Shortlist(target, k)
        self._asked: set[Contact] = set()
        self._waiting: set[Contact] = set()
        self._slow: set[Contact] = set()
        self._answered: set[Contact] = set()
        for contact in contacts:
            self._shortlist.offer(contact)

    @property
    def queries(self) -> int:
        return len(self._asked)

    def next_queries(self) -> list[Contact]:
        """Contacts to ask now; from here on they count as asked."""
        room = min(self._alpha - len(self._waiting), MAX_QUERIES - len(self._asked))
        chosen = [contact for contact in self._shortlist.nearest() if contact not in self._asked][: max(0, room)]
        self._asked.update(chosen)
        self._waiting.update(chosen)
        return chosen

    def answered(self, contact: Contact, named: Iterable[Contact]) -> None:
        """It answered, and named others (at most k of them count)."""
        self._waiting.discard(contact)
        self._slow.discard(contact)
        self._answered.add(contact)
        for other, _ in zip(named, range(self._k), strict=False):
            if other.id != self._own_id:
                self._shortlist.offer(other)

    def slow(self, contact: Contact) -> None:
        """No answer yet, later than most; it may still come."""
        if contact in self._waiting:
            self._waiting.discard(contact)
            self._slow.add(contact)

    def failed(self, contact: Contact) -> None:
        """No answer, for good."""
        self._waiting.discard(contact)
        self._slow.discard(contact)
        self._shortlist.drop(contact)

    def is_near(self, contact: Contact) -> bool:
        """Whether it is among the k nearest, after what it named itself was taken in.

        A node far from the target knows k nearer ones, and so puts itself out.
        """
        return contact in self._shortlist.nearest()

    def nearest(self) -> list[Contact]:
        """The k nearest of those that answered."""
        return [contact for contact in self._shortlist.nearest() if contact in self._answered]

    @property
    def done(self) -> bool:
        """Nobody is left to ask, and of the k nearest none is still expected to answer."""
        nearest = self._shortlist.nearest()
        if any(contact in self._waiting or contact in self._slow for contact in nearest):
            return False
        return len(self._asked) >= MAX_QUERIES or all(contact in self._asked for contact in nearest)
