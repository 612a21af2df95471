"""Who gets how much of an answer: tokens, proofs of address, and budgets.

The group secret's MAC keeps outsiders out, but a captured datagram can be sent again with a forged source.  So an
address that has not proved itself gets at most three times the bytes that came from it, five datagrams a second, and
all such addresses together no more than `UNPROVEN_RATE`; a proven one is bounded too, for its own datagrams can be
replayed at it.  An address proves itself by returning the token of an earlier answer, or by answering a query of ours.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from swarm.dht import addresses, messages
from swarm.edges import Address

AMPLIFICATION: Final = 3
"""Bytes out per byte in, before proof (RFC 9000, 8.1, and the same reason)."""
UNPROVEN_PER_SECOND: Final = 5.0
UNPROVEN_RATE: Final = 256 * 1024
"""Bytes a second to all unproven addresses together: a thousand nodes may join in a second or two."""
PROVEN_PER_SECOND: Final = 200.0
PROVEN_BURST: Final = 1000.0
"""Answers a second to one proven address, and at once: a node that withdraws or announces all it has."""
PROOF_LIFETIME: Final = 600.0
TOKEN_ROTATION: Final = 300.0
"""The current secret and the one before are accepted: a token lives for five to ten minutes."""
TOKEN_FRESH: Final = 290.0
"""Seconds for which the receiver of a token may count on it."""
MAX_ADDRESSES: Final = 8192
"""Addresses remembered of each kind; a flood of forged ones costs this much memory and no more."""


class Bucket:
    """A token bucket that starts full: `rate` a second, at most `burst`."""

    __slots__ = ("_burst", "_level", "_rate", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._updated = now

    def level(self, now: float) -> float:
        self._level = min(self._burst, self._level + (now - self._updated) * self._rate)
        self._updated = now
        return self._level

    def spend(self, amount: float) -> None:
        self._level -= amount


@dataclass(slots=True)
class _Unproven:
    credit: int
    answers: Bucket


class Admission:
    """Decides how long an answer may be; 0 means no answer at all."""

    def __init__(self, randbytes: Callable[[int], bytes]) -> None:
        self._randbytes = randbytes
        self._secrets = [randbytes(32), randbytes(32)]
        self._rotated = float("-inf")
        self._proven: OrderedDict[Address, tuple[float, Bucket]] = OrderedDict()
        self._unproven: OrderedDict[Address, _Unproven] = OrderedDict()
        self._all_unproven: Bucket | None = None

    def token(self, address: Address, now: float) -> bytes:
        """What this address has to bring back."""
        self._rotate(now)
        return self._token(self._secrets[0], address)

    def is_proven(self, address: Address, now: float) -> bool:
        known = self._proven.get(address)
        return known is not None and known[0] > now

    def prove(self, address: Address, now: float) -> None:
        """The address answered a nonce of ours."""
        known = self._proven.get(address)
        self._proven[address] = (now + PROOF_LIFETIME, known[1] if known else Bucket(PROVEN_PER_SECOND, PROVEN_BURST, now))
        self._proven.move_to_end(address)
        self._unproven.pop(address, None)
        while len(self._proven) > MAX_ADDRESSES:
            self._proven.popitem(last=False)

    def check_token(self, address: Address, token_untrusted: bytes, now: float) -> bool:
        """Whether it is a token of ours for this address, which then is proven."""
        self._rotate(now)
        for secret in self._secrets:
            if hmac.compare_digest(self._token(secret, address), token_untrusted):
                self.prove(address, now)
                return True
        return False

    def received(self, address: Address, length: int, now: float) -> None:
        """Count what came from an address, which is what it may get three times of."""
        if self.is_proven(address, now):
            return
        unproven = self._unproven.get(address)
        if unproven is None:
            unproven = self._unproven[address] = _Unproven(0, Bucket(UNPROVEN_PER_SECOND, UNPROVEN_PER_SECOND, now))
            while len(self._unproven) > MAX_ADDRESSES:
                self._unproven.popitem(last=False)
        unproven.credit = min(unproven.credit + AMPLIFICATION * length, AMPLIFICATION * messages.MAX_DATAGRAM_BYTES)

    def room(self, address: Address, now: float) -> int:
        """Bytes that a datagram to this address may have now; `spend` what is sent."""
        if self.is_proven(address, now):
            return messages.MAX_DATAGRAM_BYTES if self._proven[address][1].level(now) >= 1 else 0
        unproven = self._unproven.get(address)
        if unproven is None or unproven.answers.level(now) < 1:
            return 0
        if self._all_unproven is None:
            self._all_unproven = Bucket(UNPROVEN_RATE, UNPROVEN_RATE, now)
        return max(0, min(unproven.credit, int(self._all_unproven.level(now)), messages.MAX_DATAGRAM_BYTES))

    def spend(self, address: Address, length: int, now: float) -> None:
        """A datagram of `length` bytes goes there."""
        if self.is_proven(address, now):
            self._proven[address][1].spend(1)
        elif (unproven := self._unproven.get(address)) is not None:
            unproven.credit -= length
            unproven.answers.spend(1)
            if self._all_unproven is not None:
                self._all_unproven.spend(length)

    def _rotate(self, now: float) -> None:
        if now >= self._rotated + TOKEN_ROTATION:
            if now >= self._rotated + 2 * TOKEN_ROTATION:
                self._secrets[0] = self._randbytes(32)
            self._secrets = [self._randbytes(32), self._secrets[0]]
            self._rotated = now

    @staticmethod
    def _token(secret: bytes, address: Address) -> bytes:
        return hashlib.blake2b(addresses.pack(address), key=secret, digest_size=messages.TOKEN_BYTES).digest()
