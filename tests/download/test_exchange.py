"""One task's exchange: what is read from the origin, asked, told, and what neighbours may not make it do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarm import pieces, wire
from swarm.download import exchange as ex
from swarm.download.claims import WHOLE, Rendezvous
from swarm.download.exchange import JOINS_PER_MINUTE, LOSSES_PER_PIECE, MAX_JOINERS, Exchange, Why
from swarm.download.policy import Policy
from swarm.errors import RemoteProtocolError
from swarm.task import MAX_PIECE_BYTES, MIN_PIECE_BYTES, Geometry

TASK = b"t" * 32
POLICY = Policy()
PIECES = 40
GEOMETRY = Geometry(PIECES * MIN_PIECE_BYTES, MIN_PIECE_BYTES)
INFINITY = float("inf")


def node_id(distance: int) -> bytes:
    """The node so far from the task key, which is zero."""
    return distance.to_bytes(20, "big")


ME = node_id(100)
NEAR = [node_id(number) for number in range(1, 9)]


class Engine:
    """An exchange, with what it does kept by kind."""

    def __init__(
        self,
        me: bytes = ME,
        *,
        held: Iterable[int] = (),
        origin: bool = True,
        ranges: bool | None = True,
        policy: Policy = POLICY,
        geometry: Geometry = GEOMETRY,
        shared: bool = True,
    ) -> None:
        self.now = 1000.0
        self.seq = 0
        self.exchange = Exchange(
            me=me,
            task_id=TASK,
            task_key=bytes(20),
            geometry=geometry,
            held=pieces.of(geometry.piece_count, held),
            rng=Random(7),
            now=self.now,
            sign_claim=self._sign if origin else None,
            policy=policy,
            ranges=ranges,
            shared=shared,
        )

    def _sign(self, piece: int, lease: float) -> wire.Signed:
        body = wire.ClaimBody(TASK, GEOMETRY.length, GEOMETRY.piece_length, piece, lease, 1)
        return wire.Signed(wire.encode(body), bytes(32), bytes(64))

    def settled(self) -> Engine:
        self.exchange.settle(self.now)
        return self

    def joined(self, *node_ids: bytes, held: Iterable[int] = (), complete: bool = False, reads: bool = True) -> Engine:
        bitmap = pieces.to_wire(pieces.of(PIECES, held))
        join = wire.Join(TASK, GEOMETRY.length, GEOMETRY.piece_length, held=bitmap, complete=complete, reads=reads)
        for each in node_ids:
            self.exchange.peer_joined(each, join, self.now)
        return self

    def claimed(self, owner: bytes, piece: int, lease: float = 3.0) -> bool:
        self.seq += 1
        return self.exchange.claim_received(owner, piece, lease, self.seq, self.now)

    def after(self, seconds: float = 0.0) -> list[ex.Action]:
        """What it does within so long."""
        until = self.now + seconds
        actions: list[ex.Action] = []
        while True:
            self.exchange.tick(self.now)
            actions += self.exchange.take_actions()
            deadline = self.exchange.next_deadline()
            if deadline > until:
                self.now = until
                return actions
            assert deadline > self.now or not actions or seconds == 0, "a deadline that does not move is a busy loop"
            self.now = max(self.now, deadline)

    def reads(self, seconds: float = 0.0) -> dict[int, Why]:
        return {action.piece: action.why for action in self.after(seconds) if isinstance(action, ex.ReadOrigin)}

    def finish(self, piece: int) -> None:
        self.exchange.piece_verified(piece, None, self.now, took=0.1)


Told = TypeVar("Told", bound=wire.TaskMessage)


def sent(actions: list[ex.Action], kind: type[Told]) -> list[tuple[bytes, Told]]:
    return [(a.node_id, a.message) for a in actions if isinstance(a, ex.Send) and isinstance(a.message, kind)]


def requested(actions: list[ex.Action]) -> list[tuple[bytes, int]]:
    return [(action.node_id, action.piece) for action in actions if isinstance(action, ex.Request)]


def owner_among(*candidates: bytes) -> Callable[[int], bytes]:
    rendezvous = Rendezvous(TASK)
    rendezvous.elect(sorted(candidates))
    return rendezvous.owner


# --- reading the origin -----------------------------------------------------------------------------------------------


def test_the_origin_is_not_read_before_the_first_dials_are_through() -> None:
    engine = Engine()
    assert engine.reads(30.0) == {}
    engine.settled()
    assert engine.reads() != {}


def test_alone_a_node_reads_several_pieces_at_once_in_order() -> None:
    engine = Engine().settled()
    assert engine.reads() == dict.fromkeys(range(POLICY.streams_alone), Why.ALONE)
    engine.finish(0)
    assert engine.reads() == {POLICY.streams_alone: Why.ALONE}


def test_until_ranges_are_known_to_work_one_piece_is_read() -> None:
    engine = Engine(ranges=None).settled()
    assert engine.reads() == {0: Why.ALONE}
    engine.finish(0)
    assert engine.reads() == {1: Why.ALONE}, "everything begins with the same bytes as the first piece"
    engine.finish(1)
    assert len(engine.reads()) == POLICY.streams_alone


def test_a_candidate_reads_only_what_falls_to_it() -> None:
    engine = Engine().settled().joined(*NEAR[:4])
    owner = owner_among(ME, *NEAR[:4])
    reads = engine.reads()
    assert reads
    assert all(owner(piece) == ME and why is Why.RENDEZVOUS for piece, why in reads.items())


def test_all_candidates_together_read_each_piece_once() -> None:
    everybody = [ME, *NEAR[:5]]
    read: Counter[int] = Counter()
    for me in everybody:
        engine = Engine(me, policy=replace(POLICY, streams_alone=PIECES, stream_budget=6 * PIECES, backlog=PIECES)).settled()
        engine.joined(*(other for other in everybody if other != me))
        read.update(list(engine.reads()))
    assert read == dict.fromkeys(range(PIECES), 1)


def test_who_is_not_among_the_nearest_leaves_the_origin_to_them() -> None:
    engine = Engine().settled().joined(*NEAR)
    assert ME not in engine.exchange.candidates()
    assert engine.reads(POLICY.progress_lease / 2) == {}


def test_a_node_that_knows_of_nearer_ones_without_a_link_to_them_leaves_the_origin_to_them() -> None:
    engine = Engine().settled().joined(node_id(200))
    engine.exchange.outranked = True
    assert engine.reads(POLICY.progress_lease / 2) == {}
    engine.exchange.outranked = False
    assert engine.reads()


@pytest.mark.parametrize("why_not", ["complete", "may not read", "struck out"])
def test_who_cannot_read_is_no_candidate(why_not: str) -> None:
    engine = Engine().settled()
    if why_not == "complete":
        engine.joined(*NEAR, complete=True)
    elif why_not == "may not read":
        engine.joined(*NEAR, reads=False)
    else:
        engine.joined(*NEAR)
        for liar in NEAR:
            for piece in range(POLICY.strikes):
                engine.claimed(liar, piece, lease=0.1)
                engine.now += 1.0
                engine.exchange.tick(engine.now)
        engine.now += POLICY.tick
        engine.exchange.tick(engine.now)
    assert ME in engine.exchange.candidates()


def test_a_member_that_may_not_read_the_origin_never_does() -> None:
    engine = Engine(origin=False).settled()
    assert engine.reads(300.0) == {}
    assert not engine.exchange.may_read_origin


def test_what_somebody_holds_or_claims_is_not_read() -> None:
    engine = Engine().settled().joined(node_id(200), held=range(10))
    engine.claimed(node_id(200), 10)
    assert engine.reads().keys().isdisjoint(range(11))


def test_an_expired_claim_gives_the_piece_to_the_next_in_order() -> None:
    other = node_id(200)
    engine = (
        Engine(policy=replace(POLICY, stream_budget=2 * PIECES, streams_alone=PIECES, backlog=PIECES)).settled().joined(other)
    )
    mine = next(piece for piece in range(PIECES) if owner_among(ME, other)(piece) == ME)
    engine.claimed(other, mine, lease=1.0)
    assert mine not in engine.reads(1.0)
    assert engine.reads(POLICY.lease_slack + POLICY.tick)[mine] is Why.LEASE


def test_of_two_readers_of_one_piece_the_lower_ranked_gives_up_unless_it_is_half_done() -> None:
    for done, gives_up in ((0.4, True), (0.5, False)):
        other = node_id(200)
        engine = Engine().settled()
        engine.reads()
        engine.joined(other)
        theirs = next(piece for piece in engine.exchange.reading if owner_among(ME, other)(piece) == other)
        engine.exchange.reading[theirs].done = done
        engine.claimed(other, theirs)
        actions = engine.after()
        assert (ex.AbortOrigin(theirs) in actions) is gives_up
        assert bool(sent(actions, wire.Unclaim)) is gives_up


def test_a_claim_of_lower_rank_does_not_stop_our_read() -> None:
    other = node_id(200)
    engine = Engine().settled()
    engine.reads()
    engine.joined(other)
    mine = next(piece for piece in engine.exchange.reading if owner_among(ME, other)(piece) == ME)
    engine.claimed(other, mine)
    assert ex.AbortOrigin(mine) not in engine.after()


def test_a_piece_that_comes_from_a_peer_ends_our_read_of_it() -> None:
    engine = Engine().settled().joined(node_id(200))
    piece = next(iter(engine.reads()))
    engine.exchange.piece_verified(piece, node_id(200), engine.now)
    assert ex.AbortOrigin(piece) in engine.after()
    assert piece not in engine.exchange.reading


def test_what_nobody_else_has_is_spread_before_more_is_read() -> None:
    other = node_id(200)
    engine = Engine(policy=replace(POLICY, streams_alone=1)).settled().joined(other, held=[0])
    engine.exchange.piece_verified(0, other, engine.now)
    for _ in range(POLICY.backlog):
        (piece,) = engine.reads()
        engine.finish(piece)
    assert engine.reads() == {}, "receiving, and a backlog"
    engine.exchange.piece_uploaded(other, piece, engine.now)
    assert engine.reads()


def test_the_gate_is_open_while_nothing_comes_from_peers() -> None:
    engine = Engine().settled().joined(node_id(200))
    for _ in range(POLICY.backlog + 1):
        reads = engine.reads()
        assert reads
        engine.finish(next(iter(reads)))


def test_a_failed_read_pauses_and_gives_the_claim_back() -> None:
    engine = Engine().settled().joined(node_id(200))
    piece = next(iter(engine.reads()))
    engine.exchange.origin_failed(piece, engine.now, pause=1.0)
    actions = engine.after(0.9)
    assert sent(actions, wire.Unclaim)
    assert not [action for action in actions if isinstance(action, ex.ReadOrigin)]
    assert engine.reads(0.6)


def test_unshared_content_is_read_and_counted_as_such() -> None:
    assert set(Engine(shared=False).settled().reads().values()) == {Why.UNSHARED}


def test_only_what_is_wanted_is_read_in_the_order_of_the_reader() -> None:
    engine = Engine()
    engine.exchange.want(pieces.of(PIECES, [30, 31, 5]), [31, 30, 5])
    engine.settled()
    assert list(engine.reads()) == [31, 30, 5]
    for piece in (5, 30, 31):
        engine.finish(piece)
    assert engine.exchange.complete
    engine.exchange.want(pieces.full(PIECES))
    assert not engine.exchange.complete


def test_a_disputed_piece_is_read_although_others_have_it_and_asked_of_nobody() -> None:
    engine = Engine().settled().joined(*NEAR, held=range(PIECES))
    engine.exchange.dispute([3, 4])
    actions = engine.after()
    assert {a.piece: a.why for a in actions if isinstance(a, ex.ReadOrigin)} == {3: Why.DISPUTE, 4: Why.DISPUTE}
    assert {3, 4}.isdisjoint(piece for _, piece in requested(actions))


# --- an origin without ranges -----------------------------------------------------------------------------------------


def test_an_origin_without_ranges_is_read_by_one_member() -> None:
    everybody = [ME, *NEAR[:4]]
    readers = []
    for me in everybody:
        engine = Engine(me, ranges=False).settled().joined(*(other for other in everybody if other != me))
        if engine.reads() == {WHOLE: Why.STREAM}:
            readers.append(me)
    assert readers == [owner_among(*everybody)(WHOLE)]


def test_alone_the_answer_that_is_coming_will_do() -> None:
    engine = Engine(ranges=None).settled()
    engine.reads()
    engine.exchange.origin_has_no_ranges(0)
    assert list(engine.exchange.reading) == [WHOLE]
    assert engine.reads(5.0) == {}


def test_among_others_a_read_of_a_piece_is_given_back_when_everything_comes() -> None:
    engine = Engine(ranges=None).joined(node_id(200)).settled()
    piece = next(iter(engine.reads()))
    engine.exchange.origin_has_no_ranges(piece)
    actions = engine.after()
    assert sent(actions, wire.Unclaim)
    assert piece not in engine.exchange.reading


def test_the_reader_of_the_whole_keeps_its_claim_while_it_reads() -> None:
    engine = Engine(ranges=False).settled().joined(node_id(200), reads=False)
    assert engine.reads() == {WHOLE: Why.STREAM}
    claims = sent(engine.after(20.0), wire.Claims)
    assert len(claims) >= 10


# --- availability depends on nobody's honesty ---------------------------------------------------------------------------


def test_a_piece_whose_only_holder_spreads_nothing_is_read_after_a_while() -> None:
    holder = node_id(200)
    engine = Engine(held=range(2, PIECES)).settled().joined(holder, held=[0, 1])
    reads: dict[int, Why] = {}
    while not reads:
        # It does send: now and again, and never that piece.
        engine.exchange.piece_started(holder, 1, engine.now)
        reads = engine.reads(0.5)
        engine.exchange.piece_failed(holder, 1, engine.now, status=wire.CANCELLED)
    assert reads == {0: Why.STUCK}
    assert POLICY.stuck_holder <= engine.now - 1000.0 < POLICY.stuck_holder + 1


def test_who_says_it_has_everything_and_sends_nothing_hides_it_for_a_while_only() -> None:
    engine = Engine().settled().joined(*NEAR[:2], held=range(PIECES), reads=False)
    assert engine.reads(POLICY.stuck_holder - 0.1) == {}
    assert set(engine.reads(1.0).values()) == {Why.RENDEZVOUS}


def test_large_pieces_are_given_more_time_before_their_holders_are_doubted() -> None:
    geometry = Geometry(PIECES * MAX_PIECE_BYTES, MAX_PIECE_BYTES)
    engine = Engine(geometry=geometry).settled()
    join = wire.Join(TASK, geometry.length, geometry.piece_length, complete=True)
    engine.exchange.peer_joined(NEAR[0], join, engine.now)
    engine.after(15 * POLICY.stuck_holder)
    assert not engine.exchange.neighbours[NEAR[0]].doubted
    engine.after(2 * POLICY.stuck_holder)
    assert engine.exchange.neighbours[NEAR[0]].doubted


def test_who_refuses_hides_nothing_from_the_moment_it_refuses_until_it_sends() -> None:
    engine = Engine().settled().joined(NEAR[0], held=range(PIECES), reads=False)
    (_, piece), *_ = requested(engine.after())
    engine.exchange.piece_failed(NEAR[0], piece, engine.now, status=wire.REFUSED)
    assert not engine.exchange.held_anywhere().any()
    assert engine.reads()
    engine.exchange.piece_verified(39, NEAR[0], engine.now)
    assert engine.exchange.held_anywhere().all()


def test_neighbours_that_say_they_have_it_all_and_send_nothing_cannot_keep_us_waiting() -> None:
    engine = Engine().settled().joined(*NEAR, held=range(PIECES))
    reads = engine.reads(2 * POLICY.progress_lease + 9 * POLICY.progress_stagger)
    assert set(reads.values()) == {Why.PROGRESS}, "nearer ones are to read, and do not"


def test_claims_without_deliveries_cannot_keep_us_waiting() -> None:
    engine = Engine().settled().joined(*NEAR)
    waited = 0.0
    reads: dict[int, Why] = {}
    while not reads and waited < 60.0:
        for number, liar in enumerate(NEAR):
            for piece in range(5 * number, 5 * number + 5):
                engine.claimed(liar, piece, lease=1e9)
        reads = engine.reads(1.0)
        waited += 1.0
    assert reads
    assert waited < 30.0


def test_a_lease_without_end_is_cut() -> None:
    engine = Engine().settled().joined(node_id(200))
    engine.claimed(node_id(200), 3, lease=120.0)
    assert engine.exchange.claims.next_expiry() <= engine.now + 2 * POLICY.first_lease(GEOMETRY) + POLICY.lease_slack


def test_without_progress_members_go_to_the_origin_one_after_another_and_not_together() -> None:
    started = []
    for number in range(8):
        me = node_id(100 + number)
        others = [node_id(100 + other) for other in range(8) if other != number]
        engine = Engine(me).settled().joined(*NEAR, *others)
        while not engine.reads(0.25):
            pass
        started.append(round(engine.now, 2))
    assert len(set(started)) >= 7
    assert max(started) - min(started) > 6 * POLICY.progress_stagger


def test_progress_starts_the_patience_anew() -> None:
    engine = Engine().settled().joined(*NEAR, held=range(PIECES))
    for piece in range(8):
        assert engine.reads(0.8 * POLICY.progress_lease) == {}
        engine.exchange.piece_verified(piece, NEAR[0], engine.now)


# --- asking neighbours --------------------------------------------------------------------------------------------------


def test_when_a_transfer_starts_the_piece_is_no_longer_asked_elsewhere() -> None:
    engine = Engine(held=range(1, PIECES), origin=False).joined(*NEAR[:3], held=[0])
    asked = requested(engine.after(3 * max(POLICY.spare_after, POLICY.tick)))
    assert len(asked) > 1
    first, piece = asked[0]
    engine.exchange.piece_started(first, piece, engine.now)
    cancelled = [action.node_id for action in engine.after() if isinstance(action, ex.CancelRequest)]
    assert sorted(cancelled) == sorted(who for who, _ in asked[1:])


def test_a_holder_that_does_not_hold_is_believed_no_longer() -> None:
    engine = Engine(origin=False).joined(NEAR[0], held=[3])
    assert requested(engine.after()) == [(NEAR[0], 3)]
    engine.exchange.piece_failed(NEAR[0], 3, engine.now, status=wire.NOT_HELD)
    assert requested(engine.after(5.0)) == []
    assert engine.exchange.counts[3] == 0


def test_who_refuses_is_left_alone_for_a_while_and_the_piece_is_asked_of_another() -> None:
    engine = Engine(origin=False).joined(NEAR[0], held=[3])
    engine.after()
    engine.exchange.piece_failed(NEAR[0], 3, engine.now, status=wire.REFUSED)
    engine.joined(NEAR[1], held=[3])
    assert requested(engine.after(1.0)) == [(NEAR[1], 3)]
    engine.exchange.peer_left(NEAR[1], engine.now)
    assert requested(engine.after(POLICY.peer_pause - 2.0)) == []
    assert requested(engine.after(2.0)) == [(NEAR[0], 3)]


def test_who_misses_deadlines_again_and_again_is_left_alone_for_a_while() -> None:
    engine = Engine(origin=False).joined(NEAR[0], held=[3])
    for _ in range(POLICY.peer_failures):
        assert requested(engine.after(1.0)) == [(NEAR[0], 3)]
        engine.exchange.piece_failed(NEAR[0], 3, engine.now, status=wire.BUSY)
    assert requested(engine.after(POLICY.peer_pause - 1.0)) == []


def test_what_we_cancelled_ourselves_is_nobodys_failure() -> None:
    engine = Engine(origin=False).joined(NEAR[0], held=[3])
    for _ in range(10):
        engine.after()
        engine.exchange.piece_failed(NEAR[0], 3, engine.now, status=wire.REFUSED, gone=True)
        engine.exchange.piece_failed(NEAR[0], 3, engine.now, status=wire.CANCELLED)
    assert engine.exchange.neighbours[NEAR[0]].paused_until == 0.0
    assert engine.exchange.neighbours[NEAR[0]].held[3]


def test_with_a_death_its_holdings_requests_and_claims_go() -> None:
    engine = Engine(origin=False).joined(NEAR[0], held=range(PIECES))
    (_, piece), *_ = requested(engine.after())
    engine.exchange.piece_started(NEAR[0], piece, engine.now)
    engine.claimed(NEAR[0], 3)
    engine.exchange.peer_left(NEAR[0], engine.now)
    assert engine.exchange.counts == [0] * PIECES
    assert not engine.exchange.requests.queued
    assert not engine.exchange.requests.arriving
    assert len(engine.exchange.claims) == 0


def test_a_node_whose_neighbours_keep_it_waiting_knows() -> None:
    engine = Engine(origin=False).joined(*NEAR[:2], held=range(PIECES))
    engine.after()
    assert not engine.exchange.is_starved(engine.now)
    engine.after(POLICY.overloaded + 0.1)
    assert engine.exchange.is_starved(engine.now)
    for neighbour in engine.exchange.neighbours.values():
        for piece in list(neighbour.queued):
            engine.exchange.piece_verified(piece, neighbour.node_id, engine.now)
    assert not engine.exchange.is_starved(engine.now)


def test_a_node_that_is_behind_its_neighbours_lets_more_arrive() -> None:
    def outstanding(mine: int, theirs: int) -> int:
        many = [node_id(1000 + number) for number in range(30)]
        engine = Engine(origin=False, held=range(mine)).joined(*many, held=range(PIECES - theirs, PIECES))
        return len(requested(engine.after()))

    policy = POLICY
    step = round(policy.behind_step * PIECES + 0.5)
    assert outstanding(20, 20) == outstanding(21, 20) == policy.outstanding
    assert policy.outstanding < outstanding(20, 20 + step) <= policy.outstanding + 2 * policy.behind_extra
    assert outstanding(0, 30) == policy.outstanding + 2 * policy.behind_extra


def test_how_far_it_is_behind_is_looked_at_again() -> None:
    engine = Engine(origin=False).joined(*[node_id(1000 + number) for number in range(30)], held=range(30))
    first = requested(engine.after())
    assert len(first) == POLICY.outstanding + 2 * POLICY.behind_extra
    for who, piece in first:
        engine.exchange.piece_verified(piece, who, engine.now)
    engine.exchange.piece_verified(39, NEAR[0], engine.now)
    for piece in range(30, 39):
        engine.exchange.piece_verified(piece, NEAR[0], engine.now)
    engine.now += POLICY.tick
    assert len(requested(engine.after())) == min(POLICY.outstanding, 30 - len(first))


def test_newcomers_are_taken_until_there_are_enough_and_the_starving_longer() -> None:
    engine = Engine()
    join = wire.Join(TASK, GEOMETRY.length, GEOMETRY.piece_length)
    starving = wire.Join(TASK, GEOMETRY.length, GEOMETRY.piece_length, starving=True)
    engine.joined(*(node_id(1000 + number) for number in range(POLICY.accepted - 1)))
    assert engine.exchange.has_room(join)
    engine.joined(node_id(2000))
    assert not engine.exchange.has_room(join)
    assert engine.exchange.has_room(starving)
    engine.joined(*(node_id(3000 + number) for number in range(POLICY.accepted_starving - POLICY.accepted)))
    assert not engine.exchange.has_room(starving)


# --- what neighbours say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bitmap", [b"", bytes(4), bytes(6), b"\xff" * 40])
def test_a_bitmap_of_the_wrong_length_is_a_violation_and_changes_nothing(bitmap: bytes) -> None:
    engine = Engine().joined(NEAR[0], held=[1])
    with pytest.raises(RemoteProtocolError):
        engine.exchange.peer_joined(NEAR[0], wire.Join(TASK, GEOMETRY.length, GEOMETRY.piece_length, held=bitmap), engine.now)
    with pytest.raises(RemoteProtocolError):
        engine.exchange.peer_joined(NEAR[1], wire.Join(TASK, GEOMETRY.length, GEOMETRY.piece_length, held=bitmap), engine.now)
    assert list(engine.exchange.neighbours) == [NEAR[0]]
    assert sum(engine.exchange.counts) == 1


def test_a_bitmap_with_spare_bits_set_is_a_violation() -> None:
    geometry = Geometry(9 * MIN_PIECE_BYTES, MIN_PIECE_BYTES)
    engine = Engine(geometry=geometry)
    with pytest.raises(RemoteProtocolError, match="spare"):
        engine.exchange.peer_joined(NEAR[0], wire.Join(TASK, geometry.length, geometry.piece_length, held=b"\0\x40"), 0.0)


def test_pieces_that_do_not_exist_are_ignored() -> None:
    engine = Engine().joined(NEAR[0])
    engine.exchange.peer_has(NEAR[0], [PIECES, wire.MAX_PIECES - 1], engine.now)
    engine.exchange.peer_lost(NEAR[0], [PIECES, wire.MAX_PIECES - 1])
    assert not engine.claimed(NEAR[0], PIECES)
    assert not engine.claimed(NEAR[0], -2)
    assert sum(engine.exchange.counts) == 0


def test_a_peer_that_has_and_has_not_without_end_breaks_the_protocol_and_fills_no_memory() -> None:
    engine = Engine(origin=False).joined(NEAR[0])

    def oscillate(times: int) -> None:
        for _ in range(times):
            engine.exchange.peer_has(NEAR[0], range(PIECES), engine.now)
            engine.after()
            engine.exchange.peer_lost(NEAR[0], list(range(PIECES)))
            engine.after()

    oscillate(LOSSES_PER_PIECE)
    with pytest.raises(RemoteProtocolError, match="again and again"):
        oscillate(1000)
    assert sum(len(each) for each in engine.exchange.requests.queued.values()) <= PIECES


def test_what_a_neighbour_withdraws_is_no_longer_asked_of_it() -> None:
    engine = Engine(origin=False).joined(NEAR[0], held=range(PIECES))
    who, piece = requested(engine.after())[0]
    engine.exchange.peer_lost(NEAR[0], [piece])
    assert ex.CancelRequest(who, piece) in engine.after()
    assert not engine.exchange.neighbours[NEAR[0]].held[piece]
    assert not engine.exchange.neighbours[NEAR[0]].complete


def test_strangers_say_nothing() -> None:
    engine = Engine(origin=False)
    engine.exchange.peer_has(NEAR[0], [1], engine.now)
    engine.exchange.peer_lost(NEAR[0], [1])
    engine.exchange.peer_complete(NEAR[0], engine.now)
    engine.exchange.piece_started(NEAR[0], 1, engine.now)
    engine.exchange.piece_failed(NEAR[0], 1, engine.now, status=wire.NOT_HELD)
    engine.exchange.peer_left(NEAR[0], engine.now)
    assert engine.exchange.counts == [0] * PIECES
    assert engine.after() == []


def test_our_own_claim_sent_back_to_us_is_ignored() -> None:
    engine = Engine().settled()
    piece = next(iter(engine.reads()))
    assert not engine.claimed(ME, piece)
    assert piece in engine.exchange.reading


def test_a_second_join_replaces_what_the_first_said() -> None:
    engine = Engine(origin=False).joined(NEAR[0], held=[1, 2]).joined(NEAR[0], held=[2, 3])
    assert [piece for piece in range(PIECES) if engine.exchange.counts[piece]] == [2, 3]


def test_a_member_may_join_anew_a_few_times_a_minute_for_as_long_as_it_likes() -> None:
    engine = Engine(origin=False)
    for _ in range(10):
        for _ in range(JOINS_PER_MINUTE):
            engine.joined(NEAR[0], held=[1])
        engine.now += 60
    engine.joined(*[NEAR[0]] * JOINS_PER_MINUTE, held=[1])
    with pytest.raises(RemoteProtocolError, match="again and again"):
        engine.joined(NEAR[0])
    engine.joined(*(node_id(1000 + number) for number in range(2 * MAX_JOINERS)))
    assert len(engine.exchange._joins) == MAX_JOINERS


# --- telling ----------------------------------------------------------------------------------------------------------------


def test_a_new_piece_is_told_to_those_who_lack_it_at_once_and_to_the_others_later() -> None:
    engine = Engine().joined(NEAR[0]).joined(NEAR[1], held=[3])
    engine.finish(3)
    at_once = sent(engine.after(2 * POLICY.have_batch), wire.Have)
    assert at_once == [(NEAR[0], wire.Have(TASK, [3]))]
    assert (NEAR[1], wire.Have(TASK, [3])) in sent(engine.after(POLICY.have_late + 1), wire.Have)


def test_a_rare_piece_is_told_at_once_to_a_few_and_to_the_others_with_the_next_batch() -> None:
    others = [node_id(200 + number) for number in range(3 * POLICY.have_at_once)]
    engine = Engine(origin=False).joined(*others).joined(NEAR[0], held=[3])
    engine.exchange.piece_verified(3, NEAR[0], engine.now)
    at_once = [who for who, _ in sent(engine.after(), wire.Have)]
    assert len(set(at_once)) == len(at_once) == POLICY.have_at_once
    batch = [who for who, _ in sent(engine.after(POLICY.have_batch), wire.Have)]
    assert sorted(at_once + batch) == sorted(others)


def test_a_piece_read_from_the_origin_is_told_to_everybody_at_once_for_their_leases_run() -> None:
    others = [node_id(200 + number) for number in range(2 * POLICY.have_at_once)]
    engine = Engine().joined(*others)
    engine.finish(3)
    assert sorted(who for who, _ in sent(engine.after(), wire.Have)) == sorted(others)


def test_a_piece_that_many_hold_waits_for_the_batch() -> None:
    engine = Engine(origin=False).joined(*NEAR[:4], held=[3]).joined(NEAR[4])
    engine.exchange.piece_verified(3, NEAR[0], engine.now)
    assert sent(engine.after(POLICY.have_batch_of(GEOMETRY) / 2), wire.Have) == []
    assert sent(engine.after(POLICY.have_batch), wire.Have) == [(NEAR[4], wire.Have(TASK, [3]))]


def test_what_is_new_goes_with_a_claim_to_everybody_who_hears_it() -> None:
    """Also to those that hold it themselves, who would hear it late."""
    others = [node_id(200 + number) for number in range(2 * POLICY.have_at_once)]
    engine = Engine().settled().joined(*others, held=[3])
    piece = next(iter(engine.reads()))
    engine.after(1.0)
    engine.exchange.piece_verified(3, others[0], engine.now)
    engine.exchange.reading[piece].done = 0.5  # so that it is claimed again
    actions = engine.after(2.0)
    claimed = [who for who, _ in sent(actions, wire.Claims)]
    assert sorted(claimed) == sorted(others)
    assert sorted(sent(actions, wire.Have)) == sorted((who, wire.Have(TASK, [3])) for who in claimed)


def test_neighbours_that_are_told_the_same_are_sent_the_same_message() -> None:
    """It is encoded once, and a broadcast is what a busy node does most."""
    engine = Engine().joined(*NEAR[:4])
    engine.finish(3)
    messages = [message for _, message in sent(engine.after(), wire.Have)]
    assert len(messages) == 4
    assert all(message is messages[0] for message in messages)


def test_a_piece_verified_between_our_greeting_and_the_answer_is_told() -> None:
    engine = Engine()
    engine.finish(2)
    greeting = engine.exchange.join_message(NEAR[0], reply=True, complete=False, seal=None, private=False)
    assert pieces.from_wire(greeting.held, PIECES)[2]
    engine.finish(3)
    engine.after(POLICY.have_late)
    engine.joined(NEAR[0])
    engine.finish(4)
    assert sent(engine.after(POLICY.have_batch), wire.Have) == [(NEAR[0], wire.Have(TASK, [3, 4]))]


def test_a_complete_neighbour_is_told_of_no_new_piece_at_once() -> None:
    engine = Engine().joined(NEAR[0], complete=True)
    engine.finish(3)
    assert sent(engine.after(POLICY.have_late / 2), wire.Have) == []


def test_many_pieces_are_told_in_messages_of_a_bounded_size() -> None:
    geometry = Geometry(10_000 * MIN_PIECE_BYTES, MIN_PIECE_BYTES)
    engine = Engine(geometry=geometry)
    join = wire.Join(TASK, geometry.length, geometry.piece_length, held=bytes(1250))
    engine.exchange.peer_joined(NEAR[0], join, engine.now)
    for piece in range(10_000):
        engine.exchange.piece_verified(piece, None, engine.now)
    told = sent(engine.after(1.0), wire.Have)
    engine.exchange.piece_lost(range(10_000), engine.now)
    lost = sent(engine.after(), wire.Lost)
    messages: list[wire.Message] = [*(message for _, message in told), *(message for _, message in lost)]
    for each in messages:
        assert wire.decode_frame(wire.encode_frame([each])) == [each]
    assert sum(len(message.pieces) for _, message in told) == 10_000
    assert sum(len(message.pieces) for _, message in lost) == 10_000


def test_a_rotten_piece_is_withdrawn_from_everybody_and_wanted_again() -> None:
    engine = Engine(held=range(PIECES)).joined(*NEAR[:2], held=[0])
    assert engine.exchange.complete
    engine.exchange.piece_lost([3, 4], engine.now)
    actions = engine.after()
    assert sent(actions, wire.Lost) == [(each, wire.Lost(TASK, [3, 4])) for each in NEAR[:2]]
    assert not engine.exchange.complete
    assert engine.exchange.next_deadline() < INFINITY
    engine.exchange.piece_lost([3], engine.now)
    assert sent(engine.after(), wire.Lost) == [], "told once"


def test_a_piece_lost_before_it_was_told_is_never_told() -> None:
    engine = Engine(policy=replace(POLICY, have_rare=0)).joined(*NEAR[:3], held=[3])
    engine.joined(NEAR[3])
    engine.finish(3)
    engine.exchange.piece_lost([3], engine.now)
    assert sent(engine.after(10.0), wire.Have) == []


def test_a_newcomer_hears_what_we_are_reading() -> None:
    engine = Engine().settled()
    reading = set(engine.reads())
    engine.joined(NEAR[0])
    ((who, message),) = sent(engine.after(), wire.Claims)
    claimed = {wire.decode(signed.body, wire.ClaimBody).piece for signed in message.claims}
    assert (who, claimed) == (NEAR[0], reading)


def test_a_neighbour_that_left_hears_no_claim_and_is_not_said_to_have_been_reached() -> None:
    stays, leaves = node_id(200), node_id(201)
    engine = Engine().settled().joined(stays, leaves)
    piece = next(iter(engine.reads()))
    engine.exchange.peer_left(leaves, engine.now)
    engine.exchange.reading[piece].done = 0.5  # so that it is claimed again
    told = sent(engine.after(POLICY.lease_first), wire.Claims)
    assert told
    assert {who for who, _ in told} == {stays}
    assert {message.reached for _, message in told} == {stays[:4]}


def test_a_claim_is_relayed_once_to_those_its_owner_could_not_reach() -> None:
    engine = Engine().joined(*NEAR[:4])
    claim = engine._sign(3, 3.0)
    reached = b"".join(each[:4] for each in (ME,)) + NEAR[1][:4]
    engine.exchange.relay(NEAR[0], NEAR[0], [claim], b"".join((NEAR[1][:4], ME[:4])))
    # The first four bytes of these ids are all the same, so with NEAR[1] all count as reached.
    assert sent(engine.after(), wire.Claims) == []
    far = [bytes([number]) * 20 for number in range(200, 204)]
    engine.joined(*far)
    engine.exchange.relay(far[0], far[0], [claim], reached + far[1][:4])
    assert [who for who, _ in sent(engine.after(), wire.Claims)] == [far[2], far[3]]
    engine.exchange.relay(far[1], far[0], [claim], reached)
    assert sent(engine.after(), wire.Claims) == [], "it did not come from its owner"


def test_a_read_that_makes_progress_is_claimed_again_and_one_that_does_not_is_not() -> None:
    for done, again in ((0.5, True), (0.1, False)):
        engine = Engine().settled().joined(node_id(200))
        piece = next(iter(engine.reads()))
        engine.exchange.reading[piece].done = done
        assert bool(sent(engine.after(POLICY.lease_first), wire.Claims)) is again


def test_a_complete_task_with_nothing_to_tell_sleeps() -> None:
    engine = Engine(held=range(PIECES))
    assert engine.after(10.0) == []
    assert engine.exchange.next_deadline() == INFINITY


def test_empty_content_is_complete_at_once() -> None:
    engine = Engine(geometry=Geometry.of(0)).settled()
    assert engine.exchange.complete
    assert engine.after(10.0) == []


# --- whatever comes -----------------------------------------------------------------------------------------------------------


class Events(RuleBasedStateMachine):
    """Any neighbour says anything in any order; what the exchange believes stays consistent, and it never asks for nonsense."""

    nodes = st.sampled_from(NEAR[:4])
    some = st.lists(st.integers(0, PIECES - 1), max_size=10)

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(policy=replace(POLICY, strikes=10_000)).settled()
        self.asked: Counter[tuple[bytes, int]] = Counter()

    @rule(who=nodes, held=some, complete=st.booleans())
    def joins(self, who: bytes, held: list[int], complete: bool) -> None:
        self.engine.joined(who, held=held, complete=complete)

    @rule(who=nodes)
    def leaves(self, who: bytes) -> None:
        self.engine.exchange.peer_left(who, self.engine.now)

    @rule(who=nodes, told=some)
    def has(self, who: bytes, told: list[int]) -> None:
        self.engine.exchange.peer_has(who, told, self.engine.now)

    @rule(who=nodes, told=st.lists(st.integers(0, PIECES - 1), max_size=2))
    def loses(self, who: bytes, told: list[int]) -> None:
        self.engine.exchange.peer_lost(who, told)

    @rule(who=nodes, piece=st.integers(-1, PIECES - 1), lease=st.floats(0.1, 100.0))
    def claims(self, who: bytes, piece: int, lease: float) -> None:
        self.engine.claimed(who, piece, lease)

    @rule(who=nodes, piece=st.integers(0, PIECES - 1))
    def starts(self, who: bytes, piece: int) -> None:
        self.engine.exchange.piece_started(who, piece, self.engine.now)

    @rule(who=nodes, piece=st.integers(0, PIECES - 1))
    def sends(self, who: bytes, piece: int) -> None:
        self.engine.exchange.piece_verified(piece, who, self.engine.now, took=0.1)

    @rule(who=nodes, piece=st.integers(0, PIECES - 1), status=st.integers(1, 4), gone=st.booleans())
    def fails(self, who: bytes, piece: int, status: int, gone: bool) -> None:
        self.engine.exchange.piece_failed(who, piece, self.engine.now, status=status, gone=gone)

    @rule(told=some)
    def rots(self, told: list[int]) -> None:
        self.engine.exchange.piece_lost(told, self.engine.now)

    @rule(data=st.data())
    def origin_answers(self, data: st.DataObject) -> None:
        reading = sorted(piece for piece in self.engine.exchange.reading if piece != WHOLE)
        if reading:
            piece = data.draw(st.sampled_from(reading))
            if data.draw(st.booleans()):
                self.engine.finish(piece)
            else:
                self.engine.exchange.origin_failed(piece, self.engine.now, pause=1.0)

    @rule(seconds=st.floats(0.0, 8.0))
    def time_passes(self, seconds: float) -> None:
        before = self.engine.exchange.held.copy()
        for action in self.engine.after(seconds):
            match action:
                case ex.Request(who, piece):
                    assert self.engine.exchange.neighbours[who].held[piece]
                    assert not before[piece]
                case ex.ReadOrigin(piece):
                    assert piece == WHOLE or not before[piece]

    @invariant()
    def what_is_believed_is_consistent(self) -> None:
        exchange = self.engine.exchange
        assert exchange.counts == [sum(n.held[p] for n in exchange.neighbours.values()) for p in range(PIECES)]
        asked = [(piece, [*holders]) for piece, holders in exchange.requests.queued.items()]
        asked += [(piece, [*senders]) for piece, senders in exchange.requests.arriving.items()]
        for piece, nodes in asked:
            assert nodes
            assert all(who in exchange.neighbours for who in nodes), piece
        assert all(exchange.counts[piece] >= 1 for piece in exchange._single_since)


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
