"""Keys and signatures.  The attacks are those of SECURITY 1.17; the vectors are RFC 8032, 7.1."""

import threading
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey, VerifyKey

from swarm import identity, wire
from swarm.errors import ConfigError, IntegrityError
from swarm.identity import Identity

NETWORK = bytes(range(32))
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493

RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]

# Order 1, 2, 4 (twice), 8 (four times), and encodings with y >= p that stand for the same points.
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "0100000000000000000000000000000000000000000000000000000000000080",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


def signed_by(key: Identity, kind: str = "proof", network_id: bytes = NETWORK, body: bytes = b"body") -> wire.Signed:
    return key.sign(kind, network_id, body)


def replaced(signed: wire.Signed, **changes: bytes) -> wire.Signed:
    fields = {"body": signed.body, "key": signed.key, "signature": signed.signature} | changes
    return wire.Signed(**fields)


def assert_refused(signed: wire.Signed, kind: str = "proof", network_id: bytes = NETWORK) -> None:
    with pytest.raises(IntegrityError):
        identity.verify(kind, network_id, signed)


@pytest.mark.parametrize(("seed", "public_key", "message", "signature"), RFC_8032)
def test_the_vectors_of_rfc_8032_pass(seed, public_key, message, signature):
    assert Identity(bytes.fromhex(seed)).public_key.hex() == public_key
    assert SigningKey(bytes.fromhex(seed)).sign(bytes.fromhex(message)).signature.hex() == signature
    VerifyKey(bytes.fromhex(public_key)).verify(bytes.fromhex(message), bytes.fromhex(signature))


def test_a_signature_covers_tag_network_and_body_as_documented():
    key = Identity.generate()
    signed = signed_by(key)
    # Another implementation, over the bytes that PROTOCOL names.
    Ed25519PublicKey.from_public_bytes(key.public_key).verify(signed.signature, b"swarm/1/proof\0" + NETWORK + b"body")
    identity.verify("proof", NETWORK, signed)


@given(
    body=st.binary(max_size=600),
    kind=st.sampled_from(["proof", "seal", "claim", "provider"]),
    seed=st.binary(min_size=32, max_size=32),
)
@settings(max_examples=50, deadline=None)
def test_what_is_signed_verifies(body, kind, seed):
    key = Identity(seed)
    identity.verify(kind, NETWORK, key.sign(kind, NETWORK, body))


@given(bit=st.integers(0, (4 + 32 + 64) * 8 - 1))
@settings(max_examples=100, deadline=None)
def test_a_flipped_bit_anywhere_is_refused(bit):
    signed = signed_by(Identity(bytes(31) + b"\1"))
    data = bytearray(signed.body + signed.key + signed.signature)
    data[bit // 8] ^= 1 << bit % 8
    assert_refused(wire.Signed(bytes(data[:4]), bytes(data[4:36]), bytes(data[36:])))


def test_a_signature_of_one_kind_does_not_pass_for_another():
    assert_refused(signed_by(Identity.generate(), kind="proof"), kind="seal")


def test_a_signature_of_another_network_is_refused():
    assert_refused(signed_by(Identity.generate(), network_id=bytes(32)))


def test_a_signature_does_not_pass_for_another_key():
    assert_refused(replaced(signed_by(Identity.generate()), key=Identity.generate().public_key))


@pytest.mark.parametrize("key", SMALL_ORDER)
def test_a_key_under_which_anybody_can_sign_is_refused(key):
    forged = wire.Signed(b"body", bytes.fromhex(key), b"\1" + bytes(63))
    assert_refused(forged)
    assert identity.is_weak_key(forged.key)


def test_the_small_order_forgery_is_real():
    # R = the neutral element, S = 0: a verifier that does not look at the key accepts it for any message.
    neutral = Ed25519PublicKey.from_public_bytes(bytes.fromhex(SMALL_ORDER[0]))
    neutral.verify(b"\1" + bytes(63), b"anything at all")


def test_a_usual_key_is_not_called_weak():
    assert not any(identity.is_weak_key(Identity.generate().public_key) for _ in range(20))


def test_a_signature_with_s_beyond_the_group_order_is_refused():
    signed = signed_by(Identity.generate())
    s = int.from_bytes(signed.signature[32:], "little") + GROUP_ORDER
    assert_refused(replaced(signed, signature=signed.signature[:32] + s.to_bytes(32, "little")))


def test_a_signature_of_zeros_is_refused():
    assert_refused(replaced(signed_by(Identity.generate()), signature=bytes(64)))


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length):
    assert_refused(replaced(signed_by(Identity.generate()), key=bytes(length)))


@pytest.mark.parametrize("length", [0, 63, 65, 128])
def test_a_signature_of_another_length_is_refused(length):
    assert_refused(replaced(signed_by(Identity.generate()), signature=bytes(length)))


def test_openssl_and_libsodium_agree_on_a_forged_body():
    signed = replaced(signed_by(Identity.generate()), body=b"Body")
    assert_refused(signed)
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(signed.key).verify(signed.signature, b"swarm/1/proof\0" + NETWORK + signed.body)


def test_a_node_id_is_the_cut_hash_of_the_key():
    key = Identity(bytes(32))
    assert key.node_id == identity.node_id_of(key.public_key)
    assert key.node_id.hex() == "139e3940e64b5491722088d9a0d741628fc826e0"


def test_the_key_is_not_in_what_is_printed():
    key = Identity.generate()
    for text in (repr(key), str(key), f"{key}"):
        assert key.seed.hex() not in text
        assert key.node_id.hex() in text


def test_a_key_is_made_once_and_found_again(tmp_path: Path):
    path = tmp_path / "node.key"
    first = identity.load_or_create(path)
    assert identity.load_or_create(path).seed == first.seed
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["node.key"]


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602])
def test_a_key_others_can_open_is_refused(tmp_path: Path, mode: int):
    path = tmp_path / "node.key"
    identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        identity.load_or_create(path)


def test_a_link_in_the_place_of_the_key_is_refused(tmp_path: Path):
    identity.load_or_create(tmp_path / "theirs")
    (tmp_path / "node.key").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"node\.key"):
        identity.load_or_create(tmp_path / "node.key")


def test_a_dangling_link_does_not_choose_where_the_key_is_written(tmp_path: Path):
    (tmp_path / "node.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        identity.load_or_create(tmp_path / "node.key")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_file_of_another_size_is_refused_and_kept(tmp_path: Path, length: int):
    path = tmp_path / "node.key"
    path.write_bytes(bytes(length))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"node\.key is damaged"):
        identity.load_or_create(path)
    assert path.read_bytes() == bytes(length)


def test_a_key_that_cannot_be_written_is_said_in_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file") as caught:
        identity.load_or_create(tmp_path / "missing" / "node.key")
    assert "\n" not in str(caught.value)


def test_processes_that_start_at_once_get_the_same_key(tmp_path: Path):
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(identity.load_or_create(tmp_path / "node.key").seed)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(found)) == 1
