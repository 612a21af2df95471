"""Membership without X.509: the same keys, signatures and MACs as the real one, with the public key as certificate."""

from __future__ import annotations

import hashlib
import hmac
import random
from typing import TypeVar

import msgspec

from swarm import identity, wire
from swarm.errors import NotAMember
from swarm.identity import Identity

Body = TypeVar("Body", bound=msgspec.Struct)


class SimulatedMembership:
    """`edges.Membership` of a network named by a string: everybody who knows the name is a member, unless revoked."""

    is_open = True

    def __init__(self, key_pair: Identity, name: str = "simulation") -> None:
        self._identity = key_pair
        self._known = {key_pair.public_key}
        self.revoked: set[bytes] = set()
        self.network_id = hashlib.sha256(name.encode()).digest()
        self._secret = hashlib.blake2b(b"group secret", key=self.network_id).digest()

    @classmethod
    def draw(cls, rng: random.Random, name: str = "simulation") -> SimulatedMembership:
        """A member with a key pair drawn from `rng`."""
        return cls(Identity(rng.randbytes(identity.SEED_BYTES)), name)

    @property
    def node_id(self) -> bytes:
        return self._identity.node_id

    @property
    def public_key(self) -> bytes:
        return self._identity.public_key

    @property
    def certificate(self) -> bytes:
        return self.public_key

    def sign(self, kind: str, body: msgspec.Struct) -> wire.Signed:
        return self._identity.sign(kind, self.network_id, wire.encode(body))

    def verify(self, kind: str, signed_untrusted: wire.Signed, body: type[Body]) -> Body:
        if signed_untrusted.key not in self._known or signed_untrusted.key in self.revoked:
            raise NotAMember("the signer is not known")
        identity.verify(kind, self.network_id, signed_untrusted)
        return wire.decode(signed_untrusted.body, body)

    def learn(self, certificate_untrusted: bytes) -> bytes:
        if len(certificate_untrusted) != 32 or certificate_untrusted in self.revoked:
            raise NotAMember("not a member of the simulation")
        self._known.add(certificate_untrusted)
        return certificate_untrusted

    def certificate_of(self, public_key: bytes) -> bytes | None:
        return public_key if public_key in self._known and public_key not in self.revoked else None

    def task_key(self, task_id: bytes) -> bytes:
        return hashlib.blake2b(task_id, key=self.network_id, digest_size=20).digest()

    def datagram_mac(self, data: bytes) -> tuple[int, bytes]:
        return 0, hashlib.blake2b(data, key=self._secret, digest_size=16).digest()

    def check_datagram_mac(self, epoch: int, mac: bytes, data: bytes) -> bool:
        return epoch == 0 and hmac.compare_digest(mac, self.datagram_mac(data)[1])
