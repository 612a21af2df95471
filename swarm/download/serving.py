"""What the upload side asks: the bytes of a piece, who vouches for them, and whom to serve first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from swarm import proofs, wire
from swarm.download.active import Active, Parts, Traffic
from swarm.edges import NodeId, Served, StoredTask

Open = Callable[[bytes], Active | None]
"""The task's `Active`, opened from the store if somebody may have it."""


class Serving:
    """`edges.UploadSource`."""

    def __init__(self, parts: Parts, active: Mapping[bytes, Active], open_task: Open) -> None:
        self._parts = parts
        self._active = active
        self._open = open_task

    def serve(self, node_id: NodeId, request: wire.Request, *, encrypted: bool) -> Served | int:
        active = self._open(request.task)
        if active is None:
            return wire.NOT_HELD
        active.last_asked = trio.current_time()
        stored = active.stored
        if not active.shared or (stored.private and not (encrypted and self._may_have_private(active, node_id))):
            return wire.REFUSED
        if request.piece == wire.SEAL_TABLE:
            return self._table(stored, request)
        if request.piece >= stored.geometry.piece_count or request.offset or not stored.held[request.piece]:
            return wire.NOT_HELD
        if request.length != stored.geometry.size(request.piece):
            return wire.REFUSED
        proof, certificate = self._voucher(active, request.piece)
        if proof is None:
            return wire.NOT_HELD
        body = stored.slice(request.piece, 0, request.length)
        if body is None:
            return wire.NOT_HELD
        return Served(body, proof, certificate)

    def _may_have_private(self, active: Active, node_id: NodeId) -> bool:
        """A node that takes the content for public would give it to anybody, so it does not get what we have as private."""
        return not self._parts.membership.is_open and node_id in active.private_for

    @staticmethod
    def _table(stored: StoredTask, request: wire.Request) -> Served | int:
        if not stored.complete:
            return wire.NOT_HELD
        table = proofs.table_of(stored.piece_digest(piece) for piece in range(stored.geometry.piece_count))
        stop = request.offset + request.length
        return Served(table[request.offset : stop]) if stop <= len(table) else wire.REFUSED

    def _voucher(self, active: Active, piece: int) -> tuple[wire.Signed | None, bytes]:
        """Who vouches for this piece: its first reader while a valid member, else we, once we verified all of it."""
        membership = self._parts.membership
        proof = active.stored.proof(piece)
        if proof is not None:
            certificate = membership.certificate_of(proof.key)
            if certificate is not None:
                return proof, certificate
        digest = active.stored.piece_digest(piece)
        if not active.stored.complete or digest is None:
            return None, b""
        own = proofs.prove(membership, active.task.id, active.geometry, piece, digest, self._parts.now())
        return own, membership.certificate

    def replication(self, task_id: bytes, piece: int) -> int:
        active = self._active.get(task_id)
        return active.exchange.replication(piece) if active is not None and 0 <= piece < len(active.exchange.counts) else 0

    def held_by(self, task_id: bytes, node_id: NodeId) -> int:
        active = self._active.get(task_id)
        return active.exchange.held_by(node_id) if active is not None else 0

    def uploaded(self, node_id: NodeId, request: wire.Request, sent: int) -> None:
        self._parts.totals.bytes_to_peers += sent
        active = self._active.get(request.task)
        if active is None or request.piece < 0:
            return
        active.traffic.setdefault(node_id, Traffic()).sent += sent
        if sent == active.geometry.size(request.piece):
            self._parts.totals.pieces_to_peers += 1
            active.exchange.piece_uploaded(node_id, request.piece, trio.current_time())
            active.touch_lightly()
