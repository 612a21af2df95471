"""Signed provider records, and the store that keeps other nodes' records for a while.

A record says "this key's owner has the task of that DHT key, in this state, and listens there".  It is a hint: the
storer and the reader check the signature, but membership is proven only when somebody connects.  Signatures are no
quota (anybody who can make keys can make records), so the store bounds records a key, a signer, a source host, and in
all; nothing in it is ever passed on to other storers.

Seconds are monotonic, but for `issued` and `expires` inside signed bodies.
"""

from __future__ import annotations

import bisect
import enum
import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Final

from msgspec import Meta, Struct

from swarm import wire
from swarm.dht import messages
from swarm.dht.addresses import pack_host, unpack_host
from swarm.edges import Address, Membership, State
from swarm.errors import RemoteProtocolError
from swarm.identity import node_id_of, verify

LIFETIME: Final = {State.WANTS: 600, State.PARTIAL: 600, State.COMPLETE: 7200, State.SEED: 7200}
"""Seconds from `issued` to `expires`; a storer keeps nothing longer, whatever the record claims."""

MAX_HOSTS: Final = 4
"""Two families, inside and outside; keeps the largest record under `messages.MAX_RECORD_BYTES`."""

NEAREST: Final = 24
"""Members nearest to the key: the mesh that shares out reads of the origin, hence the same on every storer."""

MAX_PER_KEY: Final = 64
MAX_PER_SIGNER: Final = 4096
"""A quarter of the store: no key pair may push everybody else out."""
MAX_PER_SOURCE: Final = 4096
"""The same for one host, which may make as many key pairs as it likes (go-libp2p's CVE-2023-40583)."""
MAX_RECORDS: Final = 16_384
MAX_UNLISTED: Final = 16_384
"""Members counted beyond the 64 kept of a key, over all keys; 8 bytes of identity each, so that counts stay true."""
MAX_TOMBSTONES: Final = 16_384
MAX_FLOORS: Final = 4096
"""Signers of whom "forget everything" is remembered."""

_PRUNE_INTERVAL: Final = 10.0
_KIND: Final = "provider"
_WITHDRAW_KIND: Final = "withdraw"

Host = Annotated[bytes, Meta(min_length=4, max_length=16)]
Seq = Annotated[int, Meta(ge=0, lt=1 << 62)]


class ProviderBody(Struct, frozen=True, array_like=True):
    """Kind ``provider``.  `key` is the task's DHT key; `port` the control port at each of `hosts`."""

    key: wire.Bytes20
    hosts: Annotated[list[Host], Meta(min_length=1, max_length=MAX_HOSTS)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    state: Annotated[int, Meta(ge=0, le=3)]
    seq: Seq
    issued: messages.Time
    expires: messages.Time


class WithdrawBody(Struct, frozen=True, array_like=True):
    """Kind ``withdraw``: nothing below `seq` holds any more, for one key, or (empty key) for all of the signer's."""

    key: Annotated[bytes, Meta(max_length=20)]
    seq: Seq
    issued: messages.Time
    expires: messages.Time


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """A record whose signature was checked; whether it is current is the clock's business."""

    raw: bytes = field(repr=False)
    public_key: bytes
    node_id: bytes
    body: ProviderBody

    @property
    def control(self) -> tuple[Address, ...]:
        return tuple(Address(unpack_host(host), self.body.port) for host in self.body.hosts)


def sign_provider(
    membership: Membership, key: bytes, hosts: Iterable[str], port: int, state: State, seq: int, issued: int
) -> bytes:
    """A record of our own, encoded; the first `MAX_HOSTS` hosts go in."""
    packed = [pack_host(host) for host in itertools.islice(hosts, MAX_HOSTS)]
    body = ProviderBody(key, packed, port, int(state), seq, issued, issued + LIFETIME[state])
    return wire.encode(membership.sign(_KIND, body))


def sign_withdrawal(membership: Membership, key: bytes, seq: int, issued: int) -> bytes:
    """A withdrawal of our own, encoded; an empty key withdraws everything.  It outlives whatever it withdraws."""
    body = WithdrawBody(key, seq, issued, issued + LIFETIME[State.SEED])
    return wire.encode(membership.sign(_WITHDRAW_KIND, body))


class Verifier:
    """Checks signatures, and remembers the records it checked lately: eight storers give the same ones.

    What fails is not remembered, so rubbish cannot push good records out.
    """

    MAX_REMEMBERED: Final = 1024

    def __init__(self, network_id: bytes) -> None:
        self._network_id = network_id
        self._known: OrderedDict[bytes, ProviderRecord] = OrderedDict()

    def provider(self, raw_untrusted: bytes) -> ProviderRecord:
        """Check a provider record.

        Raises:
            RemoteProtocolError: Malformed.
            IntegrityError: Not this key's signature in this network.
        """
        if (known := self._known.get(raw_untrusted)) is not None:
            self._known.move_to_end(raw_untrusted)
            return known
        signed = wire.decode(raw_untrusted, wire.Signed, max_bytes=messages.MAX_RECORD_BYTES)
        verify(_KIND, self._network_id, signed)
        body = wire.decode(signed.body, ProviderBody)
        if body.expires - body.issued > LIFETIME[State(body.state)]:
            raise RemoteProtocolError(f"a provider record that would live {body.expires - body.issued} s")
        for host in body.hosts:
            unpack_host(host)
        record = ProviderRecord(raw_untrusted, signed.key, node_id_of(signed.key), body)
        self._known[raw_untrusted] = record
        if len(self._known) > self.MAX_REMEMBERED:
            self._known.popitem(last=False)
        return record

    def withdrawal(self, raw_untrusted: bytes) -> tuple[bytes, WithdrawBody]:
        """Check a withdrawal; the signer's public key and what it says.

        Raises:
            RemoteProtocolError: Malformed.
            IntegrityError: Not this key's signature in this network.
        """
        signed = wire.decode(raw_untrusted, wire.Signed, max_bytes=messages.MAX_RECORD_BYTES)
        verify(_WITHDRAW_KIND, self._network_id, signed)
        body = wire.decode(signed.body, WithdrawBody)
        if len(body.key) not in (0, 20) or body.expires - body.issued > LIFETIME[State.SEED]:
            raise RemoteProtocolError("a withdrawal of no key, or for too long")
        return signed.key, body


class Outcome(enum.IntEnum):
    """What became of a record; the numbers travel in `messages.Stored`."""

    STORED = messages.STORED
    OUTDATED = messages.OUTDATED
    FULL = messages.FULL


@dataclass(slots=True, eq=False)
class _Entry:
    record: ProviderRecord
    distance: int
    expires: float
    source: str
    alive: bool = True


@dataclass(slots=True)
class _Shelf:
    """The records of one key: `order` by the signer's distance to it, so that pages read alike on every storer."""

    by_signer: dict[bytes, _Entry] = field(default_factory=dict)
    order: list[tuple[int, bytes]] = field(default_factory=list)
    unlisted: dict[bytes, float] = field(default_factory=dict)
    """First 8 bytes of the ids of members that found no room, and when they expire."""
    pruned: float = 0.0


class ProviderStore:
    """Other nodes' provider records, and our own where we are among the nearest to a key.

    All limits hold after every call.  Expired records are dropped when they are next looked at, and by `expire`.
    """

    def __init__(self, own_id: bytes, rng: random.Random, *, max_records: int = MAX_RECORDS) -> None:
        self._own = int.from_bytes(own_id, "big")
        self._rng = rng
        self._max_records = max_records
        self._shelves: dict[bytes, _Shelf] = {}
        self._count = 0
        self._unlisted = 0
        self._by_signer: dict[bytes, set[bytes]] = {}
        self._per_source: dict[str, int] = {}
        self._farthest: list[tuple[int, int, _Entry]] = []
        self._expiring: list[tuple[float, int, _Entry]] = []
        self._serial = itertools.count()
        self._tombstones: OrderedDict[tuple[bytes, bytes], tuple[int, float]] = OrderedDict()
        self._floors: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    @property
    def keys(self) -> int:
        return len(self._shelves)

    def put(self, record: ProviderRecord, source: str, remaining: float, now: float) -> Outcome:
        """Keep a verified record.

        Args:
            source: The proven host it came from, whose quota it counts against.
            remaining: Seconds until it expires, by the clock that judged it; cut to its state's lifetime.
        """
        body = record.body
        self.expire(now)
        if body.seq < self._least_seq(body.key, record.public_key, now):
            return Outcome.OUTDATED
        shelf = self._shelves.get(body.key)
        old = shelf.by_signer.get(record.public_key) if shelf else None
        if old is not None:
            if body.seq < old.record.body.seq:
                return Outcome.OUTDATED
            self._remove(old)
        entry = _Entry(
            record,
            int.from_bytes(record.node_id, "big") ^ int.from_bytes(body.key, "big"),
            now + min(remaining, LIFETIME[State(body.state)]),
            source,
        )
        if not self._within_quotas(entry) or not self._make_room_on_shelf(entry, now) or not self._make_room(entry):
            return Outcome.FULL
        self._add(entry)
        return Outcome.STORED

    def withdraw(self, public_key: bytes, body: WithdrawBody, remaining: float, now: float) -> Outcome:
        """Forget what a verified withdrawal names; until it expires, older records of it are refused."""
        until = now + min(remaining, LIFETIME[State.SEED])
        if not body.key:
            self._forget_signer(public_key, body.seq, until)
            return Outcome.STORED
        if body.seq < self._least_seq(body.key, public_key, now):
            return Outcome.OUTDATED
        shelf = self._shelves.get(body.key)
        if shelf is not None and (old := shelf.by_signer.get(public_key)) is not None:
            if old.record.body.seq > body.seq:
                return Outcome.OUTDATED
            self._remove(old)
        shelf = self._shelves.get(body.key)
        if shelf is not None and shelf.unlisted.pop(node_id_of(public_key)[:8], None) is not None:
            self._unlisted -= 1
        self._tombstones[(body.key, public_key)] = (body.seq, until)
        while len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        return Outcome.STORED

    def page(self, key: bytes, cursor: int, room: int, now: float, *, without: bytes = b"") -> tuple[list[bytes], int, int]:
        """Records of a key from number `cursor` on (from the first if there are not so many).

        Args:
            room: Bytes the records may take in the answer.
            without: A public key whose record the asker does not need.

        Returns:
            Encoded records, where the next page begins (0: nowhere), and how many members are known in all.
        """
        self.expire(now)
        shelf = self._shelves.get(key)
        if shelf is None:
            return [], 0, 0
        if cursor >= len(shelf.order):
            cursor = 0
        page: list[bytes] = []
        for _, signer in shelf.order[cursor:]:
            raw = shelf.by_signer[signer].record.raw
            if signer != without:
                if len(raw) + 3 > room or len(page) == messages.MAX_RECORDS:
                    break
                page.append(raw)
                room -= len(raw) + 3
            cursor += 1
        more = cursor if cursor < len(shelf.order) and page else 0
        return page, more, len(shelf.order) + self._count_unlisted(shelf, now)

    def records(self, key: bytes, now: float) -> list[ProviderRecord]:
        """All records kept of a key, nearest signers first."""
        self.expire(now)
        shelf = self._shelves.get(key)
        return [] if shelf is None else [shelf.by_signer[signer].record for _, signer in shelf.order]

    def expire(self, now: float) -> None:
        """Drop what has expired."""
        while self._expiring and (self._expiring[0][0] <= now or not self._expiring[0][2].alive):
            entry = heapq.heappop(self._expiring)[2]
            if entry.alive:
                self._remove(entry)

    # --- room ---------------------------------------------------------------------------------------------------

    def _least_seq(self, key: bytes, public_key: bytes, now: float) -> int:
        """Records below this seq are known to be withdrawn."""
        least = 0
        for seq, until in (self._tombstones.get((key, public_key), (-1, 0.0)), self._floors.get(public_key, (-1, 0.0))):
            if until > now:
                least = max(least, seq + 1)
        return least

    def _within_quotas(self, entry: _Entry) -> bool:
        return (
            len(self._by_signer.get(entry.record.public_key, ())) < MAX_PER_SIGNER
            and self._per_source.get(entry.source, 0) < MAX_PER_SOURCE
        )

    def _make_room_on_shelf(self, entry: _Entry, now: float) -> bool:
        """The nearest always find room; of the others a random sample is kept, all of them are counted."""
        shelf = self._shelves.get(entry.record.body.key)
        if shelf is None or len(shelf.order) < MAX_PER_KEY:
            return True
        known = len(shelf.order) + self._count_unlisted(shelf, now)
        is_near = entry.distance < shelf.order[NEAREST - 1][0]
        if not is_near and self._rng.random() * (known + 1 - NEAREST) >= MAX_PER_KEY - NEAREST:
            self._count_only(shelf, entry)
            return False
        victim = shelf.by_signer[shelf.order[self._rng.randrange(NEAREST - is_near, MAX_PER_KEY)][1]]
        self._remove(victim)
        self._count_only(shelf, victim)
        return True

    def _count_only(self, shelf: _Shelf, entry: _Entry) -> None:
        identity = entry.record.node_id[:8]
        if identity not in shelf.unlisted:
            if self._unlisted >= MAX_UNLISTED:
                return
            self._unlisted += 1
        shelf.unlisted[identity] = entry.expires

    def _count_unlisted(self, shelf: _Shelf, now: float) -> int:
        """Looked through at most every `_PRUNE_INTERVAL`, so that asking for a popular key costs us nothing."""
        if now >= shelf.pruned + _PRUNE_INTERVAL:
            shelf.pruned = now
            gone = [identity for identity, expires in shelf.unlisted.items() if expires <= now]
            for identity in gone:
                del shelf.unlisted[identity]
            self._unlisted -= len(gone)
        return len(shelf.unlisted)

    def _make_room(self, entry: _Entry) -> bool:
        """Over all: the records of the keys farthest from ourselves go first, for nobody looks for them here."""
        while self._count >= self._max_records:
            while not self._farthest[0][2].alive:
                heapq.heappop(self._farthest)
            if -self._farthest[0][0] <= self._own_distance(entry):
                return False
            self._remove(self._farthest[0][2])
        return True

    def _own_distance(self, entry: _Entry) -> int:
        return self._own ^ int.from_bytes(entry.record.body.key, "big")

    # --- bookkeeping ----------------------------------------------------------------------------------------------

    def _add(self, entry: _Entry) -> None:
        record = entry.record
        shelf = self._shelves.setdefault(record.body.key, _Shelf())
        shelf.by_signer[record.public_key] = entry
        bisect.insort(shelf.order, (entry.distance, record.public_key))
        if shelf.unlisted.pop(record.node_id[:8], None) is not None:
            self._unlisted -= 1
        self._count += 1
        self._by_signer.setdefault(record.public_key, set()).add(record.body.key)
        self._per_source[entry.source] = self._per_source.get(entry.source, 0) + 1
        serial = next(self._serial)
        heapq.heappush(self._farthest, (-self._own_distance(entry), serial, entry))
        heapq.heappush(self._expiring, (entry.expires, serial, entry))
        self._compact()

    def _remove(self, entry: _Entry) -> None:
        entry.alive = False
        record = entry.record
        shelf = self._shelves[record.body.key]
        del shelf.by_signer[record.public_key]
        del shelf.order[bisect.bisect_left(shelf.order, (entry.distance, record.public_key))]
        self._count -= 1
        self._by_signer[record.public_key].remove(record.body.key)
        if not self._by_signer[record.public_key]:
            del self._by_signer[record.public_key]
        self._per_source[entry.source] -= 1
        if not self._per_source[entry.source]:
            del self._per_source[entry.source]
        if not shelf.order:
            self._unlisted -= len(shelf.unlisted)
            del self._shelves[record.body.key]

    def _compact(self) -> None:
        """Records replaced before they expire leave dead entries in the heaps: never more than live ones (and 64)."""
        if len(self._farthest) > 2 * self._count + 64:
            self._farthest = [item for item in self._farthest if item[2].alive]
            heapq.heapify(self._farthest)
        if len(self._expiring) > 2 * self._count + 64:
            self._expiring = [item for item in self._expiring if item[2].alive]
            heapq.heapify(self._expiring)

    def _forget_signer(self, public_key: bytes, seq: int, until: float) -> None:
        floor = self._floors.get(public_key, (-1, 0.0))
        self._floors[public_key] = (max(seq, floor[0]), max(until, floor[1]))
        self._floors.move_to_end(public_key)
        while len(self._floors) > MAX_FLOORS:
            self._floors.popitem(last=False)
        for key in list(self._by_signer.get(public_key, ())):
            entry = self._shelves[key].by_signer[public_key]
            if entry.record.body.seq <= seq:
                self._remove(entry)
