from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import RemoteProtocolError
from swarm.peer.limits import (
    BURST_SECONDS,
    MAX_TASK_BUCKETS,
    MIN_BURST_BYTES,
    Failures,
    Flood,
    Progress,
    ProgressRule,
    RateLimit,
    TokenBucket,
)

MIB = 1 << 20


def test_a_rate_of_zero_does_not_limit():
    bucket = TokenBucket(0, 0.0)
    assert bucket.allowed(10 * MIB, 0.0) == 10 * MIB
    bucket.take(10 * MIB)
    assert bucket.allowed(10 * MIB, 0.0) == 10 * MIB
    assert bucket.delay(MIB, 0.0) == 0


@given(
    rate=st.integers(20_000, 1_000_000_000),
    steps=st.lists(st.tuples(st.floats(0, 0.2), st.integers(1, MIB)), min_size=1, max_size=60),
)
@settings(max_examples=100, deadline=None)
def test_no_more_than_the_rate_and_one_burst_ever_passes(rate, steps):
    now = moved = 0.0
    bucket = TokenBucket(rate, now)
    for pause, wanted in steps:
        now += pause
        allowed = bucket.allowed(wanted, now)
        assert 0 <= allowed <= wanted
        bucket.take(allowed)
        moved += allowed
        assert moved <= rate * now + max(rate * BURST_SECONDS, MIN_BURST_BYTES) + 1


@given(rate=st.integers(100_000, 1_000_000_000), late=st.floats(0, 0.02))
@settings(max_examples=50, deadline=None)
def test_a_sender_woken_late_still_gets_the_whole_rate(rate, late):
    limit = RateLimit(rate, 0, 0.0)
    now, moved = 0.0, 0
    while now < 5.0:
        allowed = limit.allowed(b"t", MIB, now)
        if allowed:
            limit.take(b"t", allowed, now)
            moved += allowed
        else:
            now += limit.delay(b"t", MIB, now) + late
    assert moved >= 0.98 * rate * 5.0 - MIN_BURST_BYTES


def test_one_task_cannot_take_more_than_its_own_rate_and_leaves_the_rest_to_others():
    limit = RateLimit(10 * MIB, MIB, 0.0)
    taken = limit.allowed(b"greedy", 10 * MIB, 0.0)
    limit.take(b"greedy", taken, 0.0)
    assert taken <= MIB * BURST_SECONDS + 1
    assert limit.allowed(b"greedy", MIB, 0.0) == 0
    assert limit.allowed(b"other", MIB, 0.0) > 0


def test_buckets_of_tasks_are_bounded():
    limit = RateLimit(0, MIB, 0.0)
    for number in range(MAX_TASK_BUCKETS * 2):
        limit.allowed(number.to_bytes(4, "big"), 1, 0.0)
    assert len(limit._tasks) == MAX_TASK_BUCKETS


RULE = ProgressRule(silence=10, floor=64 * 1024, window=20)


def test_a_transfer_without_a_byte_for_ten_seconds_has_failed():
    progress = Progress(RULE, 0.0)
    progress.moved(MIB, 3.0)
    assert not progress.failed(12.9)
    assert "no byte" in progress.failed(13.0)


def drip(rate: float, seconds: float, *, at_once: int = 0) -> float | None:
    """When a transfer that moves `rate` bytes each second (after `at_once` in the first) is given up."""
    progress = Progress(RULE, 0.0)
    progress.moved(at_once, 0.0)
    now = 0.0
    while now < seconds:
        now += 1.0
        progress.moved(int(rate), now)
        if progress.failed(now):
            return now
    return None


def test_a_peer_that_sends_one_byte_a_second_is_given_up_within_the_window():
    given_up = drip(1, 100)
    assert given_up is not None
    assert given_up <= RULE.window


def test_a_peer_that_stops_after_a_fast_start_is_found_out_too():
    given_up = drip(1000, 200, at_once=100 * MIB)
    assert given_up is not None
    assert given_up <= 2 * RULE.window


def test_a_transfer_at_the_floor_goes_on():
    assert drip(RULE.floor * 1.01, 1000) is None


def test_a_transfer_we_hold_up_ourselves_is_not_blamed():
    progress = Progress(RULE, 0.0)
    for second in range(0, 100, 5):
        progress.excuse(float(second))
        assert not progress.failed(second + 4.0)


def test_a_flood_is_refused_and_a_burst_is_not():
    flood = Flood("messages", 10, 100, 0.0)
    flood.count(100, 0.0)
    with pytest.raises(RemoteProtocolError, match="too many messages"):
        flood.count(1, 0.0)
    flood.count(10, 1.0)


def test_a_failed_address_is_left_alone_for_a_time_that_doubles_up_to_five_minutes():
    failures: Failures[str] = Failures(first=30, longest=300)
    now = 0.0
    waits = []
    for _ in range(6):
        until = failures.failed("x", now)
        waits.append(until - now)
        assert failures.blocked("x", until - 0.1)
        assert not failures.blocked("x", until)
        now = until
    assert waits == [30, 60, 120, 240, 300, 300]
    failures.succeeded("x")
    assert not failures.blocked("x", now)
    assert failures.failed("x", now) == now + 30


def test_a_failure_long_ago_counts_no_more():
    failures: Failures[str] = Failures(first=30, longest=300)
    failures.failed("x", 0.0)
    assert failures.failed("x", 1000.0) == 1030.0


def test_remembered_failures_are_bounded():
    failures: Failures[int] = Failures(limit=10)
    for number in range(100):
        failures.failed(number, 0.0)
    assert len(failures) == 10
    assert failures.blocked(99, 1.0)
    assert not failures.blocked(0, 1.0)


def test_waiting_for_the_last_byte_is_not_lost_in_rounding():
    bucket = TokenBucket(1 << 20, 0.0)
    now = 1e9 / 3
    bucket.take(int(bucket.burst))
    bucket.allowed(1, now)
    bucket.take(bucket.allowed(1 << 30, now))
    for _ in range(10):
        if bucket.allowed(1, now):
            break
        later = now + bucket.delay(1, now)
        assert later > now
        now = later
    assert bucket.allowed(1, now) == 1
