"""Piece sets and what peers may send as one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import pieces
from swarm.errors import RemoteProtocolError


@given(st.lists(st.booleans(), max_size=70))
def test_a_piece_set_survives_the_wire(held: list[bool]) -> None:
    original = pieces.of(len(held), [number for number, has in enumerate(held) if has])
    assert pieces.from_wire(pieces.to_wire(original), len(held)) == original
    assert list(pieces.indices(original)) == [number for number, has in enumerate(held) if has]


@pytest.mark.parametrize(("sent", "count"), [(b"", 1), (b"\xff", 9), (b"\xff\x00", 8), (b"\x00", 0)])
def test_a_bitmap_too_short_or_too_long_is_refused(sent: bytes, count: int) -> None:
    with pytest.raises(RemoteProtocolError, match="bitmap"):
        pieces.from_wire(sent, count)


@pytest.mark.parametrize(("sent", "count"), [(b"\xff\x81", 15), (b"\x10", 3), (b"\x01", 7)])
def test_a_bitmap_with_spare_bits_set_is_refused(sent: bytes, count: int) -> None:
    with pytest.raises(RemoteProtocolError, match="spare"):
        pieces.from_wire(sent, count)


@given(st.binary(max_size=40), st.integers(0, 330))
def test_any_bytes_give_a_set_of_the_right_size_or_a_protocol_error(sent: bytes, count: int) -> None:
    try:
        held = pieces.from_wire(sent, count)
    except RemoteProtocolError:
        return
    assert len(held) == count


def test_a_set_read_from_a_buffer_outlives_it() -> None:
    buffer = bytearray(b"\x80")
    held = pieces.from_wire(bytes(buffer), 8)
    buffer[0] = 0
    held[7] = True
    assert list(pieces.indices(held)) == [0, 7]
