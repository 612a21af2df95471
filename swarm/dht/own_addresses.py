"""Which addresses others reach us at, as they report it.

Every answer says where our query seemed to come from.  For each family and scope the address most witnesses report is
ours.  A witness is a host, so that many ids on one host have one vote.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

from swarm.dht.addresses import Scope, scope_of, witness_of
from swarm.edges import Address

MAX_WITNESSES: Final = 64
"""Votes kept of each family and scope; the latest count."""

_Class = tuple[bool, Scope]


def _class_of(host: str) -> _Class:
    return ":" in host, scope_of(host)


class OwnAddresses:
    """Votes about our own hosts; `fixed` ones (bound to, or configured) need none."""

    def __init__(self, fixed: tuple[str, ...] = ()) -> None:
        self._fixed = fixed
        self._votes: dict[_Class, OrderedDict[str, str]] = {}
        self._hosts: tuple[str, ...] | None = None

    def vote(self, witness: Address, observed: Address) -> bool:
        """An answer reported where we are; whether that changed what `hosts` returns."""
        kind = _class_of(observed.host)
        if kind[1] is Scope.FORBIDDEN:
            return False
        name = witness_of(witness)
        votes = self._votes.get(kind)
        if votes is not None and votes.get(name) == observed.host:
            votes.move_to_end(name)
            return False
        before = self.hosts()
        self._hosts = None
        votes = self._votes.setdefault(kind, OrderedDict())
        votes[name] = observed.host
        votes.move_to_end(name)
        while len(votes) > MAX_WITNESSES:
            votes.popitem(last=False)
        return self.hosts() != before

    def believes(self, observed: Address) -> bool:
        """Whether this may be our address: it is, or two witnesses say so, or nobody yet says otherwise.

        A proof that was signed for somebody else's question, and relayed to us, names that somebody's address.
        """
        if observed.host in self._fixed:
            return True
        votes = self._votes.get(_class_of(observed.host))
        if not votes:
            return _class_of(observed.host)[1] is not Scope.FORBIDDEN
        count = Counter(votes.values())
        return count[observed.host] >= 2 or count.most_common(1)[0][0] == observed.host

    def hosts(self) -> tuple[str, ...]:
        """Where to reach us, fixed ones first; loopback only if there is nothing else."""
        if self._hosts is None:
            self._hosts = self._count()
        return self._hosts

    def _count(self) -> tuple[str, ...]:
        voted = []
        for kind in sorted(self._votes, key=lambda kind: (kind[1].value, kind[0])):
            count = Counter(self._votes[kind].values())
            best = max(count.values())
            voted.append(min(host for host, votes in count.items() if votes == best))
        hosts = tuple(dict.fromkeys((*self._fixed, *voted)))
        outside = tuple(host for host in hosts if scope_of(host) is not Scope.LOOPBACK)
        return outside or hosts
