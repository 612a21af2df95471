"""The DHT as the rest of the node uses it: a thin trio driver around `rpc.Engine` and `lookup.Lookup`.

`DhtNode.run` receives, keeps time, joins and keeps the table; `publish` and `collect` are lookups on behalf of
`announce.Announcer`.  Nothing here raises because the network is bad: what was not found is missing from the result.
"""

from __future__ import annotations

import ipaddress
import math
import os
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from swarm.dht import messages, state
from swarm.dht.addresses import Scope, advertised, may_contact, pack, scope_of, unpack
from swarm.dht.lookup import Lookup
from swarm.dht.messages import Answer, Contacts, Providers, Query, Stored
from swarm.dht.records import NEAREST, Outcome, ProviderRecord
from swarm.dht.routing import Contact
from swarm.dht.rpc import ALPHA, Engine, EngineStatistics, K
from swarm.edges import Address, DatagramTransport, Membership, NodeId
from swarm.errors import ConfigError, IntegrityError, RemoteProtocolError

_log = structlog.get_logger(__name__)

JOIN_WAIT: Final = 1.5
"""Seconds an announcement or a search waits for the first contact to be found, if there is anybody to join."""
FIRST_RETRY: Final = 0.25
LONGEST_RETRY: Final = 30.0
"""Seconds between attempts to join while we have no contact: from the first to the last, doubling."""
REJOIN_INTERVAL: Final = 60.0
"""Seconds between looks at the join names and lost contacts otherwise: what heals a partition."""
SWEEP_INTERVAL: Final = 600.0
"""A contact not heard for so long is asked whether it is still there."""
REFRESH_INTERVAL: Final = 1800.0
"""Seconds between lookups of a random id, which fill the buckets nobody asked about."""
EARLY_REFRESHES: Final = (1.0, 5.0)
"""Seconds after joining at which we look around again: whoever started together has joined by then."""
MAX_JOIN_ADDRESSES: Final = 64
"""A headless service of a thousand pods resolves to a thousand addresses; some of them are enough."""
RESOLVE_LIMIT: Final = 10.0
MAX_LOST: Final = 64
MAX_SAVED: Final = 64
LOOKUP_LIMIT: Final = 10.0
"""Seconds for a whole lookup; far above what one takes, so only an adversary's trickle of names reaches it."""
MAX_MEMBERS: Final = 256
"""Members taken from one search; a mesh needs 24 and neighbours 16."""
PAGE_RECORDS: Final = 6
"""About how many records fit in an answer: storers are asked for pages that many apart, all at once."""

Resolve = Callable[[str, int], Awaitable[list[Address]]]


@dataclass(frozen=True, slots=True)
class _Page:
    """One storer has told us its records number [start, stop), and how many it knows of."""

    storer: bytes
    start: int
    stop: int
    count: int


@dataclass(slots=True, eq=False)
class Search:
    """What one search has found so far; it grows while it is under way.

    Attributes:
        members: Verified, current records by public key.
        holders: Who stores our record, by node id.
        count: How many members the storers know of.
        reached: Set at the first success: somebody stored our record or told us of members.
        finished: Set when everybody who is asked has answered or failed.
    """

    key: bytes
    pages: list[_Page] = field(default_factory=list)
    members: dict[bytes, ProviderRecord] = field(default_factory=dict)
    holders: dict[bytes, Contact] = field(default_factory=dict)
    count: int = 0
    reached: trio.Event = field(default_factory=trio.Event)
    finished: trio.Event = field(default_factory=trio.Event)


class DhtNode:
    """One node of the DHT.  `run` must be running for anything to happen."""

    def __init__(
        self,
        transport: DatagramTransport,
        membership: Membership,
        *,
        rng: random.Random,
        join: Sequence[str] = (),
        state_path: Path | None = None,
        advertise: Sequence[str] = (),
        wall: Callable[[], float] = time.time,
        randbytes: Callable[[int], bytes] = os.urandom,
        resolve: Resolve | None = None,
        low_ports: bool = False,
        k: int = K,
    ) -> None:
        """Make a node; nothing is sent before `run`.

        Args:
            transport: Closed by whoever made it.
            rng: For choices and jitter only; secrets come from `randbytes`.
            join: ``host:port`` or ``[v6]:port``; a name stands for all its addresses and is looked up again and again.
            state_path: Where contacts are kept between runs (CBOR).
            advertise: Hosts known to be ours, beside what others report.

        Raises:
            ConfigError: An entry of `join` is not of that form, or one of `advertise` not an address.
        """
        self._transport = transport
        self._rng = rng
        self._join = [split_host_port(entry) for entry in join]
        self._state_path = state_path
        self._resolve = resolve or _resolve
        self._low_ports = low_ports
        local = transport.local_address.host
        fixed = [*advertised(advertise), *([local] if scope_of(local) is not Scope.FORBIDDEN else [])]
        self.engine = Engine(
            membership,
            rng=rng,
            randbytes=randbytes,
            wall=wall,
            fixed_hosts=tuple(dict.fromkeys(fixed)),
            source_towards=getattr(transport, "source_towards", lambda address: None),
            low_ports=low_ports,
            k=k,
        )
        self.engine.on_lost = self._lost_contact
        self._lost: deque[Contact] = deque(maxlen=MAX_LOST)
        self._saved = self._load()
        self._joined = trio.Event()
        self._to_send = trio.Event()
        self._wake = trio.Event()
        self._sleeping_until = math.inf
        self._warned_of_skew = False

    # --- running ----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then the contacts are saved."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                nursery.start_soon(self._receive)
                nursery.start_soon(self._keep_time)
                nursery.start_soon(self._stay_joined)
                nursery.start_soon(self._sweep)
                nursery.start_soon(self._refresh)
                task_status.started()
        finally:
            self._save()

    async def wait_joined(self) -> None:
        """Wait until the first attempt to join has ended, well or badly, at most `JOIN_WAIT` seconds."""
        if not self._joined.is_set():
            with trio.move_on_after(JOIN_WAIT):
                await self._joined.wait()

    @property
    def hosts(self) -> tuple[str, ...]:
        """Where others reach us, as far as we know."""
        return self.engine.own.hosts()

    @property
    def contacts(self) -> int:
        return len(self.engine.table)

    def known(self) -> list[tuple[NodeId, Address]]:
        """Contacts that proved their id and address; the control port has the same number as the DHT's."""
        return [(contact.id, contact.address) for contact in self.engine.table.contacts()]

    async def sample(self) -> list[tuple[NodeId, Address]]:
        """Nodes near a random id that answered, like `known`."""
        return [(contact.id, contact.address) for contact in await self.find_nodes(self._rng.randbytes(20))]

    def statistics(self) -> EngineStatistics:
        return self.engine.statistics(trio.current_time())

    async def _receive(self) -> None:
        while True:
            datagram, address = await self._transport.receive()
            self.engine.receive(datagram, address, trio.current_time())
            self._act()

    async def _send(self) -> None:
        """The only sender: a task that is cancelled after it asked must not take its question off the queue with it."""
        outgoing = self.engine.outgoing
        while True:
            while outgoing:
                await self._transport.send(*outgoing.popleft())
            self._to_send = trio.Event()
            await self._to_send.wait()

    def _act(self) -> None:
        """Do what the engine decided: send, and wake up in time."""
        if self.engine.outgoing:
            self._to_send.set()
        if self.engine.next_deadline() < self._sleeping_until:
            self._wake.set()

    async def _keep_time(self) -> None:
        while True:
            self._wake = trio.Event()
            self._sleeping_until = self.engine.next_deadline()
            with trio.move_on_at(self._sleeping_until):
                await self._wake.wait()
            self.engine.on_time(trio.current_time())
            self._act()

    # --- asking -----------------------------------------------------------------------------------------------------

    async def _ask(
        self,
        build: Callable[[bytes, bytes, bytes], Query],
        expect: type[Answer],
        contact: Contact,
        on_slow: Callable[[], None] | None = None,
    ) -> Answer | None:
        """One question; `None` after the last time-out.  If this is cancelled, the engine still waits and learns."""
        event = trio.Event()
        result: list[Answer | None] = []

        def done(answer: Answer | None) -> None:
            result.append(answer)
            event.set()

        self.engine.ask(build, expect, contact.address, trio.current_time(), done, node_id=contact.id)
        self._act()
        if on_slow is not None:
            with trio.move_on_after(self.engine.slow_after(contact.address)):
                await event.wait()
            if not event.is_set():
                on_slow()
        await event.wait()
        return result[0]

    async def _prove(self, address: Address) -> Contact | None:
        event = trio.Event()
        result: list[Contact | None] = []

        def done(contact: Contact | None) -> None:
            result.append(contact)
            event.set()

        self.engine.ask_for_proof(address, trio.current_time(), done)
        self._act()
        await event.wait()
        return result[0]

    def _named(self, answer: Answer, by: Contact) -> list[Contact]:
        """Contacts an answer names, without those nobody should send to and those who are silent."""
        if not isinstance(answer, Contacts | Providers):
            return []
        now = trio.current_time()
        from_loopback = scope_of(by.address.host) is Scope.LOOPBACK
        named = []
        for node_id, packed in answer.contacts:
            try:
                address = unpack(packed)
            except RemoteProtocolError:
                continue
            if may_contact(address, from_loopback=from_loopback, low_ports=self._low_ports) and not self.engine.table.is_silent(
                address, now
            ):
                named.append(self.engine.table.at(address) or Contact(node_id, address))
        return named

    async def _walk(
        self,
        target: bytes,
        query: Callable[[bytes, bytes, bytes], Query],
        expect: type[Answer],
        on_answer: Callable[[Lookup, Contact, Answer], None],
    ) -> Lookup:
        """Look up the contacts nearest to `target`, asking each the same question."""
        engine = self.engine
        # More than k, so that there are others to turn to where all that neighbours name is dead.
        known = engine.table.nearest(target, 3 * engine.k)
        lookup = Lookup(target, engine.node_id, known, k=engine.k, alpha=ALPHA)
        with trio.move_on_after(LOOKUP_LIMIT):
            async with trio.open_nursery() as nursery:

                def go_on() -> None:
                    if lookup.done:
                        nursery.cancel_scope.cancel()
                        return
                    for contact in lookup.next_queries():
                        nursery.start_soon(ask, contact)

                def slow(contact: Contact) -> None:
                    lookup.slow(contact)
                    go_on()

                async def ask(contact: Contact) -> None:
                    answer = await self._ask(query, expect, contact, partial(slow, contact))
                    if answer is None:
                        lookup.failed(contact)
                    else:
                        lookup.answered(contact, self._named(answer, contact))
                        on_answer(lookup, contact, answer)
                    go_on()

                go_on()
        return lookup

    async def find_nodes(self, target: bytes) -> list[Contact]:
        """The k nearest contacts to an id that answer, nearest first."""
        own_id = self.engine.node_id
        lookup = await self._walk(
            target,
            lambda tx, token, padding: messages.FindNode(tx, own_id, token, target, padding),
            Contacts,
            lambda lookup, contact, answer: None,
        )
        return lookup.nearest()

    # --- providers --------------------------------------------------------------------------------------------------

    async def collect(self, search: Search) -> None:
        """Find the members of a key: a lookup, then the pages its answers did not have room for."""
        await self.wait_joined()
        self._take_local(search)
        lookup = await self._walk(search.key, self._find_providers(search.key, 0), Providers, partial(self._take, search))
        await self.complete(search, lookup.nearest())
        search.finished.set()

    async def publish(self, search: Search, record: Callable[[], bytes | None]) -> None:
        """Store our record at the k nearest to a key, and collect its members from the same answers.

        Each contact is given the record as soon as it has answered and is still among the nearest, so the answers to
        that show whoever came before us: of two that announce at once, at least one sees the other.

        Args:
            record: Makes the record, called once the first answer has told us where we are reached.
        """
        await self.wait_joined()
        self._take_local(search)
        started: set[Contact] = set()
        async with trio.open_nursery() as stores:

            def store(contact: Contact) -> None:
                if contact not in started:
                    cursor = len(started) * PAGE_RECORDS % NEAREST
                    started.add(contact)
                    stores.start_soon(self._store, search, contact, record, cursor)

            def answered(lookup: Lookup, contact: Contact, answer: Answer) -> None:
                self._take(search, lookup, contact, answer)
                if lookup.is_near(contact):
                    store(contact)

            lookup = await self._walk(search.key, self._find_providers(search.key, 0), Providers, answered)
            nearest = lookup.nearest()
            for contact in nearest:
                store(contact)
            self._store_here(search.key, nearest, record)
        await self.complete(search, nearest)
        search.finished.set()

    async def republish(self, search: Search, record: Callable[[], bytes | None], holders: Sequence[Contact]) -> None:
        """Store our record at holders known from before, without looking them up."""
        self._take_local(search)
        async with trio.open_nursery() as stores:
            for number, contact in enumerate(holders):
                stores.start_soon(self._store, search, contact, record, number * PAGE_RECORDS % NEAREST)
            self._store_here(search.key, holders, record)
        search.finished.set()

    async def complete(self, search: Search, holders: Sequence[Contact]) -> None:
        """Ask holders for the pages of the nearest members that none of them has told yet, all at once.

        Storers near the key have the same `records.NEAREST` in the same order, so it does not matter who tells which.
        """
        for _ in range(3):
            missing = _missing(search, holders)
            if not holders or not missing:
                return
            async with trio.open_nursery() as nursery:
                for number, (start, stop) in enumerate(missing):
                    nursery.start_soon(self._read, search, holders[number % len(holders)], start, stop)

    async def reread(self, search: Search, holders: Sequence[Contact]) -> None:
        """Ask holders for the nearest members again: others have announced since."""
        search.pages.clear()
        await self.complete(search, holders)

    async def _read(self, search: Search, contact: Contact, start: int, stop: int) -> None:
        while start < stop:
            answer = await self._ask(self._find_providers(search.key, start), Providers, contact)
            if not isinstance(answer, Providers):
                return
            self._take_page(search, contact, start, answer)
            if answer.cursor <= start:
                return
            start = answer.cursor

    async def withdraw(self, holders: Sequence[Contact], record: bytes) -> None:
        """Give a signed withdrawal to holders, all at once; also to our own store."""
        own_id = self.engine.node_id
        public_key, body = self.engine.verifier.withdrawal(record)
        now = trio.current_time()
        self.engine.store.withdraw(public_key, body, body.expires - body.issued, now)

        def build(tx: bytes, token: bytes, padding: bytes) -> Query:
            return messages.Withdraw(tx, own_id, token, record, padding)

        async with trio.open_nursery() as nursery:
            for contact in holders:
                nursery.start_soon(self._ask_with_token, build, contact)

    def _find_providers(self, key: bytes, cursor: int) -> Callable[[bytes, bytes, bytes], Query]:
        own_id = self.engine.node_id
        return lambda tx, token, padding: messages.FindProviders(tx, own_id, token, key, cursor, padding)

    async def _ask_with_token(self, build: Callable[[bytes, bytes, bytes], Query], contact: Contact) -> Stored | None:
        """Ask what needs a token, and once more with the fresh one of the answer if ours was missing or too old."""
        for _ in range(2):
            answer = await self._ask(build, Stored, contact)
            if not isinstance(answer, Stored) or answer.status != messages.BAD_TOKEN:
                return answer if isinstance(answer, Stored) else None
        return None

    async def _store(self, search: Search, contact: Contact, record: Callable[[], bytes | None], cursor: int) -> None:
        raw = record()
        if raw is None:
            return
        self._take_records(search, [raw], 0)
        own_id = self.engine.node_id

        def build(tx: bytes, token: bytes, padding: bytes) -> Query:
            return messages.Announce(tx, own_id, token, raw, cursor, padding)

        answer = await self._ask_with_token(build, contact)
        if answer is None:
            return
        if answer.status == messages.STORED:
            search.holders[contact.id] = contact
            search.reached.set()
        self._take_page(search, contact, cursor, answer)

    def _store_here(self, key: bytes, nearest: Sequence[Contact], record: Callable[[], bytes | None]) -> None:
        """We store our own record where anybody else would store it with us."""
        point = int.from_bytes(key, "big")
        own_distance = int.from_bytes(self.engine.node_id, "big") ^ point
        if len(nearest) >= self.engine.k and own_distance > nearest[-1].distance(point):
            return
        raw = record()
        if raw is not None:
            checked = self.engine.verifier.provider(raw)
            now = trio.current_time()
            outcome = self.engine.store.put(checked, "", checked.body.expires - checked.body.issued, now)
            if outcome is not Outcome.STORED:
                _log.debug("own record not kept here", outcome=outcome.name)

    def _take(self, search: Search, lookup: Lookup, contact: Contact, answer: Answer) -> None:
        if isinstance(answer, Providers):
            self._take_page(search, contact, 0, answer)

    def _take_page(self, search: Search, contact: Contact, start: int, answer: Providers | Stored) -> None:
        if answer.records or answer.count <= 1:  # our own record, if that is the one, is left out
            search.pages.append(_Page(contact.id, start, answer.cursor or NEAREST, answer.count))
        self._take_records(search, answer.records, answer.count)

    def _take_local(self, search: Search) -> None:
        now = trio.current_time()
        for record in self.engine.store.records(search.key, now):
            self._take_record(search, record, now)

    def _take_records(self, search: Search, records_untrusted: Sequence[bytes], count: int) -> None:
        now = trio.current_time()
        search.count = max(search.count, count)
        for raw in records_untrusted:
            try:
                self._take_record(search, self.engine.verifier.provider(raw), now)
            except (RemoteProtocolError, IntegrityError):
                continue
        self._warn_of_skew(now)

    def _take_record(self, search: Search, record: ProviderRecord, now: float) -> None:
        body = record.body
        if body.key != search.key or self.engine.remaining(record.node_id, body, now) <= 0:
            return
        known = search.members.get(record.public_key)
        if known is None and len(search.members) >= MAX_MEMBERS:
            return
        if known is None or known.body.seq < body.seq:
            search.members[record.public_key] = record
            if record.node_id != self.engine.node_id:
                search.reached.set()

    def _warn_of_skew(self, now: float) -> None:
        if not self._warned_of_skew and self.engine.clock.is_wrong(now):
            self._warned_of_skew = True
            skew = round(self.engine.clock.skew(now))
            _log.warning("our clock differs from the other nodes'; downloads go on, set the clock", seconds_ahead=skew)

    # --- joining ----------------------------------------------------------------------------------------------------

    async def _stay_joined(self) -> None:
        retry = FIRST_RETRY
        while True:
            await self._knock_everywhere()
            self._joined.set()
            if self.contacts or not (self._join or self._lost):
                retry = FIRST_RETRY
                await trio.sleep(REJOIN_INTERVAL * self._rng.uniform(0.8, 1.2))
            else:
                await trio.sleep(retry * self._rng.uniform(0.8, 1.2))
                retry = min(2 * retry, LONGEST_RETRY)

    async def _knock_everywhere(self) -> None:
        """Ask for proof wherever a contact may be found and is not in the table; look around as soon as one is.

        A join name that is slow to resolve, or an address that is dead, holds up nobody else.
        """
        tried: set[Address] = set()
        looked = False

        async with trio.open_nursery() as nursery:

            async def knock(address: Address) -> None:
                nonlocal looked
                if await self._prove(address) is not None and not looked:
                    looked = True
                    await self._look_around()
                    self._joined.set()

            def knock_at(addresses: list[Address]) -> None:
                for address in addresses:
                    if address not in tried and self.engine.table.at(address) is None:
                        tried.add(address)
                        nursery.start_soon(knock, address)

            async def resolve(host: str, port: int) -> None:
                try:
                    with trio.move_on_after(RESOLVE_LIMIT):
                        found = await self._resolve(host, port)
                        self._rng.shuffle(found)
                        knock_at(found[:MAX_JOIN_ADDRESSES])
                except OSError as error:
                    _log.debug("a join name does not resolve", name=host, error=str(error))

            knock_at(self._saved + [contact.address for contact in self._lost][-8:])
            self._saved = []
            for host, port in self._join:
                nursery.start_soon(resolve, host, port)

    async def _look_around(self) -> None:
        """Look up our own id, then one in each part of the id space of which we know too little.

        Section 2.3 of the paper refreshes every bucket on joining; without, whole regions may know nobody in another,
        and lookups that pass through them end there.
        """
        await self.find_nodes(self.engine.node_id)
        async with trio.open_nursery() as nursery:
            for target in self.engine.table.sparse():
                nursery.start_soon(self.find_nodes, target)

    async def _refresh(self) -> None:
        await self._joined.wait()
        for delay in EARLY_REFRESHES:
            await trio.sleep(delay * self._rng.uniform(0.8, 1.2))
            await self._look_around()
        while True:
            await trio.sleep(REFRESH_INTERVAL * self._rng.uniform(0.8, 1.2))
            await self.find_nodes(self._rng.randbytes(20))
            await self._look_around()

    async def _sweep(self) -> None:
        while True:
            now = trio.current_time()
            self.engine.store.expire(now)
            due = sorted(self.engine.table.contacts(), key=lambda contact: contact.last_seen)
            stale = [contact for contact in due if contact.last_seen + SWEEP_INTERVAL <= now]
            async with trio.open_nursery() as nursery:
                for contact in stale[:32]:
                    nursery.start_soon(self._prove, contact.address)
            await trio.sleep(SWEEP_INTERVAL / 20 * self._rng.uniform(0.8, 1.2))

    def _lost_contact(self, contact: Contact) -> None:
        if contact not in self._lost:
            self._lost.append(contact)

    # --- state ------------------------------------------------------------------------------------------------------

    def _load(self) -> list[Address]:
        kept = state.load(self._state_path).get("contacts", [])
        addresses = []
        for packed in kept[:MAX_SAVED] if isinstance(kept, list) else []:
            if isinstance(packed, bytes) and len(packed) in (6, 18):
                addresses.append(unpack(packed))
        return addresses

    def _save(self) -> None:
        if self._state_path is not None and self.contacts:
            recent = sorted(self.engine.table.contacts(), key=lambda contact: -contact.last_seen)[:MAX_SAVED]
            state.save(self._state_path, {"contacts": [pack(contact.address) for contact in recent]})


def _missing(search: Search, holders: Sequence[Contact]) -> list[tuple[int, int]]:
    """Which of the nearest members' numbers no holder has told us yet, as ranges of `PAGE_RECORDS` at most.

    A holder that knows far fewer than others numbers them differently, and does not count.
    """
    storers = {contact.id for contact in holders}
    wanted = min(search.count, NEAREST)
    told = bytearray(NEAREST)
    for page in search.pages:
        if page.storer in storers and 5 * page.count >= 4 * search.count:
            told[page.start : page.stop] = b"\1" * len(told[page.start : page.stop])
    ranges: list[tuple[int, int]] = []
    number = 0
    while number < wanted:
        if told[number]:
            number += 1
            continue
        stop = number
        while stop < min(wanted, number + PAGE_RECORDS) and not told[stop]:
            stop += 1
        ranges.append((number, stop))
        number = stop
    return ranges


def split_host_port(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``.

    Raises:
        ConfigError: Anything else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536 or not host:
        raise ConfigError(f"{text!r} is not host:port; write for example node1.example:7400 or [fd00::1]:7400")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{text!r}: write an IPv6 address in brackets, for example [{host}]:{port}")
    return host, int(port)


async def _resolve(host: str, port: int) -> list[Address]:
    """All addresses of a name, IPv4-mapped ones unwrapped; literals without asking anybody."""
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_DGRAM)
        return list(dict.fromkeys(_canonical(str(item[4][0]), port) for item in found))
    return [_canonical(str(literal), port)]


def _canonical(host: str, port: int) -> Address:
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return Address(str(ip), port)
