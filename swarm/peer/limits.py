"""Small counters that keep one peer, one address or one task from taking more than its share.

None of them reads a clock: `now` is monotonic seconds, passed in and never less than in an earlier call.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from swarm.errors import RemoteProtocolError

BURST_SECONDS: Final = 0.05
"""Measured: a bucket of one quantum loses 26-81 % of a high rate to late wake-ups; with 50 ms the long-run error is
within the burst."""

MIN_BURST_BYTES: Final = 16 * 1024
"""Under one TLS record a send costs more than it carries."""

MIN_DELAY_SECONDS: Final = 0.001

MAX_TASK_BUCKETS: Final = 1024
"""Tasks with a bucket of their own; protects memory from a node that serves many thousands of small tasks."""

K = TypeVar("K", bound=Hashable)


class TokenBucket:
    """At most `rate` bytes a second over time, and `BURST_SECONDS` of that at once; a rate of 0 does not limit."""

    __slots__ = ("_tokens", "_updated", "burst", "rate")

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.burst = max(rate * BURST_SECONDS, MIN_BURST_BYTES)
        self._tokens = self.burst
        self._updated = now

    def allowed(self, wanted: int, now: float) -> int:
        """How many of `wanted` bytes may move now.  Take them with `take` once they have."""
        if not self.rate:
            return wanted
        self._refill(now)
        return min(wanted, max(0, int(self._tokens)))

    def take(self, count: int) -> None:
        """Account for bytes that moved; more than was allowed becomes a debt."""
        self._tokens -= count

    def delay(self, wanted: int, now: float) -> float:
        """Seconds until `wanted` bytes, or a burst if that is less, may move."""
        if not self.rate:
            return 0.0
        self._refill(now)
        missing = min(wanted, self.burst) - self._tokens
        # Never less than a timer can wait: a delay lost in rounding would be a busy loop.
        return max(MIN_DELAY_SECONDS, missing / self.rate) if missing > 0 else 0.0

    def _refill(self, now: float) -> None:
        self._tokens = min(self.burst, self._tokens + (now - self._updated) * self.rate)
        self._updated = now


class RateLimit:
    """A bucket for the node and one for each task, both of which must agree.

    Args:
        node_rate, task_rate: Bytes a second; 0 does not limit.
    """

    __slots__ = ("_node", "_task_rate", "_tasks")

    def __init__(self, node_rate: float, task_rate: float, now: float) -> None:
        self._node = TokenBucket(node_rate, now)
        self._task_rate = task_rate
        self._tasks: OrderedDict[bytes, TokenBucket] = OrderedDict()

    @property
    def limits(self) -> bool:
        """Whether there is any limit at all; without one nobody needs to ask further."""
        return bool(self._node.rate or self._task_rate)

    def allowed(self, task_id: bytes, wanted: int, now: float) -> int:
        """How many of `wanted` bytes of this task may move now; 0: ask again after `delay`."""
        allowed = self._node.allowed(wanted, now)
        return self._task(task_id, now).allowed(allowed, now) if self._task_rate else allowed

    def take(self, task_id: bytes, count: int, now: float) -> None:
        self._node.take(count)
        if self._task_rate:
            self._task(task_id, now).take(count)

    def task_is_tighter(self, task_id: bytes, wanted: int, now: float) -> bool:
        """Whether it is the task's own rate that holds `wanted` bytes up, while other tasks might go on."""
        return bool(self._task_rate) and self._task(task_id, now).delay(wanted, now) > self._node.delay(wanted, now)

    def delay(self, task_id: bytes, wanted: int, now: float) -> float:
        """Seconds to wait before `allowed` grants a useful amount."""
        # Half a burst: waking for every byte that drips in would cost more than it moves, waiting for a whole burst
        # would let the bucket run over while the wake-up is late.
        delay = self._node.delay(min(wanted, int(self._node.burst / 2)), now)
        if self._task_rate:
            bucket = self._task(task_id, now)
            delay = max(delay, bucket.delay(min(wanted, int(bucket.burst / 2)), now))
        return delay

    def _task(self, task_id: bytes, now: float) -> TokenBucket:
        bucket = self._tasks.get(task_id)
        if bucket is None:
            bucket = self._tasks[task_id] = TokenBucket(self._task_rate, now)
            if len(self._tasks) > MAX_TASK_BUCKETS:
                self._tasks.popitem(last=False)
        else:
            self._tasks.move_to_end(task_id)
        return bucket


@dataclass(frozen=True, slots=True)
class ProgressRule:
    """When a transfer has failed although its connection still stands.

    Attributes:
        silence: Seconds without a byte; a host that vanished without a FIN looks like this.
        floor: Bytes a second, over any `window` seconds; against a peer that drips one byte a second.
    """

    silence: float = 10.0
    floor: float = 64 * 1024
    window: float = 20.0


class Progress:
    """Watches one transfer against a `ProgressRule`."""

    __slots__ = ("_last", "_rule", "_samples", "_total")

    SAMPLES: Final = 4
    """Samples a window: how far (a quarter) the window may slide late, against what is kept in memory."""

    def __init__(self, rule: ProgressRule, now: float) -> None:
        self._rule = rule
        self._last = now
        self._total = 0
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def moved(self, count: int, now: float) -> None:
        """`count` more bytes have moved."""
        if count:
            self._last = now
            self._total += count

    def excuse(self, now: float) -> None:
        """The transfer is held up by ourselves (a rate limit): start measuring again from `now`."""
        self._last = now
        self._samples = deque([(now, self._total)])

    def deadline(self) -> float:
        """When to call `failed` if nothing happens before."""
        return min(self._last + self._rule.silence, self._next_sample())

    def failed(self, now: float) -> str:
        """What is wrong, or an empty string.  Call it after each read and at each deadline."""
        if now >= self._last + self._rule.silence:
            return f"no byte for {self._rule.silence:g} s"
        if now < self._next_sample():
            return ""
        return self._sample(now)

    def _next_sample(self) -> float:
        return self._samples[-1][0] + self._rule.window / self.SAMPLES

    def _sample(self, now: float) -> str:
        samples, rule = self._samples, self._rule
        samples.append((now, self._total))
        while len(samples) > 2 and samples[1][0] <= now - rule.window:
            samples.popleft()
        since, before = samples[0]
        if now - since >= rule.window and self._total - before < rule.floor * rule.window:
            return f"below {rule.floor:g} bytes/s over {rule.window:g} s"
        return ""


class Flood:
    """Counts what a peer makes us do in windows of a second, against 10,000 cheap messages a second.

    Args:
        per_second: Sustained count allowed.
        burst: Allowed at once: a peer that connects sends a `Join` for each of its tasks.
    """

    __slots__ = ("_bucket", "_what")

    def __init__(self, what: str, per_second: float, burst: float, now: float) -> None:
        self._what = what
        self._bucket = TokenBucket(per_second, now)
        self._bucket.burst = burst
        self._bucket._tokens = burst

    def count(self, number: int, now: float) -> None:
        """
        Raises:
            RemoteProtocolError: More than is allowed.
        """
        if self._bucket.allowed(number, now) < number:
            raise RemoteProtocolError(f"too many {self._what}")
        self._bucket.take(number)


class Failures(Generic[K]):
    """Remembers what failed, so that it is left alone for a while that doubles with each failure.

    Against a record that names a victim's address, which would otherwise make every reader of it dial again and again.
    """

    __slots__ = ("_first", "_kept", "_limit", "_longest")

    def __init__(self, *, first: float = 30.0, longest: float = 300.0, limit: int = 4096) -> None:
        """`first` and `longest` in seconds; the oldest of more than `limit` entries is forgotten."""
        self._first = first
        self._longest = longest
        self._limit = limit
        self._kept: OrderedDict[K, tuple[int, float]] = OrderedDict()

    def blocked(self, key: K, now: float) -> bool:
        return now < self._kept.get(key, (0, 0.0))[1]

    def until(self, key: K) -> float:
        return self._kept.get(key, (0, 0.0))[1]

    def failed(self, key: K, now: float) -> float:
        """Remember a failure; returns the time until which `key` is blocked."""
        count, until = self._kept.pop(key, (0, 0.0))
        if now > until + self._longest:
            count = 0
        until = now + min(self._longest, self._first * float(1 << count))
        self._kept[key] = (min(count + 1, 30), until)
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return until

    def succeeded(self, key: K) -> None:
        self._kept.pop(key, None)

    def __len__(self) -> int:
        return len(self._kept)
