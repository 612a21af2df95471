"""Who vouches for which bytes: piece proofs and seals.

A *proof* is one member's signed statement "piece i of this task, cut this way, has this BLAKE3".  It is made by whoever
read the piece from the origin and travels with the piece, hop by hop; a holder of the whole verified content may make
a new one where the first signer's certificate is no longer valid.  A *seal* is the same for a complete task: its
content digest, and BLAKE3 over the concatenated piece digests (the *table*).

A proof says who is to blame, not what is true: where the content digest is known, that digest alone decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from blake3 import blake3

from swarm import wire
from swarm.edges import Membership
from swarm.errors import ConfigError, IntegrityError, RemoteProtocolError
from swarm.task import Digest, Geometry

DIGEST_BYTES: Final = 32


def prove(membership: Membership, task_id: bytes, geometry: Geometry, piece: int, digest: bytes, issued: int) -> wire.Signed:
    """Sign "these are the bytes of `piece`"; `issued` is wall time in seconds."""
    return membership.sign("proof", wire.ProofBody(task_id, geometry.length, geometry.piece_length, piece, digest, issued))


def check_proof(membership: Membership, proof: wire.Signed, task_id: bytes, geometry: Geometry, piece: int) -> bytes:
    """The BLAKE3 a known member signed for exactly this piece of this task in this geometry.

    Raises:
        IntegrityError: The signature is bad, or the statement is about something else.
        NotAMember: The signer is not known as a valid member.
        RemoteProtocolError: The body is malformed.
    """
    body = membership.verify("proof", proof, wire.ProofBody)
    if (body.task, body.length, body.piece_length, body.piece) != (task_id, geometry.length, geometry.piece_length, piece):
        raise IntegrityError("a proof for another piece was offered")
    return body.blake3


def seal(membership: Membership, task_id: bytes, geometry: Geometry, content: Digest, table: bytes, issued: int) -> wire.Signed:
    """Sign "I hold it all, and its content digest is `content`"."""
    body = wire.SealBody(task_id, geometry.length, geometry.piece_length, str(content), table_root(table), issued)
    return membership.sign("seal", body)


def check_seal(membership: Membership, signed: wire.Signed, task_id: bytes, geometry: Geometry) -> wire.SealBody:
    """What a member sealed for this task and geometry; its `content_digest` is well formed.

    Raises:
        IntegrityError, NotAMember, RemoteProtocolError: As `check_proof`.
    """
    body = membership.verify("seal", signed, wire.SealBody)
    if (body.task, body.length, body.piece_length) != (task_id, geometry.length, geometry.piece_length):
        raise IntegrityError("a seal for another task was offered")
    try:
        Digest.parse(body.content_digest)
    except ConfigError as error:
        raise RemoteProtocolError("a seal over something that is not a digest") from error
    return body


def table_of(digests: Iterable[bytes | None]) -> bytes:
    """The table of a complete task: all piece digests, concatenated."""
    return b"".join(digest for digest in digests if digest is not None)


def table_root(table: bytes) -> bytes:
    return blake3(table).digest()


def split_table(table_untrusted: bytes, root: bytes, piece_count: int) -> list[bytes]:
    """The piece digests of a fetched table.

    Raises:
        RemoteProtocolError: Its length is wrong or it does not match the sealed root.
    """
    if len(table_untrusted) != piece_count * DIGEST_BYTES or table_root(table_untrusted) != root:
        raise RemoteProtocolError("a table does not match its seal")
    return [table_untrusted[i : i + DIGEST_BYTES] for i in range(0, len(table_untrusted), DIGEST_BYTES)]
