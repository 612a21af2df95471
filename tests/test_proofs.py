"""Who vouches for which bytes: proofs, seals and tables, and every statement that must not pass for another."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from simulations.membership import SimulatedMembership
from swarm import proofs, wire
from swarm.errors import IntegrityError, NotAMember, RemoteProtocolError
from swarm.task import MIB, Digest, Geometry

TASK, OTHER_TASK = b"t" * 32, b"o" * 32
GEOMETRY = Geometry.of(3 * MIB)
DIGEST = blake3(b"the bytes").digest()
CONTENT = Digest("sha256", "5e" * 32)
TABLE = bytes(32 * GEOMETRY.piece_count)
NOW = 1_800_000_000


def member(number: int, network: str = "simulation") -> SimulatedMembership:
    return SimulatedMembership.draw(random.Random(number), network)


@pytest.fixture
def signer() -> SimulatedMembership:
    return member(1)


@pytest.fixture
def reader(signer: SimulatedMembership) -> SimulatedMembership:
    other = member(2)
    other.learn(signer.certificate)
    return other


def flipped(signed: wire.Signed, field: str, place: int) -> wire.Signed:
    data = bytearray(getattr(signed, field))
    data[place // 8] ^= 1 << place % 8
    return msgspec.structs.replace(signed, **{field: bytes(data)})


# --- proofs -----------------------------------------------------------------------------------------------------------


def test_a_proof_says_what_was_proven(signer: SimulatedMembership, reader: SimulatedMembership) -> None:
    proof = proofs.prove(signer, TASK, GEOMETRY, 3, DIGEST, NOW)
    assert proofs.check_proof(reader, proof, TASK, GEOMETRY, 3) == DIGEST


@pytest.mark.parametrize(
    ("task", "geometry", "piece"),
    [
        (OTHER_TASK, GEOMETRY, 3),
        (TASK, replace(GEOMETRY, length=GEOMETRY.length + 1), 3),
        (TASK, replace(GEOMETRY, piece_length=MIB), 3),
        (TASK, GEOMETRY, 4),
    ],
)
def test_a_proof_of_another_piece_task_or_geometry_is_refused(
    signer: SimulatedMembership, reader: SimulatedMembership, task: bytes, geometry: Geometry, piece: int
) -> None:
    proof = proofs.prove(signer, TASK, GEOMETRY, 3, DIGEST, NOW)
    with pytest.raises(IntegrityError, match="another piece"):
        proofs.check_proof(reader, proof, task, geometry, piece)


def test_every_flipped_bit_of_a_proof_is_noticed(signer: SimulatedMembership, reader: SimulatedMembership) -> None:
    proof = proofs.prove(signer, TASK, GEOMETRY, 3, DIGEST, NOW)
    for field in ("body", "signature"):
        for place in range(8 * len(getattr(proof, field))):
            with pytest.raises(IntegrityError):
                proofs.check_proof(reader, flipped(proof, field, place), TASK, GEOMETRY, 3)


def test_a_proof_under_another_key_is_refused(signer: SimulatedMembership, reader: SimulatedMembership) -> None:
    proof = proofs.prove(signer, TASK, GEOMETRY, 3, DIGEST, NOW)
    with pytest.raises(IntegrityError):
        proofs.check_proof(reader, msgspec.structs.replace(proof, key=reader.public_key), TASK, GEOMETRY, 3)


def test_a_proof_of_a_stranger_is_refused_without_a_word_about_its_signature(reader: SimulatedMembership) -> None:
    with pytest.raises(NotAMember):
        proofs.check_proof(reader, proofs.prove(member(3), TASK, GEOMETRY, 3, DIGEST, NOW), TASK, GEOMETRY, 3)


def test_a_proof_of_a_revoked_member_is_refused(signer: SimulatedMembership, reader: SimulatedMembership) -> None:
    proof = proofs.prove(signer, TASK, GEOMETRY, 3, DIGEST, NOW)
    reader.revoked.add(signer.public_key)
    with pytest.raises(NotAMember):
        proofs.check_proof(reader, proof, TASK, GEOMETRY, 3)


def test_a_proof_of_another_network_is_refused(reader: SimulatedMembership) -> None:
    elsewhere = member(1, "another")
    with pytest.raises(IntegrityError):
        proofs.check_proof(reader, proofs.prove(elsewhere, TASK, GEOMETRY, 3, DIGEST, NOW), TASK, GEOMETRY, 3)


def test_a_seal_or_a_claim_cannot_pass_for_a_proof(signer: SimulatedMembership, reader: SimulatedMembership) -> None:
    body = wire.ProofBody(TASK, GEOMETRY.length, GEOMETRY.piece_length, 3, DIGEST, NOW)
    for kind in ("seal", "claim", "provider"):
        with pytest.raises(IntegrityError):
            proofs.check_proof(reader, signer.sign(kind, body), TASK, GEOMETRY, 3)


@pytest.mark.parametrize("body", [b"", b"\x80", b"\x86" + bytes(5), b"\xa0"])
def test_a_signed_body_that_is_none_is_a_protocol_error(
    signer: SimulatedMembership, reader: SimulatedMembership, body: bytes
) -> None:
    for kind, check in (("proof", lambda signed: proofs.check_proof(reader, signed, TASK, GEOMETRY, 0)),
                        ("seal", lambda signed: proofs.check_seal(reader, signed, TASK, GEOMETRY))):  # fmt: skip
        signed = signer._identity.sign(kind, signer.network_id, body)
        with pytest.raises(RemoteProtocolError):
            check(signed)


# --- seals and tables -------------------------------------------------------------------------------------------------


def test_a_seal_names_the_content_and_the_root_of_its_table(signer: SimulatedMembership, reader: SimulatedMembership) -> None:
    body = proofs.check_seal(reader, proofs.seal(signer, TASK, GEOMETRY, CONTENT, TABLE, NOW), TASK, GEOMETRY)
    assert (body.content_digest, body.root) == (str(CONTENT), proofs.table_root(TABLE))


@pytest.mark.parametrize(
    ("task", "geometry"), [(OTHER_TASK, GEOMETRY), (TASK, Geometry.of(5)), (TASK, replace(GEOMETRY, piece_length=MIB))]
)
def test_a_seal_of_another_task_or_geometry_is_refused(
    signer: SimulatedMembership, reader: SimulatedMembership, task: bytes, geometry: Geometry
) -> None:
    with pytest.raises(IntegrityError, match="another task"):
        proofs.check_seal(reader, proofs.seal(signer, TASK, GEOMETRY, CONTENT, TABLE, NOW), task, geometry)


@pytest.mark.parametrize("text", ["", "sha256:", "md5:" + "0" * 32, "sha256:" + "5E" * 32, "x" * 140])
def test_a_seal_over_garbage_is_refused_and_ends_nobody_elses_download(
    signer: SimulatedMembership, reader: SimulatedMembership, text: str
) -> None:
    body = wire.SealBody(TASK, GEOMETRY.length, GEOMETRY.piece_length, text, bytes(32), NOW)
    with pytest.raises(RemoteProtocolError, match="not a digest"):
        proofs.check_seal(reader, signer.sign("seal", body), TASK, GEOMETRY)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20))
def test_a_table_splits_into_what_it_was_made_of(digests: list[bytes]) -> None:
    table = proofs.table_of(digests)
    assert proofs.split_table(table, proofs.table_root(table), len(digests)) == digests


@pytest.mark.parametrize("damage", [lambda t: t[:-1], lambda t: t + b"x", lambda t: b"x" + t[1:], lambda t: b""])
def test_a_table_that_is_not_the_sealed_one_is_refused(damage) -> None:
    table = bytes(range(64))
    with pytest.raises(RemoteProtocolError, match="table"):
        proofs.split_table(damage(table), proofs.table_root(table), 2)


def test_a_shorter_table_with_its_own_root_is_refused() -> None:
    table = bytes(32)
    with pytest.raises(RemoteProtocolError, match="table"):
        proofs.split_table(table, proofs.table_root(table), 2)
