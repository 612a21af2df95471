"""Which piece is asked of whom: rarest first, spread, duplicated only in the endgame, and never beyond its bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarm import pieces
from swarm.download.picker import Neighbour, Requests, choose_requests
from swarm.download.policy import Policy

COUNT = 12
POLICY = replace(Policy(), queued=2, queued_at_few=1, queued_overdue=5, arriving=4, outstanding=10)
PATIENCE = 1.0
SPARE_AFTER = 0.5


def neighbour(number: int, held: list[int] | None = None) -> Neighbour:
    return Neighbour(bytes([number]) * 20, number, pieces.full(COUNT) if held is None else pieces.of(COUNT, held))


def counts_of(neighbours: list[Neighbour]) -> list[int]:
    return [sum(each.held[piece] for each in neighbours) for piece in range(COUNT)]


def choose(
    neighbours: list[Neighbour], requests: Requests, *, missing: list[int] | None = None, policy: Policy = POLICY,
    now: float = 0.0, fetching: bool = False, first: list[int] | None = None, seed: int = 1, extra: int = 0,
) -> list[tuple[int, int, bool]]:  # fmt: skip
    wanted = pieces.full(COUNT) if missing is None else pieces.of(COUNT, missing)
    chosen = choose_requests(
        neighbours, wanted, requests, counts_of(neighbours), policy, Random(seed), now,
        patience=PATIENCE, spare_after=SPARE_AFTER, extra=extra, fetching=fetching, first=first or [],
    )  # fmt: skip
    return [(each.distance, piece, spare) for each, piece, spare in chosen]


def test_a_few_pieces_are_queued_at_each_neighbour_and_none_twice() -> None:
    neighbours = [neighbour(number) for number in range(3)]
    chosen = choose(neighbours, Requests())
    assert Counter(who for who, _, _ in chosen) == {0: 2, 1: 2, 2: 2}
    assert len({piece for _, piece, _ in chosen}) == 6
    assert not any(spare for _, _, spare in chosen)


def test_few_neighbours_are_asked_for_more_at_a_time_so_that_no_piece_waits_for_a_round_trip() -> None:
    policy = replace(POLICY, queued=1, queued_at_few=4)
    for count, each in ((1, 4), (2, 4), (3, 3), (5, 2), (6, 1), (12, 1)):
        neighbours = [neighbour(number) for number in range(count)]
        asked = Counter(who for who, _, _ in choose(neighbours, Requests(), policy=policy))
        assert max(asked.values()) == each
        assert asked.total() <= policy.outstanding


def test_the_rarest_piece_is_asked_for_first() -> None:
    neighbours = [neighbour(0), neighbour(1, [0, 1, 2]), neighbour(2, [0, 1, 2])]
    asked = {piece for who, piece, _ in choose(neighbours[:1], Requests(), missing=[0, 1, 2, 7])}
    assert len(asked) == 2
    for seed in range(10):
        requests = Requests()
        one = neighbour(0)
        counts = counts_of([one, *neighbours[1:]])
        chosen = choose_requests(
            [one], pieces.of(COUNT, [0, 1, 2, 7]), requests, counts, replace(POLICY, queued=1), Random(seed), 0.0,
            patience=PATIENCE, spare_after=SPARE_AFTER, extra=0, fetching=False,
        )  # fmt: skip
        assert [piece for _, piece, _ in chosen] == [7]


def test_what_a_reader_waits_for_goes_before_what_is_rare() -> None:
    neighbours = [neighbour(0), neighbour(1, [3, 4])]
    assert choose([neighbours[0]], Requests(), first=[4, 3], policy=replace(POLICY, queued=1)) == [(0, 4, False)]


def test_only_what_a_neighbour_has_and_we_lack_is_asked_for() -> None:
    assert choose([neighbour(0, [1, 2])], Requests(), missing=[2, 3]) == [(0, 2, False)]
    assert choose([neighbour(0, [1, 2])], Requests(), missing=[3]) == []
    assert choose([], Requests()) == []


def test_a_paused_neighbour_is_not_asked() -> None:
    paused = neighbour(0)
    paused.paused_until = 10.0
    assert choose([paused], Requests(), now=9.0) == []
    assert choose([paused], Requests(), now=10.0)


def test_while_enough_arrives_nothing_more_is_asked_for() -> None:
    requests = Requests()
    sender = neighbour(0)
    for piece in range(POLICY.arriving):
        requests.add(sender, piece, 0.0)
        requests.started(sender, piece)
    assert choose([sender, neighbour(1)], requests) == []
    assert choose([sender, neighbour(1)], requests, extra=1), "one that is behind goes on"


def test_all_requests_together_are_bounded() -> None:
    for extra in (0, 1):
        neighbours = [neighbour(number) for number in range(12)]
        assert len(choose(neighbours, Requests(), extra=extra)) == POLICY.outstanding + 2 * extra


def test_requests_stuck_in_a_long_queue_do_not_keep_us_from_asking_others() -> None:
    neighbours = [neighbour(number) for number in range(12)]
    requests = Requests()
    choose(neighbours[:5], requests)
    assert choose(neighbours, requests, now=PATIENCE / 2) == []
    assert choose(neighbours, requests, now=2 * PATIENCE)


def test_a_node_whose_requests_all_wait_behind_rarer_pieces_asks_the_same_neighbours_for_something_else() -> None:
    """The server takes what is rare: a request that lost once loses again, and one at each neighbour would be the end."""
    neighbours = [neighbour(number) for number in range(3)]
    policy = replace(POLICY, queued=1, queued_overdue=3)
    requests = Requests()
    first = choose(neighbours, requests, policy=policy)
    assert choose(neighbours, requests, policy=policy, now=PATIENCE / 2) == []
    second = choose(neighbours, requests, policy=policy, now=PATIENCE * 1.5)
    assert Counter(who for who, _, _ in second) == {0: 1, 1: 1, 2: 1}
    assert not {piece for _, piece, _ in first} & {piece for _, piece, _ in second}
    choose(neighbours, requests, policy=policy, now=PATIENCE * 3)
    assert choose(neighbours, requests, policy=policy, now=PATIENCE * 5) == []
    assert {len(each.queued) for each in neighbours} == {policy.queued_overdue}


def asked_again(neighbours: list[Neighbour], requests: Requests, *, fetching: bool) -> list[tuple[int, int, bool]]:
    """What is asked for in a while when piece 5 is missing and nobody begins to send it."""
    chosen = []
    for step in range(20):
        chosen += choose(neighbours, requests, missing=[5], fetching=fetching, now=step * (SPARE_AFTER + 0.01))
    return chosen


def test_in_the_endgame_a_waiting_piece_is_asked_for_elsewhere_but_not_everywhere() -> None:
    neighbours = [neighbour(number) for number in range(8)]
    chosen = asked_again(neighbours, Requests(), fetching=True)
    assert [spare for _, _, spare in chosen] == [False] + [True] * (POLICY.endgame_holders - 1)
    assert {piece for _, piece, _ in chosen} == {5}
    assert len({who for who, _, _ in chosen}) == POLICY.endgame_holders


def test_a_node_to_which_nothing_comes_asks_more_neighbours_for_its_last_piece() -> None:
    neighbours = [neighbour(number) for number in range(8)]
    assert len(asked_again(neighbours, Requests(), fetching=False)) == 8


def test_two_idle_neighbours_are_not_both_asked_for_the_same_piece() -> None:
    """Both would begin, and neither would hear in time that the other has: all of it came twice."""
    neighbours = [neighbour(number) for number in range(8)]
    requests = Requests()
    assert len(choose(neighbours, requests, missing=[5])) == 1
    assert choose(neighbours, requests, missing=[5], now=SPARE_AFTER - 0.01) == []
    assert [spare for _, _, spare in choose(neighbours, requests, missing=[5], now=SPARE_AFTER)] == [True]
    assert choose(neighbours, requests, missing=[5], now=SPARE_AFTER + 0.1) == [], "the latest request is young"


def test_an_arriving_piece_is_not_asked_for_again() -> None:
    requests = Requests()
    sender = neighbour(0)
    requests.add(sender, 5, 0.0)
    requests.started(sender, 5)
    assert choose([sender, neighbour(1)], requests, missing=[5]) == []
    requests.ended(sender, 5)
    assert choose([neighbour(1)], requests, missing=[5]) == [(1, 5, False)]


class Book(RuleBasedStateMachine):
    """`Requests` and the neighbours' own lists say the same, whatever happens in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = Requests()
        self.neighbours = [neighbour(number, [p for p in range(COUNT) if (p + number) % 3]) for number in range(5)]
        self.now = 0.0

    @rule(seed=st.integers(0, 1000), fetching=st.booleans())
    def asked(self, seed: int, fetching: bool) -> None:
        chosen = choose(self.neighbours, self.requests, now=self.now, fetching=fetching, seed=seed)
        assert len(chosen) <= POLICY.outstanding
        for who, piece, _ in chosen:
            assert self.neighbours[who].held[piece]
            assert piece not in self.requests.arriving
            queued = self.neighbours[who].queued
            assert sum(asked > self.now - PATIENCE for asked in queued.values()) <= POLICY.queued
            assert len(queued) <= POLICY.queued_overdue

    @precondition(lambda self: any(each.queued for each in self.neighbours))
    @rule(data=st.data())
    def one_starts(self, data: st.DataObject) -> None:
        sender = data.draw(st.sampled_from([each for each in self.neighbours if each.queued]))
        self.requests.started(sender, data.draw(st.sampled_from(sorted(sender.queued))))

    @rule(who=st.integers(0, 4), piece=st.integers(0, COUNT - 1))
    def one_ends(self, who: int, piece: int) -> None:
        self.requests.ended(self.neighbours[who], piece)
        assert piece not in self.neighbours[who].queued

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def both_sides_agree(self) -> None:
        for mine, theirs in ((self.requests.queued, "queued"), (self.requests.arriving, "arriving")):
            seen = {(each.node_id, piece) for each in self.neighbours for piece in getattr(each, theirs)}
            assert seen == {(node_id, piece) for piece, holders in mine.items() for node_id in holders}
            assert all(mine.values()), "no empty entry is left behind"


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
