"""DHT datagrams <-> typed messages.

A datagram is ``version || epoch || 16-byte MAC || CBOR``, at most `MAX_DATAGRAM_BYTES`; the MAC, keyed with the
group secret, covers the version byte and the CBOR.  The CBOR is an array ``[kind, transaction, ...]``; a newer minor
version may append elements, which an older one ignores.

Queries carry the sender's node id (a claim, until `Pong` proves it), the token of an earlier answer (a proof of the
sender's address) and padding: without a token an answer may have three times the bytes of its query and no more, so
a first query is as long as it must be for a useful answer.  Answers echo the transaction, and report the address they
saw, a fresh token, and the time.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from swarm import wire
from swarm.edges import Membership

VERSION: Final = 1
MAC_BYTES: Final = 16
HEADER_BYTES: Final = 2 + MAC_BYTES

MAX_DATAGRAM_BYTES: Final = 1200
"""What every IPv6 path carries without fragments (1,280 less headers and tunnels), as QUIC chose."""

PADDED_BYTES: Final = 400
"""A query without a token: three times this is a whole datagram."""

MAX_RECORD_BYTES: Final = 300
TRANSACTION_BYTES: Final = 8
TOKEN_BYTES: Final = 8
MAX_CONTACTS: Final = 16
MAX_RECORDS: Final = 16

Transaction = Annotated[bytes, Meta(min_length=TRANSACTION_BYTES, max_length=TRANSACTION_BYTES)]
Token = Annotated[bytes, Meta(max_length=TOKEN_BYTES)]
PackedAddress = Annotated[bytes, Meta(min_length=6, max_length=18)]
Record = Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]
Cursor = Annotated[int, Meta(ge=0, lt=4096)]
Padding = Annotated[bytes, Meta(max_length=MAX_DATAGRAM_BYTES)]
Time = Annotated[int, Meta(ge=0, lt=1 << 40)]
PackedContact = tuple[wire.Bytes20, PackedAddress]


class Ping(Struct, frozen=True, array_like=True, tag=1):
    """Prove who you are: sign `nonce`, `key` (ours) and the address this came from."""

    tx: Transaction
    sender: wire.Bytes20
    token: Token
    key: wire.Bytes32
    nonce: wire.Bytes16
    padding: Padding = b""


class FindNode(Struct, frozen=True, array_like=True, tag=2):
    """Which contacts of yours are nearest to `target`?"""

    tx: Transaction
    sender: wire.Bytes20
    token: Token
    target: wire.Bytes20
    padding: Padding = b""


class FindProviders(Struct, frozen=True, array_like=True, tag=3):
    """Who provides `target`, from record number `cursor` on; and which contacts are nearest to it?"""

    tx: Transaction
    sender: wire.Bytes20
    token: Token
    target: wire.Bytes20
    cursor: Cursor
    padding: Padding = b""


class Announce(Struct, frozen=True, array_like=True, tag=4):
    """Store this provider record; answer with the others of its key, from number `cursor` on."""

    tx: Transaction
    sender: wire.Bytes20
    token: Token
    record: Record
    cursor: Cursor
    padding: Padding = b""


class Withdraw(Struct, frozen=True, array_like=True, tag=5):
    """Forget what this signed withdrawal names, and whatever comes late with a lower seq."""

    tx: Transaction
    sender: wire.Bytes20
    token: Token
    record: Record
    padding: Padding = b""


class Pong(Struct, frozen=True, array_like=True, tag=17):
    """`proof` is a `ContactBody` signed under kind ``contact``."""

    tx: Transaction
    observed: PackedAddress
    token: Token
    time: Time
    proof: wire.Signed


class Contacts(Struct, frozen=True, array_like=True, tag=18):
    tx: Transaction
    observed: PackedAddress
    token: Token
    time: Time
    contacts: Annotated[list[PackedContact], Meta(max_length=MAX_CONTACTS)]


class Providers(Struct, frozen=True, array_like=True, tag=19):
    """`count`: how many members are known in all; `cursor`: where the next page begins, 0 if this was the last."""

    tx: Transaction
    observed: PackedAddress
    token: Token
    time: Time
    contacts: Annotated[list[PackedContact], Meta(max_length=MAX_CONTACTS)]
    count: Annotated[int, Meta(ge=0, lt=1 << 32)]
    cursor: Cursor
    records: Annotated[list[Record], Meta(max_length=MAX_RECORDS)]


STORED: Final = 0
BAD_TOKEN: Final = 1
"""The token was missing or too old; the answer carries a fresh one: ask again."""
OUTDATED: Final = 2
"""A higher seq, or a tombstone, is there already."""
FULL: Final = 3
INVALID: Final = 4


class Stored(Struct, frozen=True, array_like=True, tag=20):
    """Answer to `Announce` and `Withdraw`; the last three as in `Providers`, without the asker's own record."""

    tx: Transaction
    observed: PackedAddress
    token: Token
    time: Time
    status: Annotated[int, Meta(ge=0, le=255)]
    count: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    cursor: Cursor = 0
    records: Annotated[list[Record], Meta(max_length=MAX_RECORDS)] = []


Query = Ping | FindNode | FindProviders | Announce | Withdraw
Answer = Pong | Contacts | Providers | Stored
Message = Query | Answer


class _Datagram(Struct, frozen=True, array_like=True):
    """What follows the header of a datagram."""

    message: Message


class ContactBody(Struct, frozen=True, array_like=True):
    """What a contact signs to enter a routing table: it answers here and now, to this asker, as seen from this address."""

    nonce: wire.Bytes16
    asker: wire.Bytes32
    observed: PackedAddress


def seal(message: Message, membership: Membership) -> bytes:
    """A datagram under the current group secret."""
    body = bytes((VERSION,)) + wire.encode(message)
    epoch, mac = membership.datagram_mac(body)
    return bytes((VERSION, epoch)) + mac + body[1:]


def authentic(datagram_untrusted: bytes, membership: Membership) -> bool:
    """Whether the length, version and MAC are right; whatever is not gets no answer."""
    if not HEADER_BYTES < len(datagram_untrusted) <= MAX_DATAGRAM_BYTES or datagram_untrusted[0] != VERSION:
        return False
    mac = datagram_untrusted[2:HEADER_BYTES]
    return membership.check_datagram_mac(datagram_untrusted[1], mac, bytes((VERSION,)) + datagram_untrusted[HEADER_BYTES:])


def read(datagram_untrusted: bytes) -> Message:
    """The message in an `authentic` datagram, which a member may still have made up.

    Raises:
        RemoteProtocolError: Malformed or out of bounds.
    """
    return wire.decode_into(datagram_untrusted[HEADER_BYTES:], _Datagram, max_bytes=MAX_DATAGRAM_BYTES).message


def packed_query_bytes(query: Query) -> int:
    """Length of the datagram that carries `query`."""
    return HEADER_BYTES + len(wire.encode(query))
