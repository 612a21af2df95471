"""The group secret: a MAC on every datagram, so that outsiders are dropped before anything is parsed.

The file has one line for each secret, ``<epoch> <64 hexadecimal digits>``.  The first one is used, all of them are
accepted.  A change without downtime is two rounds of handing the file out: first the new secret as a further line,
then, when every node has it, as the first one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from typing import Final

from swarm.errors import ConfigError

SECRET_BYTES: Final = 32
MAC_BYTES: Final = 16
EPOCHS: Final = 256
"""The epoch is one byte in the datagram."""

MAX_SECRETS: Final = 3
"""Previous, current and next.  More would keep old secrets alive for no reason."""


@dataclass(frozen=True, slots=True, repr=False)
class Epoch:
    """One secret and the number that names it on the wire."""

    number: int
    secret: bytes

    def __repr__(self) -> str:
        return f"Epoch({self.number})"


class GroupSecret:
    """Up to three secrets, the first one in use.  Its `repr` shows the epochs, never a secret."""

    __slots__ = ("_current", "_keys", "epochs")

    def __init__(self, epochs: tuple[Epoch, ...], network_id: bytes) -> None:
        """The network id goes into the MAC keys: networks that share a secret by mistake still do not mix.

        Raises:
            ConfigError: None, too many, or an epoch named twice.
        """
        if not 1 <= len(epochs) <= MAX_SECRETS:
            raise ConfigError(f"a group secret file holds 1 to {MAX_SECRETS} secrets, this one {len(epochs)}")
        if len({epoch.number for epoch in epochs}) != len(epochs):
            raise ConfigError("a group secret file names an epoch twice")
        self.epochs = epochs
        self._current = epochs[0].number
        self._keys = {epoch.number: _mac_key(epoch.secret, network_id) for epoch in epochs}

    def mac(self, data: bytes) -> tuple[int, bytes]:
        """Epoch and MAC under the secret in use."""
        return self._current, hashlib.blake2b(data, digest_size=MAC_BYTES, key=self._keys[self._current]).digest()

    def check(self, epoch: int, mac: bytes, data: bytes) -> bool:
        """Whether one of our secrets made this MAC; the comparison takes the same time wherever the first difference is."""
        key = self._keys.get(epoch)
        if key is None:
            return False
        return hmac.compare_digest(hashlib.blake2b(data, digest_size=MAC_BYTES, key=key).digest(), mac)

    def __repr__(self) -> str:
        return f"GroupSecret(epochs={[epoch.number for epoch in self.epochs]})"


def _mac_key(secret: bytes, network_id: bytes) -> bytes:
    return hashlib.blake2b(network_id, digest_size=32, key=secret, person=b"swarm/1/datagram").digest()


def generate() -> tuple[Epoch, ...]:
    """A first secret, epoch 1."""
    return (Epoch(1, os.urandom(SECRET_BYTES)),)


def rotate(epochs: tuple[Epoch, ...]) -> tuple[tuple[Epoch, ...], bool]:
    """The next step of a change of secret, and whether it puts a new one in use.

    With no secret waiting, one is made and waits; with one waiting, it is put in use, and the one it replaces is the
    only other that stays accepted.  A secret waits if its epoch follows the one in use.
    """
    current = epochs[0]
    successor = (current.number + 1) % EPOCHS
    for epoch in epochs[1:]:
        if epoch.number == successor:
            return (epoch, current), True
    return (current, *epochs[1:2], Epoch(successor, os.urandom(SECRET_BYTES))), False


def parse(text_untrusted: bytes) -> tuple[Epoch, ...]:
    """Read the file; empty lines and lines that begin with ``#`` are ignored.

    Raises:
        ConfigError: Not this format; the message never repeats the content, which is secret.
    """
    epochs = []
    for number, line in enumerate(text_untrusted.splitlines(), 1):
        words = line.split()
        if words and not words[0].startswith(b"#"):
            epochs.append(_parse_line(words, number))
    if not epochs:
        raise ConfigError("it holds no secret; each line is: EPOCH and 64 hexadecimal digits")
    return tuple(epochs)


def _parse_line(words: list[bytes], line: int) -> Epoch:
    try:
        epoch, secret = words
        number, value = int(epoch.decode("ascii")), bytes.fromhex(secret.decode("ascii"))
    except ValueError:
        # Not chained: the cause quotes what it could not read, and that may be most of a secret.
        raise ConfigError(f"line {line} is not: EPOCH and 64 hexadecimal digits") from None
    if not 0 <= number < EPOCHS or len(value) != SECRET_BYTES:
        raise ConfigError(f"line {line} is not: EPOCH (0 to 255) and 64 hexadecimal digits")
    if len(set(value)) == 1:
        raise ConfigError(f"line {line}: that secret is no secret; make one with: openssl rand -hex 32")
    return Epoch(number, value)


def render(epochs: tuple[Epoch, ...]) -> bytes:
    """The file's content."""
    lines = ["# The first secret is in use, all are accepted.  Keep this file as safe as a private key."]
    lines += [f"{epoch.number} {epoch.secret.hex()}" for epoch in epochs]
    return ("\n".join(lines) + "\n").encode("ascii")
