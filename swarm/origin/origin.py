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
from swarm.errors import NotPermitted
from swarm.origin.answers import Answer
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

    async def ask(
        self, source: Source, method: str = "GET", *, accept: frozenset[int], max_bytes: int = 0, form: bytes = b""
    ) -> Answer:
        """One question to an http(s) source, its answer as a whole: what a registry says beside contents.

        Args:
            accept: Statuses that are an answer; others are failures, as in `head`.  A redirect among them is not followed.
            max_bytes: A longer body is an error.
            form: URL-encoded body of a POST, which no redirect takes anywhere.

        Raises:
            OriginError, NotPermitted: As `edges.Origin.head`.
        """
        origin = self._origin(source)
        if isinstance(origin, FileOrigin):
            raise NotPermitted("a file answers no questions; give an http:// or https:// URL")
        return await origin.ask(source, method, accept=accept, max_bytes=max_bytes, form=form)

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
