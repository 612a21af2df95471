"""Whose fault it is, and the way back to the right content.

A sender is blamed only for bytes that do not match the proof or seal it sent itself.  Where the content digest does not
match, or members' statements differ, the origin says who lied; what liars vouched for is dropped and fetched anew.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio

from swarm.download.active import Active, Parts
from swarm.download.bans import Bans
from swarm.download.origin_reads import OriginReads
from swarm.edges import NodeId, PeerLink
from swarm.errors import DigestMismatch, IntegrityError
from swarm.task import Digest

log = structlog.get_logger(__name__)

MAX_DISPUTES = 16
"""Rounds of settling differences in one download: each bans a liar, unless the origin itself sends now this, now that."""

FetchTable = Callable[[Active, NodeId, bytes], Awaitable[list[bytes] | None]]
"""Fetches a sealer's table of piece digests that matches this root."""


class Blame:
    """Judges senders, signers and sealers."""

    def __init__(self, parts: Parts, bans: Bans, reads: OriginReads) -> None:
        self._parts = parts
        self._bans = bans
        self._reads = reads

    def sender(self, active: Active, link: PeerLink, reason: str) -> None:
        """This link's node sent what it cannot answer for."""
        self._parts.totals.pieces_bad += 1
        log.info("peer_blamed", task=active.task.short, peer=link.node_id.hex(), reason=reason)
        self._ban(link.node_id)
        active.exchange.peer_left(link.node_id, trio.current_time())
        active.touch()
        link.drop(reason)

    def _signer(self, active: Active, public_key: bytes) -> None:
        """This member vouched for wrong bytes."""
        active.banned.add(public_key)
        liar = active.members.id_of(public_key)
        self._ban(liar)
        link = self._parts.link(liar)
        if link is not None:
            link.drop("it vouched for wrong bytes")
        active.exchange.peer_left(liar, trio.current_time())

    def tellers(self, active: Active) -> None:
        """The content is not as long as these members said."""
        for node_id in active.told_by:
            self._ban(node_id)
            link = self._parts.link(node_id)
            if link is not None:
                link.drop("it told a wrong length")

    def _ban(self, node_id: NodeId) -> None:
        self._bans.ban(node_id, trio.current_time())
        self._parts.totals.bans += 1

    async def agreed(self, active: Active, digest: Digest, table_of: FetchTable) -> bool:
        """Whether nobody honest says the content is another one; the origin settles each difference.

        Without a known digest members are trusted with what they sign, so a statement that differs from ours is looked
        into: the first piece in which the sealer's table differs is read from the origin, and whoever is wrong is banned.
        `False`: pieces of ours were wrong, and were dropped.
        """
        for node_id, (sealer, body) in list(active.seals.items()):
            if sealer in active.banned:
                continue
            theirs = Digest.parse(body.content_digest)
            if theirs == digest or theirs.algorithm != digest.algorithm or active.source is None:
                continue
            table = await table_of(active, node_id, body.root)
            if table is None:
                continue
            ours = [active.stored.piece_digest(piece) for piece in range(active.geometry.piece_count)]
            different = [piece for piece, own in enumerate(ours) if own != table[piece]]
            if not different:
                self._signer(active, sealer)  # Its own table does not add up to its digest.
                continue
            truth = await self._reads.digest_of(active, different[0])
            if truth != table[different[0]]:
                self._signer(active, sealer)
            if truth != ours[different[0]]:
                signer = active.signers.get(different[0])
                wrong = [piece for piece in different if active.signers.get(piece) == signer]
                if signer is not None and signer != self._parts.membership.public_key:
                    self._signer(active, signer)
                self._dispute(active, wrong)
                return False
        return True

    def _dispute(self, active: Active, wrong: list[int]) -> None:
        active.disputes += 1
        if active.disputes > MAX_DISPUTES:
            raise IntegrityError("members and the origin contradict one another without end; name the content with --digest")
        self._drop(active, wrong)

    async def find_liars(self, active: Active, digest: Digest) -> None:
        """The content digest does not match: read one piece per signer from the origin, drop what liars vouched for.

        Raises:
            DigestMismatch: Nobody else vouched for anything: the origin itself has other content.
        """
        self._parts.totals.lies += 1
        by_signer = self._vouched_by_others(active)
        if not by_signer or active.source is None:
            active.stored.drop_pieces(range(active.geometry.piece_count))
            culprit = "the origin has" if not by_signer else "members of the swarm sent"
            hint = "check --digest and the URL" if not by_signer else "give its URL, to read it from there"
            raise DigestMismatch(
                f"the content is {digest}, not {active.task.digest}: {culprit} other content than was asked for; {hint}"
            )
        wrong: list[int] = []
        if not active.strict:
            for signer, vouched in by_signer.items():
                sample = self._parts.rng.choice(vouched)
                if await self._reads.digest_of(active, sample) != active.stored.piece_digest(sample):
                    self._signer(active, signer)
                    wrong += vouched
        if not wrong:
            # The samples were good: somebody lied about single pieces.  From here on only the origin is believed.
            active.strict = True
            wrong = [piece for vouched in by_signer.values() for piece in vouched]
        log.warning("content_digest_mismatch", task=active.task.short, dropped=len(wrong))
        self._drop(active, wrong)
        if active.strict:
            active.exchange.dispute(wrong)

    def _vouched_by_others(self, active: Active) -> dict[bytes, list[int]]:
        """Pieces by who vouched for them, without our own."""
        by_signer: dict[bytes, list[int]] = {}
        for piece in range(active.geometry.piece_count):
            proof = active.stored.proof(piece)
            signer = active.signers.get(piece) or (proof.key if proof is not None else b"")
            if signer != self._parts.membership.public_key:
                by_signer.setdefault(signer, []).append(piece)
        return by_signer

    @staticmethod
    def _drop(active: Active, wrong: list[int]) -> None:
        """Forget pieces that turned out wrong, and want them again."""
        active.stored.drop_pieces(wrong)
        for piece in wrong:
            active.signers.pop(piece, None)
        active.exchange.piece_lost(wrong, trio.current_time())
