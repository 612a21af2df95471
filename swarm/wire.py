"""CBOR frames <-> typed messages, bounded and strict.

Every message is deterministic CBOR (RFC 8949, 4.2), decoded with a small depth and without indefinite
lengths, duplicate keys or trailing bytes, then turned into a typed struct whose lengths, counts and numbers
are bounded before anything is allocated for them or verified.  Maps may gain keys in a newer minor version;
unknown keys are ignored, meanings never change.

Signed bodies travel as bytes and are verified as they came: re-encoding is how signature checks go wrong.
"""

from __future__ import annotations

import io
from typing import Annotated, Any, Final, NoReturn, TypeVar

import cbor2
import msgspec
from msgspec import Meta, Struct

from swarm.errors import LocalProtocolError, RemoteProtocolError

PROTOCOL_VERSION: Final = 1

MAX_FRAME_BYTES: Final = 64 * 1024
"""One control frame; a peer that needs more splits its messages over frames."""

MAX_DEPTH: Final = 8
MAX_PIECES: Final = 1 << 18
"""A tebibyte in 4 MiB pieces; keeps one bitmap at 32 KiB, half a frame."""

Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes20 = Annotated[bytes, Meta(min_length=20, max_length=20)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Bytes64 = Annotated[bytes, Meta(min_length=64, max_length=64)]
Length = Annotated[int, Meta(ge=0, le=1 << 50)]
PieceLength = Annotated[int, Meta(ge=256 * 1024, le=4 * 1024 * 1024)]
PieceIndex = Annotated[int, Meta(ge=0, lt=MAX_PIECES)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
Bitmap = Annotated[bytes, Meta(max_length=MAX_PIECES // 8)]
PieceList = Annotated[list[PieceIndex], Meta(max_length=4096)]
Text = Annotated[str, Meta(max_length=200)]

SEAL_TABLE: Final = -1
"""The piece number under which the table of all piece digests is fetched on the pieces channel."""


class Signed(Struct, frozen=True, array_like=True):
    """A body, who signed it, and the signature over ``b"swarm/1/<kind>\\0" || network id || body``.

    `identity.Identity.sign` makes one; `network.Network.verify` checks the signature and that `key` is a member's.
    """

    body: Annotated[bytes, Meta(max_length=512)]
    key: Bytes32
    signature: Bytes64


# --- bodies that are signed ------------------------------------------------------------------------------


class ProofBody(Struct, frozen=True, array_like=True):
    """Kind ``proof``: "I read piece `piece` from the origin and these are its bytes"."""

    task: Bytes32
    length: Length
    piece_length: PieceLength
    piece: PieceIndex
    blake3: Bytes32
    issued: int


class SealBody(Struct, frozen=True, array_like=True):
    """Kind ``seal``: "I hold it all and saw the content digest match"; `root` is BLAKE3 of all piece digests, concatenated."""

    task: Bytes32
    length: Length
    piece_length: PieceLength
    content_digest: Annotated[str, Meta(max_length=140)]
    root: Bytes32
    issued: int


class ClaimBody(Struct, frozen=True, array_like=True):
    """Kind ``claim``: "I am reading `piece` from the origin and expect to have it within `lease` seconds".

    `piece` -1 claims the content as a whole (an origin without ranges or without a length).
    """

    task: Bytes32
    length: Length
    piece_length: PieceLength
    piece: Annotated[int, Meta(ge=-1, lt=MAX_PIECES)]
    lease: Annotated[float, Meta(gt=0, le=120)]
    seq: Annotated[int, Meta(ge=0, lt=1 << 62)]


# --- control messages --------------------------------------------------------------------------------------


class Hello(Struct, frozen=True, tag_field="t", tag="hello"):
    """First message of each side.

    `boot` tells a restarted peer from a second connection of the same one; `ticket` keys the pieces channel;
    `control`/`pieces` are the ports the sender listens on (0: it does not).
    """

    version: Annotated[int, Meta(ge=1, le=1000)]
    boot: Bytes16
    time: Seconds
    control: Port
    pieces: Port
    ticket: Bytes32
    encrypt: bool = False
    addresses: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=8)] = []
    agent: Text = ""


class Join(Struct, frozen=True, tag_field="t", tag="join", omit_defaults=True):
    """I take part in this task and hold these pieces.

    `reply` asks the other side for its own `Join` (or `Leave`); `reads` is false for a member that may not read the origin;
    `starving` that it has hardly any neighbours, and asks to be taken by one that has enough.
    """

    task: Bytes32
    length: Length
    piece_length: PieceLength
    held: Bitmap = b""
    complete: bool = False
    seal: Signed | None = None
    reply: bool = False
    private: bool = False
    reads: bool = True
    starving: bool = False


class Ask(Struct, frozen=True, tag_field="t", tag="ask"):
    """Do you take part in this task?  Sent while its length is still unknown; answered with `Join` or `Leave`."""

    task: Bytes32


class Have(Struct, frozen=True, tag_field="t", tag="have"):
    task: Bytes32
    pieces: PieceList


class Lost(Struct, frozen=True, tag_field="t", tag="lost"):
    task: Bytes32
    pieces: PieceList


class SealOffer(Struct, frozen=True, tag_field="t", tag="seal"):
    """I have become complete; this is my seal."""

    task: Bytes32
    seal: Signed


class Claims(Struct, frozen=True, tag_field="t", tag="claims", omit_defaults=True):
    """Signed claims, the sender's own or relayed; `reached`: first 4 bytes of the ids the owner sent them to itself."""

    task: Bytes32
    claims: Annotated[list[Signed], Meta(max_length=32)]
    reached: Annotated[bytes, Meta(max_length=4 * 64)] = b""


class Unclaim(Struct, frozen=True, tag_field="t", tag="unclaim"):
    """I gave these up.  Only ever about the sender's own claims, so the connection authenticates it."""

    task: Bytes32
    pieces: Annotated[list[Annotated[int, Meta(ge=-1, lt=MAX_PIECES)]], Meta(max_length=4096)]


class Leave(Struct, frozen=True, tag_field="t", tag="leave"):
    task: Bytes32


class Peers(Struct, frozen=True, tag_field="t", tag="peers"):
    """Peer exchange: signed provider records of members of this task."""

    task: Bytes32
    records: Annotated[list[Annotated[bytes, Meta(max_length=400)]], Meta(max_length=32)]


class Ping(Struct, frozen=True, tag_field="t", tag="ping"):
    nonce: Annotated[int, Meta(ge=0, lt=1 << 62)]


class Pong(Struct, frozen=True, tag_field="t", tag="pong"):
    nonce: Annotated[int, Meta(ge=0, lt=1 << 62)]


Message = Hello | Join | Ask | Have | Lost | SealOffer | Claims | Unclaim | Leave | Peers | Ping | Pong
TaskMessage = Join | Ask | Have | Lost | SealOffer | Claims | Unclaim | Leave | Peers

# --- pieces channel ------------------------------------------------------------------------------------------
# Every frame is a big-endian u32 length and that many bytes of CBOR; an ok reply is followed by `length` raw bytes.

MAX_CHANNEL_FRAME_BYTES: Final = 8 * 1024


class ChannelOpen(Struct, frozen=True, array_like=True):
    """First frame, from the side that dialled, after it read the server's 32-byte nonce.

    `mac` = keyed BLAKE2b-256 over the nonce with the ticket key the *server* gave in its `Hello`.
    """

    node: Bytes20
    boot: Bytes16
    mac: Bytes32


class Request(Struct, frozen=True, array_like=True):
    """Ask for bytes [offset, offset + length) of a piece; piece -1 is the seal table.

    A `spare` request waits elsewhere too: it is served only where nothing else waits, so that it never takes the place of
    a piece nobody sends yet.
    """

    id: Annotated[int, Meta(ge=0, lt=1 << 32)]
    task: Bytes32
    piece: Annotated[int, Meta(ge=-1, lt=MAX_PIECES)]
    offset: Annotated[int, Meta(ge=0, le=4 * 1024 * 1024)]
    length: Annotated[int, Meta(ge=0, le=MAX_PIECES * 32)]
    spare: bool = False


class Cancel(Struct, frozen=True, array_like=True):
    """Forget this request if it has not started."""

    id: Annotated[int, Meta(ge=0, lt=1 << 32)]


OK: Final = 0
NOT_HELD: Final = 1
BUSY: Final = 2
REFUSED: Final = 3
CANCELLED: Final = 4


class Reply(Struct, frozen=True, array_like=True):
    """Header of an answer; its arrival tells the asker that the transfer starts.

    `proof` vouches for the whole piece (absent where the sender's seal does); `certificate` is the signer's,
    DER, sent the first time this channel carries a proof of that signer.
    """

    id: Annotated[int, Meta(ge=0, lt=1 << 32)]
    status: Annotated[int, Meta(ge=0, le=4)]
    length: Annotated[int, Meta(ge=0, le=MAX_PIECES * 32)] = 0
    proof: Signed | None = None
    certificate: Annotated[bytes, Meta(max_length=4096)] = b""


ChannelFrame = Request | Cancel

# --- encoding --------------------------------------------------------------------------------------------------

T = TypeVar("T")


def encode(value: object) -> bytes:
    """Deterministic CBOR of a struct, or of a list of structs."""
    return cbor2.dumps(msgspec.to_builtins(value, builtin_types=(bytes,)), canonical=True)


def decode(data_untrusted: bytes | memoryview, kind: type[T], *, max_bytes: int = MAX_FRAME_BYTES) -> T:
    """Turn bytes from the network into a `kind`.

    Raises:
        RemoteProtocolError: Too long, malformed, too deep, or out of bounds.
    """
    return _typed(_bounded(data_untrusted, max_bytes), kind)


def decode_into(data_untrusted: bytes | memoryview, kind: type[T], *, max_bytes: int = MAX_FRAME_BYTES) -> T:
    """As `decode`, for what is no struct: `kind` is one with a single field, `array_like`, and the value goes in there.

    msgspec keeps what it knows of a struct; a bare union or list it works out anew each time, in five times the time.
    """
    return _typed([_bounded(data_untrusted, max_bytes)], kind)


def _bounded(data_untrusted: bytes | memoryview, max_bytes: int) -> Any:
    if len(data_untrusted) > max_bytes:
        raise RemoteProtocolError(f"frame of {len(data_untrusted)} bytes, at most {max_bytes} allowed")
    return decode_untyped(data_untrusted)


def _typed(value: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"not a valid {kind.__name__.removeprefix('_')}: {error}") from error


def _refuse_tag(*_: object) -> NoReturn:
    raise cbor2.CBORDecodeError("tags are not allowed")


_NO_TAGS: Final = dict.fromkeys(
    (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799), _refuse_tag
)
"""Every tag cbor2 acts on: no message has one, and among them are back references and regular expressions, compiled."""


def decode_untyped(data_untrusted: bytes | memoryview) -> Any:
    """Strict CBOR to builtin values; the caller bounds the length.

    Raises:
        RemoteProtocolError: Malformed, too deep, indefinite, tagged, duplicate keys, or trailing bytes.
    """
    stream = io.BytesIO(data_untrusted)
    try:
        value = cbor2.load(
            stream, max_depth=MAX_DEPTH, allow_indefinite=False, allow_duplicate_keys=False, semantic_decoders=_NO_TAGS
        )
        if stream.read(1):
            raise RemoteProtocolError("trailing bytes after CBOR")
        return value
    except (cbor2.CBORError, ValueError, RecursionError, TypeError, OverflowError) as error:
        raise RemoteProtocolError(f"malformed CBOR: {error}") from error


def encode_frame(messages: list[Message]) -> bytes:
    """One control frame: a CBOR array of messages.

    Raises:
        LocalProtocolError: The frame would exceed `MAX_FRAME_BYTES`.
    """
    frame = encode(messages)
    if len(frame) > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"control frame of {len(frame)} bytes")
    return frame


def join_frame(encoded: list[bytes]) -> bytes:
    """One control frame of messages that `encode` has already encoded; at most 1,024 of them."""
    count = len(encoded)
    header = (
        bytes((0x80 | count,)) if count < 24 else bytes((0x98, count)) if count < 256 else b"\x99" + count.to_bytes(2, "big")
    )
    return header + b"".join(encoded)


class _Frame(Struct, frozen=True, array_like=True):
    """One control frame."""

    messages: Annotated[list[Message], Meta(max_length=1024)]


def decode_frame(data_untrusted: bytes) -> list[Message]:
    """The messages of one control frame.

    Raises:
        RemoteProtocolError: As `decode`.
    """
    return decode_into(data_untrusted, _Frame).messages


def decode_channel_frame(data_untrusted: bytes) -> ChannelFrame:
    """A request (5 or 6 fields) or a cancel (1 field).

    Raises:
        RemoteProtocolError: Neither.
    """
    if len(data_untrusted) > MAX_CHANNEL_FRAME_BYTES:
        raise RemoteProtocolError("pieces channel frame too long")
    value = decode_untyped(data_untrusted)
    if not isinstance(value, list):
        raise RemoteProtocolError("pieces channel frame is not an array")
    kind: type[Request] | type[Cancel] = Cancel if len(value) == 1 else Request
    return _typed(value, kind)
