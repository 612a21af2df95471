"""Rendezvous order, claims, leases and strikes: who reads which piece, and how an owner may not cheat."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from swarm.download.claims import MAX_HISTORY, WHOLE, ClaimBook, Rendezvous, score, slow
from swarm.download.policy import Policy
from swarm.task import MIB, Geometry

POLICY = Policy()
TASK = b"t" * 32
ALICE, BOB, CAROL = b"a" * 20, b"b" * 20, b"c" * 20
INFINITY = float("inf")


def nodes(count: int) -> list[bytes]:
    return [Random(number).randbytes(20) for number in range(count)]


def book() -> ClaimBook:
    return ClaimBook(POLICY)


def owner_of(claims: ClaimBook, piece: int) -> bytes | None:
    claim = claims.get(piece)
    return claim.owner if claim is not None else None


# --- rendezvous -------------------------------------------------------------------------------------------------------


def test_everybody_agrees_on_the_owner_whatever_order_they_know_the_candidates_in() -> None:
    candidates = nodes(8)
    one, other = Rendezvous(TASK), Rendezvous(TASK)
    one.elect(candidates)
    other.elect(candidates[::-1])
    assert [one.owner(piece) for piece in range(100)] == [other.owner(piece) for piece in range(100)]


def test_pieces_are_shared_out_about_evenly() -> None:
    rendezvous = Rendezvous(TASK)
    rendezvous.elect(nodes(8))
    shares = Counter(rendezvous.owner(piece) for piece in range(1600))
    assert len(shares) == 8
    assert all(140 < share < 260 for share in shares.values())


def test_when_a_candidate_goes_only_its_pieces_move_and_each_to_its_runner_up() -> None:
    candidates = nodes(8)
    rendezvous = Rendezvous(TASK)
    rendezvous.elect(candidates)
    before = {piece: (rendezvous.owner(piece), rendezvous.runner_up(piece)) for piece in range(200)}
    rendezvous.elect(candidates[1:])
    for piece, (owner, runner_up) in before.items():
        assert rendezvous.owner(piece) == (runner_up if owner == candidates[0] else owner)


def test_the_owner_has_the_highest_score() -> None:
    candidates = nodes(5)
    rendezvous = Rendezvous(TASK)
    rendezvous.elect(candidates)
    for piece in (WHOLE, 0, 77):
        assert rendezvous.owner(piece) == max(candidates, key=lambda node_id: score(node_id, TASK, piece))
    alone = Rendezvous(TASK)
    alone.elect(candidates[:1])
    assert alone.owner(3) == candidates[0]
    assert alone.runner_up(3) is None


def test_a_task_of_many_pieces_costs_nothing_until_a_piece_is_asked_about() -> None:
    rendezvous = Rendezvous(TASK)
    for number in range(1000):
        rendezvous.elect(nodes(8)[number % 7 :])
    assert len(rendezvous._ranked) == 0


# --- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_holds_until_its_lease_is_over() -> None:
    claims = book()
    assert claims.accept(3, ALICE, 3.0, 1, wins=True, now=100.0)
    assert claims.next_expiry() == 103.0 + POLICY.lease_slack
    assert claims.expire(103.0) == 0
    assert claims.expire(103.0 + POLICY.lease_slack) == 1
    assert claims.get(3) is None
    assert claims.next_expiry() == INFINITY


def test_the_owner_who_ranks_higher_takes_the_piece_over_and_the_lower_one_does_not() -> None:
    claims = book()
    claims.accept(3, ALICE, 3.0, 1, wins=True, now=0.0)
    assert claims.accept(3, BOB, 3.0, 1, wins=False, now=0.0), "new, and to be relayed"
    assert owner_of(claims, 3) == ALICE
    assert claims.accept(3, CAROL, 3.0, 1, wins=True, now=0.0)
    assert owner_of(claims, 3) == CAROL


def test_a_replayed_or_overtaken_claim_changes_nothing() -> None:
    claims = book()
    assert claims.accept(3, ALICE, 3.0, 7, wins=True, now=0.0)
    claims.give_up(ALICE, [3])
    for seq in (7, 6, 0):
        assert not claims.accept(3, ALICE, 3.0, seq, wins=True, now=1.0)
    assert claims.get(3) is None
    assert claims.accept(3, ALICE, 3.0, 8, wins=True, now=1.0)


def test_two_expired_leases_and_an_owner_is_ignored() -> None:
    claims = book()
    for number in range(POLICY.strikes):
        assert not claims.struck_out(ALICE)
        assert claims.accept(number, ALICE, 1.0, number, wins=True, now=0.0)
        claims.expire(10.0)
    assert claims.struck_out(ALICE)
    assert not claims.accept(9, ALICE, 1.0, 99, wins=True, now=11.0)


def test_an_owner_may_not_claim_more_than_it_can_read_at_once() -> None:
    claims = book()
    taken = sum(claims.accept(piece, ALICE, 3.0, piece, wins=True, now=0.0) for piece in range(50))
    assert taken == len(claims) == POLICY.claims_per_owner
    assert claims.accept(60, BOB, 3.0, 1, wins=True, now=0.0), "others still may"


def test_a_trickle_that_renews_its_claim_for_ever_loses_it_and_gets_a_strike() -> None:
    claims = book()
    now, seq = 0.0, 0
    while claims.accept(3, ALICE, 3.0, seq := seq + 1, wins=True, now=now):
        now += 2.9
        assert now < 20.0
    assert claims.get(3) is not None, "the last lease runs"
    assert claims.expire(now + 10.0) == 1
    claims.accept(4, ALICE, 1.0, 99, wins=True, now=50.0)
    claims.expire(60.0)
    assert claims.struck_out(ALICE)


def test_who_takes_a_claim_back_just_in_time_cannot_keep_a_piece_from_others_for_ever() -> None:
    claims = book()
    held = 0.0
    for seq in range(1, 1000):
        if claims.accept(3, ALICE, 3.0, seq, wins=True, now=2.9 * seq):
            held += 2.9
        claims.give_up(ALICE, [3])
    assert held <= 2.9 * POLICY.claim_attempts


def test_who_delivers_may_claim_again() -> None:
    claims = book()
    for seq in range(1, 100):
        assert claims.accept(3, ALICE, 3.0, seq, wins=True, now=float(seq))
        claims.delivered(ALICE, 3, float(seq))


def test_delivering_ends_ones_own_claim_and_not_somebody_elses() -> None:
    claims = book()
    claims.accept(3, ALICE, 3.0, 1, wins=True, now=0.0)
    claims.delivered(BOB, 3, 1.0)
    assert owner_of(claims, 3) == ALICE, "Bob may die; Alice's claim may be alone alive"
    claims.delivered(ALICE, 3, 1.5)
    assert claims.get(3) is None
    assert claims.read_times() == {ALICE: 1.5}


def test_a_death_frees_the_dead_nodes_pieces_without_a_strike() -> None:
    claims = book()
    claims.accept(3, ALICE, 3.0, 1, wins=True, now=0.0)
    claims.accept(4, BOB, 3.0, 1, wins=True, now=0.0)
    claims.died(ALICE)
    assert list(claims.pieces()) == [4]
    assert not claims.struck_out(ALICE)


def test_giving_up_what_somebody_else_claimed_does_nothing() -> None:
    claims = book()
    claims.accept(3, ALICE, 3.0, 1, wins=True, now=0.0)
    claims.give_up(BOB, [3, 4])
    assert owner_of(claims, 3) == ALICE


def test_a_piece_we_hold_is_no_reason_for_a_strike() -> None:
    claims = book()
    claims.accept(3, ALICE, 1.0, 1, wins=True, now=0.0)
    claims.held(3)
    assert claims.expire(100.0) == 0


def test_the_reader_of_the_whole_goes_on_while_it_makes_progress_and_not_longer() -> None:
    claims = book()
    seq = 0
    for _ in range(20):
        assert claims.accept(WHOLE, ALICE, 3.0, seq := seq + 1, wins=True, now=0.0)
        claims.progressed(ALICE)
    claims.progressed(BOB)
    assert not all(claims.accept(WHOLE, ALICE, 3.0, seq := seq + 1, wins=True, now=0.0) for _ in range(10))


def test_the_memory_for_old_claims_is_bounded() -> None:
    claims = book()
    for number in range(MAX_HISTORY + 500):
        claims.accept(number, ALICE, 3.0, number, wins=True, now=0.0)
        claims.give_up(ALICE, [number])
    assert len(claims._history) == MAX_HISTORY


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 30), st.floats(0, 5)), max_size=60))
def test_whatever_comes_no_claim_outlives_its_lease_and_no_owner_has_too_many(steps: list[tuple[int, int, int, float]]) -> None:
    claims = book()
    now = 0.0
    for piece, who, seq, later in steps:
        now += later
        claims.expire(now)
        claims.accept(piece, (ALICE, BOB, CAROL)[who], 2.0, seq, wins=seq % 2 == 0, now=now)
        assert claims.next_expiry() > now
        assert max(Counter(claims.owners()).values(), default=0) <= POLICY.claims_per_owner


# --- the slow ---------------------------------------------------------------------------------------------------------


def test_who_takes_three_medians_is_slow_once_there_is_a_median() -> None:
    assert slow({ALICE: 1.0, BOB: 100.0}, POLICY) == set()
    assert slow({ALICE: 1.0, BOB: 1.2, CAROL: 3.7}, POLICY) == {CAROL}
    assert slow({ALICE: 1.0, BOB: 1.2, CAROL: 3.5}, POLICY) == set()


def test_the_first_lease_grows_with_the_piece() -> None:
    assert POLICY.first_lease(Geometry.of(3 * MIB)) == 3.0
    assert POLICY.first_lease(Geometry.of(4096 * MIB)) == 16.0
