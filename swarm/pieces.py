"""Which pieces are held: `bitarray` with a checked wire form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bitarray import bitarray
from bitarray.util import ones, zeros

from swarm.errors import RemoteProtocolError

PieceSet = bitarray


def none(count: int) -> PieceSet:
    return zeros(count)


def full(count: int) -> PieceSet:
    return ones(count)


def to_wire(held: PieceSet) -> bytes:
    """Big-endian bits, piece 0 first, spare bits zero."""
    return held.tobytes()


def from_wire(data_untrusted: bytes, count: int) -> PieceSet:
    """Read a peer's bitmap.

    Raises:
        RemoteProtocolError: Too short, too long, or spare bits set (SECURITY: T3).
    """
    if len(data_untrusted) != (count + 7) // 8:
        raise RemoteProtocolError(f"bitmap of {len(data_untrusted)} bytes for {count} pieces")
    held = bitarray(buffer=data_untrusted) if data_untrusted else bitarray()
    held = bitarray(held)
    if held[count:].any():
        raise RemoteProtocolError("spare bits set in a bitmap")
    del held[count:]
    return held


def indices(held: PieceSet) -> Iterator[int]:
    """Held piece numbers, ascending."""
    return held.search(1)


def of(count: int, pieces: Iterable[int]) -> PieceSet:
    held = zeros(count)
    for piece in pieces:
        held[piece] = True
    return held
