"""`edges.Origin` over the schemes there are."""

from __future__ import annotations

import importlib
import random
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from swarm.edges import OriginBody, OriginInfo, Source
from swarm.egress import EgressPolicy
from swarm.origin.local import FileOrigin
from swarm.origin.settings import Metrics, NoMetrics, OriginSettings
from swarm.task import split_url

if TYPE_CHECKING:
    from swarm.origin.http import HttpOrigin

__all__ = ["OriginReader", "OriginSettings"]


class OriginReader:
    """Reads origins under the egress policy, with retries inside.  Use it in `async with`, or `aclose` it.

    Args:
        egress: Decides on every dial and redirect.
        settings: Section `[origin]`.
        metrics: Counts answers and retries.
        rng: For the jitter of retries; give a seeded one to repeat a run.
    """

    def __init__(
        self,
        egress: EgressPolicy,
        settings: OriginSettings | None = None,
        metrics: Metrics | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._egress = egress
        self._settings = settings or OriginSettings()
        self._metrics = metrics or NoMetrics()
        self._rng = rng or random.Random()
        self._file = FileOrigin()
        self._http: HttpOrigin | None = None

    async def head(self, source: Source) -> OriginInfo:
        """See `edges.Origin.head`."""
        return await self._origin(source).head(source)

    def read(
        self, source: Source, start: int = 0, stop: int | None = None, *, expect: OriginInfo | None = None
    ) -> AbstractAsyncContextManager[OriginBody]:
        """See `edges.Origin.read`."""
        return self._origin(source).read(source, start, stop, expect=expect)

    async def warm(self) -> None:
        """Load the HTTP stack now, in a thread, so that the first fetch need not: a tenth of a second of CPU on each node."""
        await trio.to_thread.run_sync(importlib.import_module, "swarm.origin.http")

    async def aclose(self) -> None:
        """Close every connection, also those in use."""
        if self._http is not None:
            await self._http.aclose()

    async def __aenter__(self) -> OriginReader:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _origin(self, source: Source) -> FileOrigin | HttpOrigin:
        if split_url(source.url).scheme == "file":
            return self._file
        if self._http is None:
            from swarm.origin.http import HttpOrigin  # a tenth of a second that start-up does without, see `warm`

            self._http = HttpOrigin(self._egress, self._settings, self._metrics, self._rng)
        return self._http
