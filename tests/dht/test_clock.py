"""Wrong clocks: whose record is stamped how, and judged how."""

from __future__ import annotations

from functools import partial

import pytest

from swarm.dht.clock import CORRECTION_PAUSE, MAX_SKEW, MAX_WITNESSES, NetworkClock

TRUE = 1_800_000_000.0


def clocks(*ahead: float) -> list[NetworkClock]:
    """Nodes with these errors, each of which has heard all others, at monotonic time 0."""
    made = [NetworkClock(partial(float, TRUE + wrong)) for wrong in ahead]
    for number, clock in enumerate(made):
        for other, wrong in enumerate(ahead):
            if other != number:
                clock.observe(str(other), TRUE + wrong, 0.0)
    return made


@pytest.mark.parametrize("hours", [1, -1, 24])
@pytest.mark.parametrize("others", [1, 2, 3, 10])
def test_one_wrong_clock_neither_fails_nor_is_failed(hours: int, others: int) -> None:
    nodes = clocks(hours * 3600.0, *[0.0] * others)
    for writer in nodes:
        issued = writer.stamp(0.0)
        for reader in nodes:
            assert reader.remaining(issued, issued + 600, 0.0) > 0


def test_an_expired_record_is_expired_for_everybody_whose_clock_is_right() -> None:
    nodes = clocks(0.0, 1.0, -1.0, 3600.0)
    for reader in nodes[:3]:
        assert reader.remaining(int(TRUE) - 700, int(TRUE) - 100, 0.0) <= 0


def test_a_record_of_the_far_future_is_refused() -> None:
    (alone,) = clocks(0.0)
    assert alone.remaining(int(TRUE + MAX_SKEW) + 1, int(TRUE) + 600, 0.0) == 0.0
    assert alone.remaining(int(TRUE + MAX_SKEW) - 1, int(TRUE) + 600, 0.0) > 0


def test_small_differences_do_not_move_our_stamp() -> None:
    own = clocks(0.0, 30.0, 40.0, 50.0)[0]
    assert own.stamp(0.0) == int(TRUE)


def test_a_minority_of_liars_does_not_move_our_stamp() -> None:
    own = clocks(0.0, 0.0, 0.0, 9e8, 9e8)[0]
    assert own.stamp(0.0) == int(TRUE)


def test_of_three_clocks_only_the_one_that_is_wrong_is_told_so() -> None:
    wrong, *right = clocks(3600.0, 0.0, 0.0)
    assert wrong.is_wrong(0.0)
    assert wrong.skew(0.0) == 3600.0
    assert [clock.is_wrong(0.0) for clock in right] == [False, False]


def test_between_two_that_differ_nobody_is_told_to_be_wrong() -> None:
    assert [clock.is_wrong(0.0) for clock in clocks(3600.0, 0.0)] == [False, False]
    assert [clock.skew(0.0) for clock in clocks(3600.0, 0.0)] == [3600.0, -3600.0]


def test_who_stands_between_wrong_clocks_is_right() -> None:
    assert [clock.is_wrong(0.0) for clock in clocks(-3600.0, 0.0, 3600.0)] == [True, False, True]


def test_a_record_stamped_by_a_wrong_clock_is_good_by_that_clock() -> None:
    reader = clocks(0.0, *[0.0] * 5, 3600.0)[0]
    issued = int(TRUE) + 3600
    assert reader.remaining(issued, issued + 600, 0.0) == 0.0
    assert reader.remaining(issued, issued + 600, 0.0, "6") == 600
    assert reader.remaining(issued, issued + 600, 0.0, "1") == 0.0
    assert reader.remaining(issued, issued + 600, 700.0, "6") <= 0


def test_stamps_are_corrected_once_enough_others_are_heard_and_not_again_at_once() -> None:
    clock = NetworkClock(lambda: TRUE + 3600)
    assert not clock.corrected(0.0)
    clock.observe("a", TRUE, 0.0)
    assert not clock.corrected(0.0)
    clock.observe("b", TRUE, 0.0)
    assert clock.corrected(0.0)
    assert not clock.corrected(1.0)
    for witness in "cde":
        clock.observe(witness, TRUE + 3600, 1.0)
    assert not clock.corrected(2.0), "others could make us sign everything anew with each answer"
    assert clock.corrected(CORRECTION_PAUSE)


def test_a_wall_clock_that_jumps_is_noticed_against_the_others() -> None:
    wall = [TRUE]
    clock = NetworkClock(lambda: wall[0])
    for witness in "abc":
        clock.observe(witness, TRUE, 0.0)
    wall[0] += 3600 + 10
    assert clock.skew(10.0) == pytest.approx(3600)
    assert clock.stamp(10.0) == int(TRUE + 10)


def test_a_bounded_number_of_witnesses_is_remembered() -> None:
    clock = NetworkClock(lambda: TRUE)
    for witness in range(10_000):
        clock.observe(str(witness), TRUE, 0.0)
    assert len(clock._offsets) == MAX_WITNESSES
