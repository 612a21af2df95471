"""When to ask again, as arithmetic: no clock, no origin."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from swarm.origin.retry import OPEN_AFTER, AttemptFailed, Cause, Health, Retries

FAILURE = st.one_of(
    st.builds(AttemptFailed, st.just("x"), st.sampled_from(Cause)),
    st.builds(AttemptFailed, st.just("x"), st.just(Cause.STATUS), st.one_of(st.floats(0, 100), st.just(1e9))),
)


@given(st.lists(st.tuples(FAILURE, st.floats(0, 20)), max_size=30), st.integers(0, 10), st.floats(0, 60), st.integers())
def test_retries_are_few_and_all_begin_within_the_budget(
    failures: list[tuple[AttemptFailed, float]], most: int, seconds: float, seed: int
) -> None:
    retries = Retries(most, seconds, random.Random(seed), started=100.0)
    now, again = 100.0, 0
    for failure, took in failures:
        now += took
        delay = retries.after(failure, now)
        if delay is None:
            break
        assert delay >= (failure.retry_after or 0)
        now += delay
        again += 1
        assert now - 100.0 <= seconds + 1e-6
    assert again <= most


def test_delays_double_and_differ() -> None:
    retries = Retries(10, 1000, random.Random(1), started=0.0)
    delays = [retries.after(AttemptFailed("x", Cause.STATUS), 0.0) or 0.0 for _ in range(8)]
    ceilings = [0.5, 1, 2, 4, 8, 8, 8, 8]
    assert all(ceiling / 2 <= delay <= ceiling for delay, ceiling in zip(delays, ceilings, strict=True))
    assert len({delay / ceiling for delay, ceiling in zip(delays, ceilings, strict=True)}) == 8


def test_a_host_is_left_alone_for_growing_times_and_a_success_forgets_all() -> None:
    health = Health()
    for _ in range(OPEN_AFTER - 1):
        health.failed(0.0)
        assert not health.is_open(0.0)
    spans = []
    for _ in range(6):
        health.failed(0.0)
        spans.append(health.open_until)
    assert spans == [5, 10, 20, 40, 60, 60]
    assert health.is_open(59.9)
    assert not health.is_open(60.0)
    health.answered()
    assert not health.is_open(0.0)
    health.failed(0.0)
    assert not health.is_open(0.0)


def test_the_longest_wait_that_was_asked_for_counts() -> None:
    health = Health()
    health.asked_to_wait(10, now=0.0)
    health.asked_to_wait(5, now=1.0)
    assert health.not_before == 10
