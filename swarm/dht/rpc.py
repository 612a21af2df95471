"""The DHT's protocol, without I/O: datagrams and `now` in; datagrams, answers to our questions and a deadline out.

Participants: this node, its contacts (proved their id and address), and strangers (have the group secret, or replay
something of somebody who has).  Goals: answer honest members in one datagram; be of no use as an amplifier, a store of
rubbish or a source of CPU load to anybody else.  Not a goal: to know who is a member, which TLS proves on connecting.

Seconds are monotonic.  Everything a stranger can make grow has a limit, named where it is kept.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar, assert_never

from swarm import wire
from swarm.dht import messages
from swarm.dht.addresses import may_contact, pack, unpack, witness_of
from swarm.dht.admission import TOKEN_FRESH, Admission
from swarm.dht.clock import NetworkClock
from swarm.dht.messages import (
    Announce,
    Answer,
    ContactBody,
    Contacts,
    FindNode,
    FindProviders,
    Ping,
    Pong,
    Providers,
    Query,
    Stored,
    Withdraw,
)
from swarm.dht.own_addresses import OwnAddresses
from swarm.dht.records import ProviderBody, ProviderStore, Verifier, WithdrawBody
from swarm.dht.routing import Contact, Table
from swarm.edges import Address, Membership, NodeId
from swarm.errors import IntegrityError, RemoteProtocolError
from swarm.identity import node_id_of, verify

K: Final = 8
ALPHA: Final = 3

FIRST_TIMEOUT: Final = 1.0
LEAST_TIMEOUT: Final = 0.25
LONGEST_TIMEOUT: Final = 2.0
ATTEMPTS: Final = 3
"""A question is asked so often, half a time-out apart, before its contact counts as silent.

Where 5 % of datagrams are lost, two attempts fail once in a hundred times, and the contact is shunned for `SILENCE`.
"""

LEAST_SLOW: Final = 0.05
"""Seconds after which an answer is later than most, at the least: scheduling noise on a busy machine is not slowness."""

MAX_PENDING: Final = 4096
"""Questions without an answer yet; far above what lookups ask at once, so only a bug reaches it."""
MAX_OUTGOING: Final = 4096
"""Datagrams the socket has not taken yet; beyond, they are lost as on any full link."""
MAX_VETTING: Final = 256
"""Proofs asked for at once of nodes that came to us by themselves; as many again of those with a good token."""
VETTING_PAUSE: Final = 10.0
"""Seconds before the same stranger is asked for its proof again."""
OURSELVES_PAUSE: Final = 600.0
"""Seconds for which an address that turned out to be our own is not asked again."""
MAX_REMEMBERED: Final = 4096
"""Addresses of which a round trip time, a token or a refused proof is remembered."""

_PROOF: Final = "contact"
# Upper bounds of what an answer takes beside its lists: header, kind, transaction, observed address, token, time,
# count, cursor, status and the CBOR around them; and of one contact.
_FIXED_BYTES: Final = 92
_CONTACT_BYTES: Final = 42
_PLAIN_PING_BYTES: Final = 124
"""An upper bound too: what an answer to a stranger leaves of its allowance, for asking who it is."""

Done = Callable[[Answer | None], None]
Build = Callable[[bytes, bytes, bytes], Query]
"""Makes a query of a transaction, a token and padding."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Counts since start.  `dropped` is by reason; bytes are UDP payload."""

    contacts: int
    records: int
    keys: int
    datagrams_in: int
    datagrams_out: int
    bytes_in: int
    bytes_out: int
    timeouts: int
    clock_skew: float
    hosts: tuple[str, ...]
    dropped: dict[str, int]
    queries: dict[str, int]


@dataclass(slots=True, eq=False)
class _Pending:
    address: Address
    node_id: bytes | None
    build: Build
    expect: type[Answer]
    done: Done
    attempts: int
    to_stranger: bool
    deadline: float = 0.0
    finished: bool = False
    sent: dict[bytes, float] = field(default_factory=dict)
    """When each transaction was sent: an answer to the first question must not be timed from the second."""


class Engine:
    """One node's side of every exchange.

    Call `receive` for each datagram, the `ask_...` methods to ask, `on_time` at `next_deadline`; after each, send what
    is in `outgoing`.  Answers are handed to the `done` given with the question, exactly once, `None` if none came.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        rng: random.Random,
        randbytes: Callable[[int], bytes],
        wall: Callable[[], float],
        fixed_hosts: tuple[str, ...] = (),
        source_towards: Callable[[Address], str | None] = lambda address: None,
        low_ports: bool = False,
        k: int = K,
    ) -> None:
        """Make the engine of one node.

        Args:
            randbytes: Makes tokens, nonces and transactions, which nobody may guess; `rng` only chooses.
            source_towards: The host our datagrams to an address leave from, if the routes can be asked.
        """
        self.membership = membership
        self.node_id = membership.node_id
        self.k = k
        self.table = Table(membership.node_id, k)
        self.store = ProviderStore(membership.node_id, rng)
        self.verifier = Verifier(membership.network_id)
        self.clock = NetworkClock(wall)
        self.own = OwnAddresses(fixed_hosts)
        self.outgoing: deque[tuple[bytes, Address]] = deque()
        self.on_lost: Callable[[Contact], None] = lambda contact: None
        self.on_contact: Callable[[Contact], None] = lambda contact: None
        self.on_stale: Callable[[], None] = lambda: None
        self._source_towards = source_towards
        self._low_ports = low_ports
        self._rng = rng
        self._randbytes = randbytes
        self._admission = Admission(randbytes)
        self._pending: dict[bytes, _Pending] = {}
        self._deadlines: list[tuple[float, int, _Pending]] = []
        self._serial = itertools.count()
        self._round_trips: OrderedDict[Address, float] = OrderedDict()
        self._typical_round_trip: float | None = None
        self._tokens: OrderedDict[Address, tuple[bytes, float]] = OrderedDict()
        self._vetted: OrderedDict[Address, float] = OrderedDict()
        self._vetting = [0, 0]
        self._ourselves: OrderedDict[Address, float] = OrderedDict()
        self._now = float("-inf")
        self._dropped: Counter[str] = Counter()
        self._queries: Counter[str] = Counter()
        self._datagrams_in = self._datagrams_out = self._bytes_in = self._bytes_out = self._timeouts = 0

    # --- in ---------------------------------------------------------------------------------------------------------

    def receive(self, datagram_untrusted: bytes, address: Address, now: float) -> None:
        """Take in one datagram.  Whatever is wrong with it is counted and dropped, and never raises.

        Args:
            address: Where it came from, which a sender can forge.
            now: Monotonic seconds; never less than in an earlier call.
        """
        self._now = now
        self._datagrams_in += 1
        self._bytes_in += len(datagram_untrusted)
        if not messages.authentic(datagram_untrusted, self.membership):
            self._dropped["not authentic"] += 1
            return
        if not may_contact(address, from_loopback=True, low_ports=self._low_ports):
            self._dropped["forbidden source"] += 1
            return
        try:
            message = messages.read(datagram_untrusted)
            if isinstance(message, Ping | FindNode | FindProviders | Announce | Withdraw):
                self._receive_query(message, len(datagram_untrusted), address, now)
            else:
                self._receive_answer(message, address, now)
        except RemoteProtocolError:
            self._dropped["malformed"] += 1
        except IntegrityError:
            self._dropped["bad signature"] += 1

    def _receive_query(self, query: Query, length: int, address: Address, now: float) -> None:
        self._queries[type(query).__name__] += 1
        self._admission.received(address, length, now)
        has_token = bool(query.token) and self._admission.check_token(address, query.token, now)
        if has_token:
            self.table.heard(address, now)
        room = self._admission.room(address, now)
        if not room:
            self._dropped["over budget"] += 1
            return
        is_stranger = not self._admission.is_proven(address, now)
        answer = self._answer(query, room - _PLAIN_PING_BYTES * is_stranger, has_token, address, now)
        if answer is not None:
            self._send_answer(answer, room, address, now)
        self._meet(query.sender, address, now, has_token=has_token)

    def _answer(self, query: Query, room: int, has_token: bool, address: Address, now: float) -> Answer | None:
        tx, observed, token, time = query.tx, pack(address), self._admission.token(address, now), self.clock.wall()
        match query:
            case Ping():
                proof = self.membership.sign(_PROOF, ContactBody(query.nonce, query.key, observed))
                return Pong(tx, observed, token, time, proof)
            case FindNode():
                return Contacts(tx, observed, token, time, self._contacts_for(query.target, room, address)[0])
            case FindProviders():
                contacts, room = self._contacts_for(query.target, room, address) if not query.cursor else ([], room)
                page, cursor, count = self.store.page(query.target, query.cursor, room - _FIXED_BYTES, now)
                return Providers(tx, observed, token, time, contacts, count, cursor, page)
            case Announce() | Withdraw() if not has_token:
                return Stored(tx, observed, token, time, messages.BAD_TOKEN)
            case Announce():
                return self._store(query, room, token, address, now)
            case Withdraw():
                status = self._withdraw(query, now)
                return Stored(tx, observed, token, time, status)
            case _:
                assert_never(query)

    def _contacts_for(self, target: bytes, room: int, address: Address) -> tuple[list[messages.PackedContact], int]:
        count = max(0, min(self.k, (room - _FIXED_BYTES) // _CONTACT_BYTES))
        contacts = [
            (contact.id, pack(contact.address))
            for contact in self.table.nearest(target, count + 1, asker=address.host)
            if contact.address != address
        ][:count]
        return contacts, room - sum(len(packed) + 24 for _, packed in contacts)

    def _store(self, query: Announce, room: int, token: bytes, address: Address, now: float) -> Stored:
        observed, time = pack(address), self.clock.wall()
        record = self.verifier.provider(query.record)
        remaining = self.remaining(record.node_id, record.body, now)
        if remaining <= 0:
            return Stored(query.tx, observed, token, time, messages.INVALID)
        outcome = self.store.put(record, address.host, remaining, now)
        page, cursor, count = self.store.page(
            record.body.key, query.cursor, room - _FIXED_BYTES, now, without=record.public_key
        )
        return Stored(query.tx, observed, token, time, int(outcome), count, cursor, page)

    def remaining(self, writer: NodeId, body: ProviderBody | WithdrawBody, now: float) -> float:
        """Seconds a record has left to live; 0 or less if it is expired, or was issued in the future."""
        contact = self.table.get(writer)
        witness = witness_of(contact.address) if contact is not None else ""
        return self.clock.remaining(body.issued, body.expires, now, witness)

    def _withdraw(self, query: Withdraw, now: float) -> int:
        public_key, body = self.verifier.withdrawal(query.record)
        remaining = self.remaining(node_id_of(public_key), body, now)
        return int(self.store.withdraw(public_key, body, remaining, now)) if remaining > 0 else messages.INVALID

    def _send_answer(self, answer: Answer, room: int, address: Address, now: float) -> None:
        datagram = messages.seal(answer, self.membership)
        if len(datagram) > room:
            self._dropped["over budget"] += 1
            return
        self._admission.spend(address, len(datagram), now)
        self._send(datagram, address)

    def _receive_answer(self, answer: Answer, address: Address, now: float) -> None:
        pending = self._pending.get(answer.tx)
        if pending is None or pending.address != address or not isinstance(answer, pending.expect):
            self._dropped["unasked answer"] += 1
            return
        observed = unpack(answer.observed)
        self._finish(pending)
        self._learn_round_trip(address, now - pending.sent[answer.tx])
        self._admission.prove(address, now)
        _remember(self._tokens, address, (answer.token, now + TOKEN_FRESH))
        self.table.heard(address, now)
        self.clock.observe(witness_of(address), answer.time, now)
        if self.own.vote(address, observed) | self.clock.corrected(now):
            self.on_stale()
        pending.done(answer)
        if pending.node_id is not None:
            self._meet(pending.node_id, address, now, has_token=True)

    # --- out --------------------------------------------------------------------------------------------------------

    def ask(
        self,
        build: Build,
        expect: type[Answer],
        address: Address,
        now: float,
        done: Done,
        *,
        node_id: bytes | None = None,
        to_stranger: bool = False,
    ) -> None:
        """Ask a question; `done` is called once, at the latest after two time-outs.

        Args:
            node_id: Who is believed to live there; if it answers and the table has room, it is asked for its proof.
            to_stranger: Only a forgeable source says that somebody lives there: ask once, in few bytes.
        """
        self._now = now
        if self._ourselves.get(address, 0.0) > now or len(self._pending) >= MAX_PENDING:
            done(None)
            return
        self._attempt(_Pending(address, node_id, build, expect, done, 1 if to_stranger else ATTEMPTS, to_stranger), now)

    def ask_for_proof(
        self,
        address: Address,
        now: float,
        done: Callable[[Contact | None], None],
        *,
        claimed_id: bytes | None = None,
        to_stranger: bool = False,
    ) -> None:
        """Ask whoever lives there to prove itself; if it does, it enters the table.

        Our own address proves nobody, and neither does a key whose id is not `claimed_id`, where one was claimed.
        """
        nonce = self._randbytes(16)
        key = self.membership.public_key

        def build(tx: bytes, token: bytes, padding: bytes) -> Query:
            return Ping(tx, self.node_id, token, key, nonce, padding)

        def answered(answer: Answer | None) -> None:
            done(self._check_proof(answer, nonce, address, claimed_id) if isinstance(answer, Pong) else None)

        self.ask(build, Pong, address, now, answered, to_stranger=to_stranger)

    def _check_proof(self, pong: Pong, nonce: bytes, address: Address, claimed_id: bytes | None) -> Contact | None:
        try:
            verify(_PROOF, self.membership.network_id, pong.proof)
            body = wire.decode(pong.proof.body, ContactBody)
            observed = unpack(body.observed)
        except (IntegrityError, RemoteProtocolError):
            self._dropped["bad proof"] += 1
            return None
        if pong.proof.key == self.membership.public_key:
            _remember(self._ourselves, address, self._now + OURSELVES_PAUSE)
            return None
        node_id = node_id_of(pong.proof.key)
        if (
            body.nonce != nonce
            or body.asker != self.membership.public_key
            or claimed_id not in (None, node_id)
            or not (self.own.believes(observed) or self._source_towards(address) == observed.host)
        ):
            self._dropped["bad proof"] += 1
            return None
        return self._enter(Contact(node_id, address))

    def _enter(self, contact: Contact) -> Contact:
        contact.last_seen = self._now
        is_new = self.table.get(contact.id) is None
        if self.table.add(contact) and is_new:
            self.on_contact(contact)
        return contact

    def _attempt(self, pending: _Pending, now: float) -> None:
        tx = self._randbytes(messages.TRANSACTION_BYTES)
        token, until = self._tokens.get(pending.address, (b"", 0.0))
        query = pending.build(tx, token, b"")
        if until <= now and not pending.to_stranger:
            length = messages.packed_query_bytes(query)
            query = pending.build(tx, token, bytes(max(0, messages.PADDED_BYTES - length - 2)))
        pending.attempts -= 1
        pending.sent[tx] = now
        pending.deadline = now + self._timeout(pending.address) / (2 if pending.attempts else 1)
        self._pending[tx] = pending
        heapq.heappush(self._deadlines, (pending.deadline, next(self._serial), pending))
        self._send(messages.seal(query, self.membership), pending.address)

    def _send(self, datagram: bytes, address: Address) -> None:
        if len(self.outgoing) >= MAX_OUTGOING:
            self._dropped["outgoing full"] += 1
            return
        self._datagrams_out += 1
        self._bytes_out += len(datagram)
        self.outgoing.append((datagram, address))

    # --- time -------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """When `on_time` has something to do; infinity if never."""
        while self._deadlines and self._deadlines[0][2].finished:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def on_time(self, now: float) -> None:
        """Ask again, or give up, where answers are overdue."""
        self._now = now
        while self.next_deadline() <= now:
            pending = heapq.heappop(self._deadlines)[2]
            if pending.deadline > now:
                continue
            if pending.attempts > 0:
                self._attempt(pending, now)
                continue
            self._finish(pending)
            self._timeouts += 1
            if not pending.to_stranger and (lost := self.table.fell_silent(pending.address, now)) is not None:
                self.on_lost(lost)
            pending.done(None)

    def slow_after(self, address: Address) -> float:
        """Seconds after which an answer from there is later than most."""
        round_trip = self._round_trips.get(address, self._typical_round_trip)
        return FIRST_TIMEOUT / 4 if round_trip is None else max(LEAST_SLOW, 2 * round_trip)

    def _timeout(self, address: Address) -> float:
        round_trip = self._round_trips.get(address)
        if round_trip is not None:
            return min(max(4 * round_trip, LEAST_TIMEOUT), LONGEST_TIMEOUT)
        if self._typical_round_trip is None:
            return FIRST_TIMEOUT
        return min(max(4 * self._typical_round_trip, FIRST_TIMEOUT / 2), LONGEST_TIMEOUT)

    def _learn_round_trip(self, address: Address, sample: float) -> None:
        # RFC 6298's gain of 1/8.
        old = self._round_trips.get(address)
        _remember(self._round_trips, address, sample if old is None else old + (sample - old) / 8)
        typical = self._typical_round_trip
        self._typical_round_trip = sample if typical is None else typical + (sample - typical) / 8

    def _finish(self, pending: _Pending) -> None:
        pending.finished = True
        for tx in pending.sent:
            self._pending.pop(tx, None)

    # --- strangers ------------------------------------------------------------------------------------------------

    def _meet(self, claimed_id: bytes, address: Address, now: float, *, has_token: bool) -> None:
        """Somebody claims this id: if the table would have it, ask for its proof, within what it may be sent."""
        contact = self.table.at(address)
        if contact is not None and contact.id == claimed_id:
            return
        if not self.table.wants(claimed_id, address) or self._vetted.get(address, 0.0) > now:
            return
        if self._vetting[has_token] >= MAX_VETTING:
            return
        is_stranger = not self._admission.is_proven(address, now)
        if is_stranger:
            if self._admission.room(address, now) < _PLAIN_PING_BYTES:
                return
            self._admission.spend(address, _PLAIN_PING_BYTES, now)
        _remember(self._vetted, address, now + VETTING_PAUSE)
        self._vetting[has_token] += 1

        def vetted(contact: Contact | None) -> None:
            self._vetting[has_token] -= 1

        self.ask_for_proof(address, now, vetted, claimed_id=claimed_id, to_stranger=is_stranger)

    def statistics(self, now: float) -> EngineStatistics:
        return EngineStatistics(
            contacts=len(self.table),
            records=len(self.store),
            keys=self.store.keys,
            datagrams_in=self._datagrams_in,
            datagrams_out=self._datagrams_out,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            timeouts=self._timeouts,
            clock_skew=self.clock.skew(now),
            hosts=self.own.hosts(),
            dropped=dict(self._dropped),
            queries=dict(self._queries),
        )


_Value = TypeVar("_Value")


def _remember(memory: OrderedDict[Address, _Value], address: Address, value: _Value) -> None:
    """Keep what is known of an address, forgetting the one not touched for longest beyond `MAX_REMEMBERED`."""
    memory[address] = value
    memory.move_to_end(address)
    if len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
