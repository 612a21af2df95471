"""A node inside a command: the same composition as the daemon's, in a thread of its own, for as long as the command needs it.

It listens on ephemeral ports, uses the same store and opens the control socket, so that a second command joins it.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from functools import partial
from typing import Final

import trio

from swarm.config import Settings
from swarm.daemon import Stop, flatten, run_node
from swarm.logs import configure
from swarm.quantities import Endpoint

LEAVE_SECONDS: Final = 5.0
"""How long withdrawing and flushing may take once the command is done or interrupted."""


class EmbeddedNode:
    """Runs from `__enter__` (ready, or its error is raised) to `__exit__` (flushed and gone)."""

    def __init__(self, settings: Settings) -> None:
        listen = settings.network.listen
        host = listen.host if listen is not None else "::" if settings.network.directory is not None else "127.0.0.1"
        self._settings = replace(
            settings,
            network=replace(settings.network, listen=Endpoint(host, 0)),
            http=replace(settings.http, listen=None),
            drain=min(settings.drain, LEAVE_SECONDS),
        )
        self._thread = threading.Thread(target=self._run, name="swarm-node")
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._stop: Stop | None = None
        self._token: trio.lowlevel.TrioToken | None = None

    def __enter__(self) -> EmbeddedNode:
        configure("warning", self._settings.log.format)
        self._thread.start()
        try:
            self._ready.wait()
            self.check()
        except BaseException:
            self._leave(at_once=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._leave(at_once=kind is not None)
        except KeyboardInterrupt:  # a second Ctrl-C, or the first while others were still waited for
            self._leave(at_once=True)
            raise

    def check(self) -> None:
        """Raise what ended the node, if something did.

        Raises:
            SwarmError: What it says.
        """
        if self._error is not None:
            raise self._error

    def _leave(self, *, at_once: bool) -> None:
        """Stop: at once, or when the other commands that joined have their files."""
        if self._token is not None and self._stop is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(partial(self._stop.ask, at_once=at_once))
        self._thread.join()

    def _run(self) -> None:
        try:
            with flatten():
                trio.run(self._main)
        except BaseException as error:  # handed to the command's own thread, which reports it
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._stop = Stop()
        self._token = trio.lowlevel.current_trio_token()
        await run_node(self._settings, stop=self._stop, ready=lambda _: self._ready.set(), wait_for_commands=True)
