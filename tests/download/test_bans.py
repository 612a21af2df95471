"""Keeping away from liars for a growing time, with bounded memory."""

from __future__ import annotations

from swarm.download.bans import BAN_SECONDS, MAX_BAN_SECONDS, MAX_BANS, Bans

LIAR, HONEST = b"l" * 20, b"h" * 20


def test_a_ban_ends_and_the_next_is_twice_as_long_up_to_an_hour() -> None:
    bans, now, lasted = Bans(), 0.0, []
    for _ in range(9):
        bans.ban(LIAR, now)
        assert not bans.is_banned(HONEST, now)
        seconds = next(s for s in range(1, 4000) if not bans.is_banned(LIAR, now + s))
        assert bans.is_banned(LIAR, now + seconds - 0.5)
        lasted.append(seconds)
        now += seconds
    assert lasted[:3] == [BAN_SECONDS, 2 * BAN_SECONDS, 4 * BAN_SECONDS]
    assert lasted[-1] == MAX_BAN_SECONDS


def test_many_liars_do_not_fill_the_memory_and_the_last_ones_stay_banned() -> None:
    bans = Bans()
    for number in range(MAX_BANS + 100):
        bans.ban(number.to_bytes(20, "big"), 0.0)
    assert len(bans) == MAX_BANS
    assert bans.is_banned((MAX_BANS + 99).to_bytes(20, "big"), 1.0)
