"""Pieces asked of peers: which request is whose, and what becomes of the answers."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from swarm import proofs, wire
from swarm.download.active import Active, Fail, Parts, Traffic
from swarm.download.blame import Blame
from swarm.edges import NodeId, PeerLink, Started
from swarm.errors import IntegrityError, NotAMember, RemoteProtocolError, StoreError

TABLE_PATIENCE = 15.0
"""Seconds for a seal table, at most 8 MiB, to come."""


@dataclass(slots=True)
class Pending:
    """A request to a peer.

    Attributes:
        expected: BLAKE3 that was vouched for; `None` if nobody we believe vouches.
        answered: Set at the end of a request for a seal table.
    """

    active: Active
    piece: int
    expected: bytes | None = None
    proof: wire.Signed | None = None
    started: float = 0.0
    cancelled: bool = False
    answered: trio.Event | None = None
    table: bytes | None = None


class PeerRequests:
    """Every request to every peer, by link and number."""

    def __init__(self, parts: Parts, blame: Blame, fail: Fail) -> None:
        self._parts = parts
        self._blame = blame
        self._fail = fail
        self._pending: dict[tuple[NodeId, int], Pending] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._pending)

    def _enter(self, node_id: NodeId, pending: Pending) -> int:
        self._last_id = (self._last_id + 1) & 0xFFFFFFFF
        self._pending[node_id, self._last_id] = pending
        return self._last_id

    def ask(self, active: Active, node_id: NodeId, piece: int, spare: bool) -> None:
        """Ask a neighbour for a piece."""
        link = self._parts.link(node_id)
        if link is None:
            active.exchange.peer_left(node_id, trio.current_time())
            return
        request_id = self._enter(node_id, Pending(active, piece))
        active.request_ids[node_id, piece] = request_id
        size = active.geometry.size(piece)
        link.request(request_id, active.task.id, piece, 0, size, private=active.stored.private, spare=spare)

    def cancel(self, active: Active, node_id: NodeId, piece: int) -> None:
        request_id = active.request_ids.pop((node_id, piece), None)
        link = self._parts.link(node_id)
        if request_id is None or link is None:
            return
        pending = self._pending.get((node_id, request_id))
        if pending is not None:
            pending.cancelled = True
            link.cancel(request_id)

    def cancel_all(self, active: Active) -> None:
        for node_id, piece in list(active.request_ids):
            self.cancel(active, node_id, piece)

    async def table(self, active: Active, node_id: NodeId, root: bytes) -> list[bytes] | None:
        """A sealer's table of piece digests, checked against the sealed root; `None` if it does not come."""
        link = self._parts.link(node_id)
        if link is None:
            return None
        pending = Pending(active, wire.SEAL_TABLE, expected=root, answered=trio.Event())
        request_id = self._enter(node_id, pending)
        size = active.geometry.piece_count * proofs.DIGEST_BYTES
        try:
            link.request(request_id, active.task.id, wire.SEAL_TABLE, 0, size, private=active.stored.private)
            with trio.move_on_after(TABLE_PATIENCE):
                if pending.answered is not None:
                    await pending.answered.wait()
        finally:
            if self._pending.pop((node_id, request_id), None) is not None:
                link.cancel(request_id)
        if pending.table is None:
            return None
        return proofs.split_table(pending.table, root, active.geometry.piece_count)

    def link_down(self, node_id: NodeId) -> None:
        """Nothing more comes from this node on what was asked."""
        for key in [key for key in self._pending if key[0] == node_id]:
            pending = self._pending.pop(key)
            if pending.answered is not None:
                pending.answered.set()
            pending.active.request_ids.pop((node_id, pending.piece), None)

    # --- edges.PeerEvents -----------------------------------------------------------------------------------------

    def piece_started(self, link: PeerLink, started: Started) -> bool:
        pending = self._pending.get((link.node_id, started.request_id))
        if pending is None:
            return False
        active = pending.active
        if pending.piece == wire.SEAL_TABLE:
            return started.length == active.geometry.piece_count * proofs.DIGEST_BYTES
        if started.length != active.geometry.size(pending.piece) or started.proof is None:
            self._blame.sender(active, link, "a piece without a proof, or of the wrong length")
            return False
        try:
            pending.expected = self._vouched(active, pending.piece, started.proof, started.certificate)
        except NotAMember:
            # The signer lied or was revoked, and the sender may not know yet: its bytes are passed over, without blame.
            return True
        except (IntegrityError, RemoteProtocolError) as error:
            self._blame.sender(active, link, str(error))
            return False
        pending.proof = started.proof
        now = pending.started = trio.current_time()
        if not pending.cancelled:
            active.exchange.piece_started(link.node_id, pending.piece, now)
            active.touch_lightly()
        return True

    def _vouched(self, active: Active, piece: int, proof: wire.Signed, certificate_untrusted: bytes) -> bytes:
        membership = self._parts.membership
        if certificate_untrusted:
            membership.learn(certificate_untrusted)
        if proof.key in active.banned:
            raise NotAMember("vouched for by a member that lied")
        return proofs.check_proof(membership, proof, active.task.id, active.geometry, piece)

    def piece_received(self, link: PeerLink, request_id: int, digest: bytes, data: memoryview) -> None:
        pending = self._pending.pop((link.node_id, request_id), None)
        if pending is None:
            return
        active = pending.active
        if pending.answered is not None:
            if digest == pending.expected:
                pending.table = bytes(data)
            else:
                self._blame.sender(active, link, "a table that does not match its seal")
            pending.answered.set()
            return
        active.traffic.setdefault(link.node_id, Traffic()).received += len(data)
        active.request_ids.pop((link.node_id, pending.piece), None)
        if pending.expected is None:
            active.exchange.piece_failed(link.node_id, pending.piece, trio.current_time(), status=wire.NOT_HELD)
        elif digest != pending.expected:
            self._blame.sender(active, link, "bytes that do not match the proof sent with them")
        else:
            self._keep(link, pending, digest, data)
        if active.exchange.complete:
            active.touch()  # nobody waits longer for the last piece
        else:
            active.touch_lightly()

    def _keep(self, link: PeerLink, pending: Pending, digest: bytes, data: memoryview) -> None:
        """Verified bytes: write them, unless they come too late."""
        active, piece, now = pending.active, pending.piece, trio.current_time()
        totals = self._parts.totals
        if active.closed or active.exchange.held[piece]:
            totals.pieces_wasted += 1
            active.exchange.piece_failed(link.node_id, piece, now, status=wire.CANCELLED, gone=True)
            return
        try:
            active.stored.write_piece(piece, data, digest, pending.proof)
        except StoreError as error:
            self._fail(active, error)
            return
        if pending.proof is not None:
            active.signers[piece] = pending.proof.key
        active.from_peers += len(data)
        active.last_byte = now
        totals.bytes_from_peers += len(data)
        totals.pieces_from_peers += 1
        active.exchange.piece_verified(piece, link.node_id, now, took=now - pending.started)
        active.wake(piece)

    def piece_failed(self, link: PeerLink, request_id: int, status: int) -> None:
        pending = self._pending.pop((link.node_id, request_id), None)
        if pending is None:
            return
        active = pending.active
        if pending.answered is not None:
            pending.answered.set()
            return
        active.request_ids.pop((link.node_id, pending.piece), None)
        active.exchange.piece_failed(link.node_id, pending.piece, trio.current_time(), status=status, gone=pending.cancelled)
        active.touch_lightly()
