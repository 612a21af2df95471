"""When to ask an origin again, and when to leave it alone.  No clock, no sleep: `now` in, seconds out."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field
from typing import Final

from swarm.errors import OriginUnreachable

BASE_DELAY: Final = 0.5
MAX_DELAY: Final = 8.0
"""Delays are half fixed, half random, doubling from half a second to eight: the nodes of a swarm that lost one origin
together must not come back together."""

LOOKUP_SECONDS: Final = 4.0
"""After a name look-up that took longer, or failed for so long, there is no other: a name that does not resolve is
reported within fifteen seconds (R16)."""

OPEN_AFTER: Final = 3
OPEN_SECONDS: Final = 5.0
MAX_OPEN_SECONDS: Final = 60.0
"""Requests in a row that failed after all their retries, and how long further ones then fail soon: the hundreds of pieces
of one download must not each wait half a minute for an origin that is down."""


class Cause(enum.Enum):
    """Why an attempt failed; decides how long to wait."""

    DISCONNECTED = "disconnected"
    CONNECT = "connect"
    LOOKUP = "lookup"
    STATUS = "status"


class AttemptFailed(OriginUnreachable):
    """One attempt failed and another may do; never leaves this package.

    Attributes:
        retry_after: Seconds the origin asked us to wait, or `None`.
        health: Of the host that failed, which a redirect may have chosen.
    """

    def __init__(self, message: str, cause: Cause, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after
        self.health: Health | None = None


@dataclass(slots=True)
class Retries:
    """The attempts of one request."""

    most: int
    seconds: float
    rng: random.Random
    started: float
    failures: int = 0

    def after(self, failure: AttemptFailed, now: float) -> float | None:
        """Seconds to wait before the next attempt; `None` when there is none."""
        self.failures += 1
        if self.failures > self.most or (failure.cause is Cause.LOOKUP and now - self.started > LOOKUP_SECONDS):
            return None
        delay = self._delay(failure)
        return delay if now + delay - self.started <= self.seconds else None

    def _delay(self, failure: AttemptFailed) -> float:
        if failure.cause is Cause.DISCONNECTED and self.failures == 1:
            return 0.0  # most often a kept connection that the server closed just as we used it
        ceiling = min(MAX_DELAY, BASE_DELAY * (1 << (self.failures - 1)))
        delay = ceiling / 2 + self.rng.uniform(0, ceiling / 2)
        if failure.retry_after is None:
            return delay
        return failure.retry_after + self.rng.uniform(0, min(1.0, ceiling / 2))


@dataclass(slots=True)
class Health:
    """What we know of one host, over all its requests."""

    given_up: int = 0
    open_until: float = field(default=float("-inf"))
    not_before: float = field(default=float("-inf"))

    def answered(self) -> None:
        self.given_up = 0
        self.open_until = float("-inf")

    def asked_to_wait(self, seconds: float, now: float) -> None:
        """`Retry-After` counts for every request to the host, not only for the one that was told."""
        self.not_before = max(self.not_before, now + seconds)

    def failed(self, now: float) -> None:
        """A request failed after all its retries."""
        self.given_up += 1
        if self.given_up >= OPEN_AFTER:
            self.open_until = now + min(MAX_OPEN_SECONDS, OPEN_SECONDS * (1 << min(8, self.given_up - OPEN_AFTER)))

    def is_open(self, now: float) -> bool:
        """Whether requests should fail without being sent."""
        return now < self.open_until
