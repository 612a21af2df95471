"""What we announce, when to repeat it, when to withdraw it: `edges.Discovery` over the DHT.

Each task we take part in has an entry: its state, the signed record, and the holders that stored it.  A record is
repeated before it expires, to the holders known from last time; they are looked up again when too few answer, when
nearer contacts have appeared, or when it has been long.  What is found is a hint: membership is proven on connecting.

Seconds are monotonic, but inside signed records.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
import trio

from swarm.dht import state as saved
from swarm.dht.addresses import LOWEST_PORT, Scope, advertised, scope_of
from swarm.dht.node import DhtNode, Search
from swarm.dht.records import LIFETIME, ProviderRecord, sign_provider, sign_withdrawal
from swarm.dht.routing import Contact
from swarm.edges import Address, Entry, Membership, Provider, State
from swarm.errors import IntegrityError, LocalProtocolError, RemoteProtocolError
from swarm.task import blob_task

_log = structlog.get_logger(__name__)

REPEAT: Final = {State.WANTS: 240.0, State.PARTIAL: 240.0, State.COMPLETE: 3600.0, State.SEED: 3600.0}
"""Seconds between repetitions, +- 10 %: twice within a lifetime, so that one may be lost."""
LOOKUP_INTERVAL: Final = 7000.0
"""Holders are looked up again at least this often: about every second repetition of a complete task."""
PATIENCE: Final = 0.25
"""Seconds an announcement goes on waiting for more answers after its first success."""
LONGEST_WAIT: Final = 2.0
"""Seconds until `announce` and `find` return what they have; the work goes on behind them."""
SECOND_LOOK: Final = 0.06
"""Seconds after announcing that a newcomer looks again: who announced just after it has been stored by then."""
REPEATS_AT_ONCE: Final = 4
REPEAT_PAUSE: Final = 0.1
"""Seconds between repetitions that are due together: 8 messages each, so a backlog sends about 80 a second.

Two thousand tasks restored after a restart are found again within seven minutes, under both their names.
"""
MANY: Final = 2000
MOST_PATIENCE: Final = 1.5
"""Whoever announces more than `MANY` names repeats each less often in proportion, at most by this factor.

A URL's content has two names.  So 2,000 contents are kept known with under 10 messages a second, and a record still
outlives the time of its repetition by 20 minutes.
"""
SEQ_BLOCK: Final = 4096
"""How many sequence numbers are reserved on disk at a time; a crash skips the rest, which costs nothing."""
WITHDRAW_LIMIT: Final = 1.0
WITHDRAW_ALL_LIMIT: Final = 3.0
"""Seconds a withdrawal may hold up an eviction, and the shutdown."""
MAX_HOLDERS_TOLD: Final = 1024
"""Holders told of a shutdown; the records of the rest expire by themselves."""


@dataclass(slots=True, eq=False)
class _Entry:
    task_id: bytes
    key: bytes
    state: State
    holders: dict[bytes, Contact] = field(default_factory=dict)
    record: bytes | None = None
    record_until: float = 0.0
    looked_up: float = float("-inf")
    due: float = float("inf")
    publishing: int = 0


@dataclass(frozen=True, slots=True)
class AnnouncerStatistics:
    """`published` and `repeated` count announcements since start; `overdue` are repetitions that wait their turn."""

    tasks: int
    published: int
    repeated: int
    overdue: int
    withdrawn: int
    hosts: tuple[str, ...]


def kept_names(entries: Iterable[Entry], *, is_open: bool) -> dict[bytes, State]:
    """What to announce of a store: complete content, under its names and the task of its digest.

    What is private is announced in a closed network only, under those of its names that are shared: members ask the origin
    whether they may have it before they look for it.
    """
    kept: dict[bytes, State] = {}
    for entry in entries:
        if not entry.complete or entry.digest is None:
            continue
        if not entry.private:
            kept[blob_task(entry.digest).id] = kept[entry.task.id] = State.COMPLETE
        elif entry.task.shared and not is_open:
            kept[entry.task.id] = State.COMPLETE
    return kept


class Announcer:
    """Implements `edges.Discovery`.  `run` must be running (and `DhtNode.run`) before anything is announced."""

    def __init__(
        self,
        dht: DhtNode,
        membership: Membership,
        *,
        control_port: int,
        addresses: Sequence[str] = (),
        state_path: Path | None = None,
        rng: random.Random,
        seed_role: bool = False,
        low_ports: bool = False,
    ) -> None:
        """Make an announcer.

        Args:
            control_port: Where our control port listens; 0 if it does not, and then nothing is announced.
            addresses: Hosts to announce (`--advertise`); empty: what others report.
            state_path: Where the sequence number is kept (CBOR); without it the wall clock alone keeps it growing.
            seed_role: Announce what is complete as `State.SEED`.

        Raises:
            ConfigError: One of `addresses` is not an address others can reach.
        """
        self._dht = dht
        self._membership = membership
        self._control_port = control_port
        self._addresses = advertised(addresses)
        self._state_path = state_path
        self._rng = rng
        self._seed_role = seed_role
        self._low_ports = low_ports
        self._entries: dict[bytes, _Entry] = {}
        self._due: list[tuple[float, int, _Entry]] = []
        self._serial = itertools.count()
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._seq, self._seq_reserved = self._load_seq()
        self._published = self._repeated = self._withdrawn = 0
        dht.engine.on_contact = self._contact_found
        dht.engine.on_stale = self._records_stale

    # --- Discovery --------------------------------------------------------------------------------------------------

    async def announce(self, task_id: bytes, state: State) -> list[Provider]:
        """As `edges.Discovery.announce`.

        Returns when the nearest have answered, or `PATIENCE` after the first success, or after `LONGEST_WAIT`; who
        only wants the task (and saw nobody complete) has looked a second time by then.
        """
        entry = self._enter(task_id, state)
        search = Search(entry.key)
        self._start(self._publish, entry, search)
        await _first_answers(search)
        if entry.state in (State.WANTS, State.PARTIAL) and search.holders and not _has_complete(search):
            await trio.sleep(SECOND_LOOK)
            with trio.move_on_after(2 * PATIENCE):
                await self._dht.reread(search, list(search.holders.values()))
        return self._providers(search)

    async def find(self, task_id: bytes) -> list[Provider]:
        """As `edges.Discovery.find`."""
        search = Search(self._membership.task_key(task_id))
        self._start(self._dht.collect, search)
        await _first_answers(search)
        return self._providers(search)

    async def withdraw(self, task_id: bytes) -> None:
        """As `edges.Discovery.withdraw`; takes at most `WITHDRAW_LIMIT` seconds."""
        entry = self._entries.pop(task_id, None)
        if entry is None:
            return
        entry.due = float("inf")
        if entry.holders or entry.record is not None:
            with trio.move_on_after(WITHDRAW_LIMIT):
                await self._withdraw_from(entry)

    def read_record(self, record_untrusted: bytes, task_id: bytes) -> Provider | None:
        """As `edges.Discovery.read_record`."""
        try:
            record = self._dht.engine.verifier.provider(record_untrusted)
        except (RemoteProtocolError, IntegrityError):
            return None
        remaining = self._dht.engine.remaining(record.node_id, record.body, trio.current_time())
        if remaining <= 0 or record.body.key != self._membership.task_key(task_id):
            return None
        return self._provider(record)

    # --- more than Discovery ----------------------------------------------------------------------------------------

    def restore(self, tasks: Mapping[bytes, State]) -> None:
        """Announce what was held before a restart, at the pace of repetitions and without waiting."""
        now = trio.current_time()
        for task_id, state in tasks.items():
            if task_id not in self._entries:
                self._schedule(self._enter(task_id, state), now)

    def own_record(self, task_id: bytes) -> bytes | None:
        """Our signed record for peer exchange; `None` if we do not announce the task, or know no address of ours."""
        entry = self._entries.get(task_id)
        return None if entry is None else self._record(entry)

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Announce these hosts from now on (empty: what others report), and repeat what is announced already."""
        self._addresses = advertised(addresses)
        self._records_stale()

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts in our records."""
        return self._addresses or self._dht.hosts

    def announced(self) -> dict[bytes, State]:
        """Every task that is announced, and as what."""
        return {entry.task_id: entry.state for entry in self._entries.values()}

    async def withdraw_all(self) -> None:
        """Withdraw everything with one signed message to each holder; takes at most `WITHDRAW_ALL_LIMIT` seconds."""
        holders: dict[Address, Contact] = {}
        for entry in self._entries.values():
            for contact in entry.holders.values():
                if len(holders) < MAX_HOLDERS_TOLD:
                    holders.setdefault(contact.address, contact)
        had_any = bool(self._entries)
        self._entries.clear()
        self._due.clear()
        if had_any:
            with trio.move_on_after(WITHDRAW_ALL_LIMIT):
                await self._dht.withdraw(list(holders.values()), self._withdrawal(b""))
            self._withdrawn += 1

    def statistics(self) -> AnnouncerStatistics:
        now = trio.current_time()
        return AnnouncerStatistics(
            tasks=len(self._entries),
            published=self._published,
            repeated=self._repeated,
            overdue=sum(entry.due <= now for entry in self._entries.values()),
            withdrawn=self._withdrawn,
            hosts=self.hosts,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Repeat what is announced, until cancelled; `withdraw_all` first."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                self._reserve_seqs()
                task_status.started()
                await self._repeat()
            finally:
                self._nursery = None

    # --- publishing -------------------------------------------------------------------------------------------------

    def _enter(self, task_id: bytes, state: State) -> _Entry:
        if self._seed_role and state is State.COMPLETE:
            state = State.SEED
        entry = self._entries.get(task_id)
        if entry is None:
            entry = self._entries[task_id] = _Entry(task_id, self._membership.task_key(task_id), state)
        if entry.state is not state:
            entry.state = state
            entry.record = None
        return entry

    def _start(self, function: Callable[..., object], *arguments: object) -> None:
        if self._nursery is None:
            raise LocalProtocolError("the announcer is not running")
        self._nursery.start_soon(function, *arguments)  # type: ignore[arg-type]  # any async function

    async def _publish(self, entry: _Entry, search: Search) -> None:
        """Announce once, to remembered holders if they will do, and note when to repeat."""
        entry.publishing += 1
        state = entry.state
        try:
            known = self._remembered(entry)
            if known:
                await self._dht.republish(search, lambda: self._record(entry), known)
            if len(search.holders) < min(len(known), self._dht.engine.k // 2 + 1) or not known:
                await self._dht.publish(search, lambda: self._record(entry))
                entry.looked_up = trio.current_time()
        finally:
            entry.publishing -= 1
        self._published += 1
        entry.holders = dict(search.holders)
        if self._entries.get(entry.task_id) is not entry:
            with trio.move_on_after(WITHDRAW_LIMIT):
                await self._withdraw_from(entry)
        elif entry.publishing:
            return  # a later one is under way and will note when to repeat
        elif entry.state is not state:
            self._schedule(entry, trio.current_time())
        else:
            self._schedule(entry, trio.current_time() + self._interval(entry.state))

    def _interval(self, state: State) -> float:
        """Seconds to the next repetition."""
        patience = min(max(1.0, len(self._entries) / MANY), MOST_PATIENCE) if state >= State.COMPLETE else 1.0
        return REPEAT[state] * patience * self._rng.uniform(0.9, 1.1)

    def _remembered(self, entry: _Entry) -> list[Contact]:
        """The holders of last time, or nobody if they have to be looked up again."""
        now = trio.current_time()
        engine = self._dht.engine
        holders = list(entry.holders.values())
        if not holders or now >= entry.looked_up + LOOKUP_INTERVAL:
            return []
        nearest = engine.table.nearest(entry.key, engine.k)
        strangers = sum(contact.id not in entry.holders for contact in nearest)
        return [] if 2 * strangers > len(nearest) or len(holders) < min(engine.k, len(nearest)) else holders

    def _record(self, entry: _Entry) -> bytes | None:
        """The current record, signed anew when a third of its life is over or it says something else by now."""
        now = trio.current_time()
        if not self.hosts or not self._control_port:
            return None
        if entry.record is None or now >= entry.record_until:
            issued = self._dht.engine.clock.stamp(now)
            entry.record = sign_provider(
                self._membership, entry.key, self.hosts, self._control_port, entry.state, self._next_seq(), issued
            )
            entry.record_until = now + LIFETIME[entry.state] / 3
        return entry.record

    async def _withdraw_from(self, entry: _Entry) -> None:
        self._withdrawn += 1
        await self._dht.withdraw(list(entry.holders.values()), self._withdrawal(entry.key))

    def _withdrawal(self, key: bytes) -> bytes:
        return sign_withdrawal(self._membership, key, self._next_seq(), self._dht.engine.clock.stamp(trio.current_time()))

    # --- repeating --------------------------------------------------------------------------------------------------

    def _schedule(self, entry: _Entry, due: float) -> None:
        entry.due = due
        heapq.heappush(self._due, (due, next(self._serial), entry))
        if len(self._due) > 2 * len(self._entries) + 64:
            self._due = [item for item in self._due if self._is_due_item(item)]
            heapq.heapify(self._due)
        self._wake.set()

    def _is_due_item(self, item: tuple[float, int, _Entry]) -> bool:
        return item[2].due == item[0] and self._entries.get(item[2].task_id) is item[2]

    async def _repeat(self) -> None:
        slots = trio.Semaphore(REPEATS_AT_ONCE)
        while True:
            self._wake = trio.Event()
            while self._due and not self._is_due_item(self._due[0]):
                heapq.heappop(self._due)
            with trio.move_on_at(self._due[0][0] if self._due else float("inf")):
                await self._wake.wait()
                continue
            if not self._due or self._due[0][0] > trio.current_time():
                continue  # withdrawn while we slept
            entry = heapq.heappop(self._due)[2]
            if entry.publishing:
                self._schedule(entry, trio.current_time() + 5 * REPEAT_PAUSE)
                continue
            entry.due = float("inf")
            await slots.acquire()
            self._start(self._repeat_one, entry, slots)
            await trio.sleep(REPEAT_PAUSE)

    async def _repeat_one(self, entry: _Entry, slots: trio.Semaphore) -> None:
        try:
            if self._entries.get(entry.task_id) is not entry:
                return
            search = Search(entry.key)
            await self._publish(entry, search)
            self._repeated += 1
        finally:
            slots.release()

    def _contact_found(self, contact: Contact) -> None:
        """Whatever has fewer holders than it could have is announced again soon: we have just joined, or healed."""
        now = trio.current_time()
        enough = min(self._dht.engine.k, self._dht.contacts)
        for entry in self._entries.values():
            if len(entry.holders) < enough and not entry.publishing and entry.due > now + 1.0:
                self._schedule(entry, now + self._rng.uniform(0.05, 0.5))

    def _records_stale(self) -> None:
        """Our addresses or our idea of the time have changed: sign and announce anew."""
        now = trio.current_time()
        for entry in self._entries.values():
            if entry.record is not None:
                entry.record = None
                self._schedule(entry, now + self._rng.uniform(0.05, 0.5))

    # --- members ----------------------------------------------------------------------------------------------------

    def _providers(self, search: Search) -> list[Provider]:
        point = int.from_bytes(search.key, "big")
        found = [provider for record in search.members.values() if (provider := self._provider(record)) is not None]
        found.sort(key=lambda provider: int.from_bytes(provider.node_id, "big") ^ point)
        return found

    def _provider(self, record: ProviderRecord) -> Provider | None:
        """As the rest of the node sees it; `None` for our own, and for one with no address that may be dialled."""
        if record.node_id == self._membership.node_id:
            return None
        control = tuple(address for address in record.control if self._may_dial(address))
        if not control:
            return None
        return Provider(record.node_id, record.public_key, control, State(record.body.state), record.raw)

    def _may_dial(self, address: Address) -> bool:
        """A record must not aim our connections at this machine's own services, or at well-known ports."""
        scope = scope_of(address.host)
        if scope is Scope.LOOPBACK:
            scope = Scope.LOOPBACK if self._on_loopback() else Scope.FORBIDDEN
        return scope is not Scope.FORBIDDEN and (self._low_ports or address.port >= LOWEST_PORT)

    def _on_loopback(self) -> bool:
        return any(scope_of(host) is Scope.LOOPBACK for host in self.hosts)

    # --- sequence numbers -------------------------------------------------------------------------------------------

    def _load_seq(self) -> tuple[int, int]:
        """From the end of the reserved block, or from the wall clock in milliseconds if that is later.

        The clock makes up for a lost file, the file for a clock that was set back.
        """
        kept = saved.load(self._state_path).get("seq", 0)
        start = max(kept if isinstance(kept, int) else 0, self._dht.engine.clock.wall() * 1000)
        return start, start

    def _next_seq(self) -> int:
        self._seq += 1
        if self._seq > self._seq_reserved:
            self._reserve_seqs()
        return self._seq

    def _reserve_seqs(self) -> None:
        self._seq_reserved = self._seq + SEQ_BLOCK
        if self._state_path is not None:
            saved.save(self._state_path, {"seq": self._seq_reserved})


async def _first_answers(search: Search) -> None:
    """Until the search is finished, or `PATIENCE` after its first success, or `LONGEST_WAIT`."""
    with trio.move_on_after(LONGEST_WAIT):
        async with trio.open_nursery() as nursery:

            async def until_finished() -> None:
                await search.finished.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_finished)
            await search.reached.wait()
            await trio.sleep(PATIENCE)
            nursery.cancel_scope.cancel()


def _has_complete(search: Search) -> bool:
    return any(record.body.state >= State.COMPLETE for record in search.members.values())
