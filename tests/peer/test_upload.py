from __future__ import annotations

import random
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarm import wire
from swarm.edges import NodeId, Served
from swarm.peer import upload
from swarm.peer.upload import (
    LARGE_BYTES,
    MAX_REQUESTS_PER_CHANNEL,
    MAX_SLOTS,
    SLOTS,
    SLOTS_LARGE,
    STALL_SECONDS,
    Channel,
    Uploader,
)

TASK = bytes(32)
OTHER = b"\1" * 32


def node(number: int) -> NodeId:
    return number.to_bytes(20, "big")


def channel(number: int) -> Channel:
    return Channel(node(number))


def ask(request_id: int, piece: int, task: bytes = TASK, length: int = 1000) -> wire.Request:
    return wire.Request(request_id, task, piece, 0, length)


class Source:
    def __init__(self) -> None:
        self.copies: dict[int, int] = {}
        self.held: dict[NodeId, int] = {}
        self.calls: Counter[str] = Counter()

    def serve(self, node_id: NodeId, request: wire.Request, *, encrypted: bool) -> Served | int:
        raise AssertionError("it chooses; who drives it sends")

    def replication(self, task_id: bytes, piece: int) -> int:
        self.calls["replication"] += 1
        return self.copies.get(piece, 0)

    def held_by(self, task_id: bytes, node_id: NodeId) -> int:
        self.calls["held_by"] += 1
        return self.held.get(node_id, 0)

    def uploaded(self, node_id: NodeId, request: wire.Request, sent: int) -> None:
        raise AssertionError("it chooses; who drives it sends")


def make(source: Source | None = None) -> Uploader:
    return Uploader(source or Source(), rng=random.Random(7), slots=1)


def serve_all(uploader: Uploader, now: float = 0.0) -> list[tuple[NodeId, int]]:
    """Serve one after another; who got which piece, in order."""
    order = []
    while (transfer := uploader.next(now)) is not None:
        order.append((transfer.node_id, transfer.request.piece))
        uploader.ended(transfer, complete=True)
    return order


def test_a_few_transfers_run_side_by_side_and_more_only_when_all_are_blocked():
    uploader = Uploader(Source(), rng=random.Random(7))
    for peer in range(MAX_SLOTS):
        assert uploader.enqueue(channel(peer), ask(peer, peer))
    started = [uploader.next(0.0) for _ in range(SLOTS + 1)]
    assert [transfer is not None for transfer in started] == [True] * SLOTS + [False]
    assert uploader.next(STALL_SECONDS) is not None


def test_more_large_pieces_run_side_by_side_since_each_holds_its_slot_for_long():
    for last, allowed in ((LARGE_BYTES, SLOTS_LARGE), (LARGE_BYTES - 1, SLOTS)):
        source = Source()
        source.held = {node(peer): peer for peer in range(MAX_SLOTS)}
        uploader = Uploader(source, rng=random.Random(7))
        for peer in range(MAX_SLOTS):
            # The first has least, and is served first.
            assert uploader.enqueue(channel(peer), ask(peer, 0, length=last if peer == 0 else LARGE_BYTES))
        started = [uploader.next(0.0) for _ in range(SLOTS_LARGE + 1)]
        assert [transfer is not None for transfer in started] == [True] * allowed + [False] * (SLOTS_LARGE + 1 - allowed)


def test_of_equally_rare_pieces_a_peer_gets_first_what_it_asked_for_first():
    """What a reader waits for is asked for first; served at random, eight requests would keep it waiting for eight pieces."""
    for seed in range(20):
        uploader = Uploader(Source(), rng=random.Random(seed), slots=1)
        for number, piece in enumerate((7, 3, 5, 1)):
            uploader.enqueue(channel(1), ask(number, piece))
        assert [piece for _, piece in serve_all(uploader)] == [7, 3, 5, 1]


def test_the_least_replicated_piece_of_all_peers_goes_first():
    source = Source()
    source.copies = {0: 5, 1: 1, 2: 3}
    uploader = make(source)
    uploader.enqueue(channel(1), ask(1, 0))
    uploader.enqueue(channel(1), ask(2, 2))
    uploader.enqueue(channel(2), ask(1, 1))
    assert [piece for _, piece in serve_all(uploader)] == [1, 2, 0]


def test_copies_we_sent_count_although_nobody_announced_them_yet():
    uploader = make()
    for number in range(1, 5):
        uploader.enqueue(channel(number), ask(1, 0))
        uploader.enqueue(channel(number), ask(2, number))
    pieces = [piece for _, piece in serve_all(uploader)]
    # Piece 0 may be chosen once while everything has no copy; its other copies come after every single other piece.
    assert Counter(pieces[:5]) == Counter({0: 1, 1: 1, 2: 1, 3: 1, 4: 1})


def test_a_transfer_that_broke_is_no_copy():
    uploader = make()
    uploader.enqueue(channel(1), ask(1, 0))
    transfer = uploader.next(0.0)
    assert transfer is not None
    uploader.ended(transfer, complete=False)
    source_copies = uploader._copies_of(TASK, 0)
    assert source_copies == 0


def test_ties_go_to_the_peer_that_has_fewer_pieces():
    source = Source()
    source.held = {node(1): 10, node(2): 3, node(3): 7}
    uploader = make(source)
    for number in (1, 2, 3):
        uploader.enqueue(channel(number), ask(1, number))
    assert [who for who, _ in serve_all(uploader)] == [node(2), node(3), node(1)]


def test_remaining_ties_are_settled_at_random_and_not_by_who_came_first():
    winners = set()
    for seed in range(20):
        uploader = Uploader(Source(), rng=random.Random(seed), slots=1)
        for number in range(4):
            uploader.enqueue(channel(number), ask(1, number))
        transfer = uploader.next(0.0)
        assert transfer is not None
        winners.add(transfer.node_id)
    assert len(winners) > 2


def test_one_upload_at_a_time_while_it_progresses():
    uploader = make()
    for number in range(3):
        uploader.enqueue(channel(number), ask(1, number))
    first = uploader.next(0.0)
    assert first is not None
    now = 0.0
    for _ in range(100):
        now += STALL_SECONDS * 0.9
        assert uploader.next(now) is None
        uploader.progressed(first, now, 1000)
    uploader.ended(first, complete=True)
    assert uploader.next(now) is not None


def test_another_starts_beside_one_that_stalls_and_never_more_than_eight():
    uploader = make()
    for number in range(20):
        uploader.enqueue(channel(number), ask(1, number))
    now = 0.0
    for _ in range(40):
        uploader.next(now)
        deadline = uploader.next_deadline()
        now = min(deadline, now + 1.0)
    assert uploader.active == MAX_SLOTS
    assert uploader.next_deadline() == float("inf")


def test_the_deadline_is_when_the_last_of_the_active_ones_will_have_stalled():
    uploader = make()
    for number in range(5):
        uploader.enqueue(channel(number), ask(1, number))
    first = uploader.next(0.0)
    second = uploader.next(1.0)
    assert first is not None
    assert second is not None
    uploader.progressed(second, 1.2, 1)
    assert uploader.next_deadline() == 1.2 + STALL_SECONDS
    assert uploader.next(1.2 + STALL_SECONDS * 0.99) is None
    assert uploader.next(1.2 + STALL_SECONDS) is not None


def test_a_channel_that_carries_a_transfer_gets_no_second_one():
    uploader = make()
    uploader.enqueue(channel(1), ask(1, 0))
    uploader.enqueue(channel(1), ask(2, 1))
    assert uploader.next(0.0) is not None
    assert uploader.next(10.0) is None
    uploader.enqueue(channel(2), ask(1, 2))
    transfer = uploader.next(10.0)
    assert transfer is not None
    assert transfer.node_id == node(2)


def test_a_peer_that_queues_without_end_is_told_busy_and_others_are_not():
    uploader = make()
    taken = sum(uploader.enqueue(channel(1), ask(number, 0)) for number in range(10_000))
    assert taken == MAX_REQUESTS_PER_CHANNEL
    assert uploader.enqueue(channel(2), ask(1, 0))


def test_requests_of_all_peers_together_are_bounded(monkeypatch):
    monkeypatch.setattr(upload, "MAX_REQUESTS", 100)
    uploader = make()
    taken = sum(uploader.enqueue(channel(number), ask(1, 0)) for number in range(200))
    assert taken == uploader.queued == 100


def test_a_request_id_used_twice_is_refused():
    uploader = make()
    assert uploader.enqueue(channel(1), ask(1, 0))
    assert not uploader.enqueue(channel(1), ask(1, 5))
    assert uploader.queued == 1


def test_a_cancelled_request_is_never_served_and_a_started_one_cannot_be_cancelled():
    uploader = make()
    uploader.enqueue(channel(1), ask(1, 0))
    uploader.enqueue(channel(1), ask(2, 1))
    assert uploader.cancel(channel(1), 1)
    assert not uploader.cancel(channel(1), 1)
    transfer = uploader.next(0.0)
    assert transfer is not None
    assert transfer.request.id == 2
    assert not uploader.cancel(channel(1), 2)
    assert uploader.queued == 0


def test_a_peer_that_went_away_takes_its_requests_and_its_slot_with_it():
    uploader = make()
    for number in (1, 2):
        uploader.enqueue(channel(number), ask(1, 0))
        uploader.enqueue(channel(number), ask(2, 1))
    transfer = uploader.next(0.0)
    assert transfer is not None
    uploader.forget(transfer.channel)
    assert uploader.active == 0
    assert uploader.queued == 2
    following = uploader.next(0.0)
    assert following is not None
    uploader.ended(transfer, complete=False)  # its driver ends later; the new transfer is not disturbed
    assert uploader.active == 1


def test_choosing_asks_the_source_once_for_each_piece_however_many_want_it():
    source = Source()
    uploader = make(source)
    for number in range(50):
        for piece in range(20):
            uploader.enqueue(channel(number), ask(piece, piece))
    uploader.next(0.0)
    assert source.calls["replication"] == 20
    assert source.calls["held_by"] <= 50


def test_a_peer_that_asks_for_seal_tables_without_end_does_not_starve_the_others():
    uploader = make()
    for request_id in range(10):
        uploader.enqueue(channel(1), ask(request_id, wire.SEAL_TABLE))
    for piece in range(10):
        uploader.enqueue(channel(2), ask(piece, piece))
    order = [piece for _, piece in serve_all(uploader)]
    assert order[0] == wire.SEAL_TABLE
    assert sum(piece >= 0 for piece in order[:10]) == 5


def test_what_is_remembered_of_copies_is_bounded(monkeypatch):
    monkeypatch.setattr(upload, "MAX_COUNTED_PIECES", 100)
    uploader = make()
    for number in range(50):
        task = number.to_bytes(32, "big")
        for piece in range(10):
            uploader.enqueue(channel(1), ask(piece, piece, task))
        serve_all(uploader)
    assert sum(map(len, uploader._copies.values())) <= 100 == uploader._counted


def test_a_transfer_its_tasks_limit_holds_up_leaves_the_uplink_to_others():
    uploader = make()
    for number in range(3):
        uploader.enqueue(channel(number), ask(1, number))
    first = uploader.next(0.0)
    assert first is not None
    first.limited = True
    second = uploader.next(0.0)
    assert second is not None
    assert uploader.next(0.0) is None  # the second one fills it


class Machine(RuleBasedStateMachine):
    """Whatever peers do, the books balance and no promise about slots is broken."""

    def __init__(self) -> None:
        super().__init__()
        self.uploader = make()
        self.now = 0.0
        self.waiting: set[tuple[Channel, int]] = set()
        self.active: list[upload.Transfer] = []
        self.last_id = 0

    @rule(who=st.integers(0, 5), piece=st.integers(-1, 4), encrypted=st.booleans())
    def enqueue(self, who: int, piece: int, encrypted: bool) -> None:
        self.last_id += 1
        key = Channel(node(who), encrypted)
        assert self.uploader.enqueue(key, ask(self.last_id, piece))
        self.waiting.add((key, self.last_id))

    @rule(pause=st.floats(0, 0.2))
    def choose(self, pause: float) -> None:
        self.now += pause
        busy = {transfer.channel for transfer in self.active}
        moving = any(self.now < t.progressed + STALL_SECONDS and not t.limited for t in self.active)
        transfer = self.uploader.next(self.now)
        could = any(key not in busy for key, _ in self.waiting) and len(self.active) < MAX_SLOTS and not moving
        assert (transfer is not None) == could
        if transfer is None:
            deadline = self.uploader.next_deadline()
            assert deadline > self.now, "a driver that sleeps until then would spin"
            waits = len(self.active) < MAX_SLOTS and any(key not in busy for key, _ in self.waiting)
            assert (deadline < float("inf")) == waits
        if transfer is not None:
            assert transfer.channel not in busy
            self.waiting.remove((transfer.channel, transfer.request.id))
            self.active.append(transfer)

    @precondition(lambda self: self.active)
    @rule(data=st.data(), complete=st.booleans())
    def end(self, data: st.DataObject, complete: bool) -> None:
        transfer = self.active.pop(data.draw(st.integers(0, len(self.active) - 1)))
        self.uploader.ended(transfer, complete=complete)

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        self.uploader.progressed(self.active[data.draw(st.integers(0, len(self.active) - 1))], self.now, 1)

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def limit(self, data: st.DataObject) -> None:
        self.active[data.draw(st.integers(0, len(self.active) - 1))].limited = True

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key, request_id = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.uploader.cancel(key, request_id)
        self.waiting.remove((key, request_id))

    @rule(who=st.integers(0, 5), encrypted=st.booleans())
    def forget(self, who: int, encrypted: bool) -> None:
        key = Channel(node(who), encrypted)
        self.uploader.forget(key)
        self.waiting = {entry for entry in self.waiting if entry[0] != key}
        self.active = [transfer for transfer in self.active if transfer.channel != key]

    @invariant()
    def books_balance(self) -> None:
        assert self.uploader.queued == len(self.waiting)
        assert self.uploader.active == len(self.active)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
