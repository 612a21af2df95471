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

from swarm import wire
from swarm.errors import ConfigError, IntegrityError

NODE_ID_BYTES: Final = 20
SEED_BYTES: Final = 32


def node_id_of(public_key: bytes) -> bytes:
    """SHA-256 of the raw public key, cut to Kademlia's 160 bits: an id cannot be chosen freely, only ground for."""
    return hashlib.sha256(public_key).digest()[:NODE_ID_BYTES]


def _signed_bytes(kind: str, network_id: bytes, body: bytes) -> bytes:
    return b"swarm/1/" + kind.encode("ascii") + b"\0" + network_id + body


class Identity:
    """An Ed25519 key pair.  Its `repr` shows the node id, never the key."""

    def __init__(self, seed: bytes) -> None:
        """`seed` is the 32-byte Ed25519 private seed."""
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
    """The identity kept in `path` (32 raw bytes, mode 0600), made at first use.

    Raises:
        ConfigError: Unreadable, of the wrong size, or readable by others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return _create(path)
    except OSError as error:
        raise ConfigError(f"cannot read the node key {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(f"the node key {path} is readable by others (mode {mode:04o}); run: chmod 600 {path}")
        return Identity(file.read(SEED_BYTES + 1))


def _create(path: Path) -> Identity:
    identity = Identity.generate()
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(identity.seed)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"cannot write the node key {path}: {error.strerror}") from error
    return identity
