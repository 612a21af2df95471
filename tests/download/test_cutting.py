"""Cutting the origin's bytes into pieces."""

from __future__ import annotations

from random import Random

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarm.download.cutting import PieceCutter
from swarm.errors import OriginError
from swarm.task import MIN_PIECE_BYTES, Geometry

LENGTH = 2 * MIN_PIECE_BYTES + 1000
GEOMETRY = Geometry.of(LENGTH)
CONTENT = Random(1).randbytes(LENGTH)


def cut(data: bytes, start: int, sizes: list[int]) -> dict[int, bytes]:
    cutter = PieceCutter(GEOMETRY, start)
    found: dict[int, bytes] = {}
    position = 0
    for size in [*sizes, len(data)]:
        for piece, view, digest in cutter.feed(data[position : position + size]):
            assert piece not in found
            found[piece] = bytes(view)
            assert digest == blake3(view).digest()
        position = min(len(data), position + size)
    assert cutter.position == start + len(data)
    return found


def expected(first: int) -> dict[int, bytes]:
    return {piece: CONTENT[GEOMETRY.offset(piece) : GEOMETRY.offset(piece) + GEOMETRY.size(piece)] for piece in range(first, 3)}


@given(st.lists(st.integers(0, 300_000), max_size=12))
def test_however_the_bytes_come_the_pieces_are_the_same(sizes: list[int]) -> None:
    assert cut(CONTENT, 0, sizes) == expected(0)


@given(st.integers(0, LENGTH), st.lists(st.integers(1, 300_000), max_size=6))
def test_from_the_middle_of_a_piece_on_only_whole_pieces_come_out(start: int, sizes: list[int]) -> None:
    assert cut(CONTENT[start:], start, sizes) == expected(-(-start // GEOMETRY.piece_length))


def test_an_origin_that_sends_too_much_is_refused_before_the_surplus_is_kept() -> None:
    cutter = PieceCutter(GEOMETRY, 0)
    with pytest.raises(OriginError, match="more bytes"):
        list(cutter.feed(CONTENT + b"x"))
    cutter = PieceCutter(GEOMETRY, 0)
    assert len(list(cutter.feed(CONTENT))) == 3
    with pytest.raises(OriginError, match="more bytes"):
        list(cutter.feed(b"x"))


def test_half_a_piece_never_comes_out() -> None:
    assert cut(CONTENT[:-1], 0, []).keys() == {0, 1}


def test_empty_content_has_nothing_to_cut() -> None:
    cutter = PieceCutter(Geometry.of(0), 0)
    assert list(cutter.feed(b"")) == []
    with pytest.raises(OriginError):
        list(cutter.feed(b"x"))
