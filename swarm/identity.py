"""A node's Ed25519 key pair: node id, signing, verifying.

Every signature is over ``b"swarm/1/<kind>\\0" || network id || body``: the tag keeps a signature of one kind from
being passed off as another, the network id keeps it inside one closed group.  The body is signed and verified as
the bytes that travel, never re-encoded.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from swarm import private_files, wire
from swarm.errors import ConfigError, IntegrityError

NODE_ID_BYTES: Final = 20
SEED_BYTES: Final = 32
PUBLIC_KEY_BYTES: Final = 32

_SMALL_ORDER: Final = frozenset(
    bytes.fromhex(encoding)
    for encoding in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)
"""Every encoding, canonical or not, of the points whose order divides 8, with the sign bit cleared (libsodium's list).

Under such a key one signature fits many messages, so anybody can sign with it.  libsodium refuses them; OpenSSL, which
checks the handshake, does not.
"""


def node_id_of(public_key: bytes) -> bytes:
    """SHA-256 of the raw public key, cut to Kademlia's 160 bits: an id cannot be chosen freely, only ground for."""
    return hashlib.sha256(public_key).digest()[:NODE_ID_BYTES]


def is_weak_key(public_key: bytes) -> bool:
    """Whether anybody can sign under this key without knowing a secret."""
    return public_key[:-1] + bytes([public_key[-1] & 0x7F]) in _SMALL_ORDER


def _signed_bytes(kind: str, network_id: bytes, body: bytes) -> bytes:
    return b"swarm/1/" + kind.encode("ascii") + b"\0" + network_id + body


class Identity:
    """An Ed25519 key pair.  Its `repr` shows the node id, never the key."""

    __slots__ = ("_key", "node_id", "public_key")

    def __init__(self, seed: bytes) -> None:
        """`seed` is the 32-byte Ed25519 private seed.

        Raises:
            ConfigError: Another length.
        """
        if len(seed) != SEED_BYTES:
            raise ConfigError(f"a node key has {SEED_BYTES} bytes, this one has {len(seed)}")
        self._key = SigningKey(seed)
        self.public_key: bytes = bytes(self._key.verify_key)
        self.node_id: bytes = node_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        return cls(os.urandom(SEED_BYTES))

    @property
    def seed(self) -> bytes:
        """The private seed; written to disk with mode 0600 and nowhere else."""
        return bytes(self._key)

    def sign(self, kind: str, network_id: bytes, body: bytes) -> wire.Signed:
        """Sign `body` for one purpose (`kind`) in one network."""
        return wire.Signed(body, self.public_key, self._key.sign(_signed_bytes(kind, network_id, body)).signature)

    def __repr__(self) -> str:
        return f"Identity({self.node_id.hex()})"


def verify(kind: str, network_id: bytes, signed: wire.Signed) -> None:
    """Check the signature; says nothing about membership.

    Raises:
        IntegrityError: It is not this key's signature over this body in this network.
    """
    try:
        VerifyKey(signed.key).verify(_signed_bytes(kind, network_id, signed.body), signed.signature)
    except (BadSignatureError, ValueError, TypeError) as error:
        raise IntegrityError(f"bad {kind} signature by {node_id_of(signed.key).hex()}") from error


def load_or_create(path: Path) -> Identity:
    """The identity kept in `path` (32 raw bytes, mode 0600), made at first use, by one process only.

    Raises:
        ConfigError: Unreadable, of the wrong size, a link, or open to others.
    """
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    identity = Identity.generate()
    try:
        private_files.create(path, identity.seed)
    except FileExistsError:
        return _load(path)  # another process was first
    return identity


def _load(path: Path) -> Identity:
    # No links: the data directory is ours alone, and a link there means that somebody else could choose our key.
    seed = private_files.read_private(path, max_bytes=4096, follow_links=False)
    try:
        return Identity(seed)
    except ConfigError as error:
        raise ConfigError(f"the node key {path} is damaged: {error}; delete it and the node gets a new identity") from error
