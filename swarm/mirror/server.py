"""The registry face: connections of container runtimes, one request after another on each.

Participants: runtimes on this machine (or wherever `mirror.listen` reaches); the download service, which has the bytes; the
registries.  Goals: an answer or an error within seconds, bytes that were verified and no others, bodies at the speed of
`sendfile`.  Non-goals: pushes, TLS (it listens on loopback), content encodings (they would break digests and lengths).
"""

from __future__ import annotations

import socket
from functools import partial
from typing import Final

import structlog
import trio

from swarm import listening
from swarm.config import MirrorSettings
from swarm.mirror.edges import MirrorError
from swarm.mirror.paths import Kind
from swarm.mirror.pulls import Pulls
from swarm.mirror.requests import BadRequest, Request, RequestReader
from swarm.mirror.resolve import Contained
from swarm.mirror.routes import Answer, Blob, Routes, failure
from swarm.mirror.sending import BodyCut, ClientGone, Sender, Sent
from swarm.mirror.tally import Tally

log = structlog.get_logger(__name__)

HEAD_SECONDS: Final = 15.0
"""For the head of a request to arrive, however slowly a client drips it (slowloris)."""

IDLE_SECONDS: Final = 75.0
"""A connection without a request; runtimes keep theirs for 90 s at most, and open another at once."""

BACKLOG: Final = 1024
RECEIVE_BYTES: Final = 16 * 1024

LINGER_SECONDS: Final = 1.0
LINGER_BYTES: Final = 256 * 1024
"""After an error that closes the connection, what the client is still sending is read for so long: closing at once would
reset the connection and take the answer with it."""

BUSY: Final = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"


def listen(settings: MirrorSettings) -> socket.socket | None:
    """Bind now, so that a port in use is said at start; `None` if the mirror is off.

    Raises:
        ConfigError: The address is in use or not ours.
    """
    return listening.listen(
        settings.listen,
        refusal="the mirror cannot listen on {}",
        advice="choose another address with --mirror",
        backlog=BACKLOG,
    )


class MirrorServer:
    """Connections.  `run` it."""

    def __init__(self, routes: Routes, service: Contained, settings: MirrorSettings, tally: Tally, pulls: Pulls) -> None:
        self._routes = routes
        self._service = service
        self._settings = settings
        self._tally = tally
        self._pulls = pulls
        self._busy = 0
        self._idle = trio.Event()
        self._accepting = trio.CancelScope()
        self._draining = False

    async def run(self, listener: socket.socket) -> None:
        """Answer until cancelled; the listener is closed then, or by `drain`."""
        async with trio.open_nursery() as handlers:
            with self._accepting:
                faces = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
                await trio.serve_listeners(self._accepted, faces, handler_nursery=handlers)

    async def drain(self) -> None:
        """Take no further connection and no further request, and wait for the answers under way."""
        self._draining = True
        self._accepting.cancel()
        while self._busy:
            self._idle = trio.Event()
            await self._idle.wait()

    async def _accepted(self, stream: trio.SocketStream) -> None:
        if self._tally.clients >= self._settings.clients:
            with trio.move_on_after(LINGER_SECONDS):
                await _try(stream, BUSY)
            await trio.aclose_forcefully(stream)
            return
        self._tally.clients += 1
        try:
            await self._converse(stream)
        except (ClientGone, OSError, trio.BrokenResourceError):
            log.debug("mirror_client_gone")
        except Exception:  # the one per connection: a bug met by one client must not end the node for all
            log.exception("mirror_connection_failed")
        finally:
            self._tally.clients -= 1
            await trio.aclose_forcefully(stream)

    async def _converse(self, stream: trio.SocketStream) -> None:
        reader = RequestReader()
        sender = Sender(stream, reader, self._service, self._settings.body_timeout)
        client = str(stream.socket.getpeername()[0])
        while True:
            try:
                request = await self._next_request(stream, reader)
            except BadRequest as error:
                await self._refuse(stream, error)
                return
            if request is None:
                return
            if not await self._serve(sender, request, client) or not reader.may_continue or self._draining:
                return

    async def _serve(self, sender: Sender, request: Request, client: str) -> bool:
        """Answer one request; `False` where the connection cannot go on."""
        self._busy += 1
        try:
            return await self._answer(sender, request, client)
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def _answer(self, sender: Sender, request: Request, client: str) -> bool:
        began = trio.current_time()
        if request.method == "GET" and (b"/blobs/" in request.target or b"/resolve/" in request.target):
            # May take seconds, and a download must not go on for somebody who has left.
            answer = await sender.unless_gone(partial(self._routes.answer, request))
        else:
            answer = await self._routes.answer(request)
        sent = Sent()
        outcome = "ok"
        try:
            await sender.send(answer, sent)
            return True
        except ClientGone:
            outcome = "client left"
            raise
        except BodyCut as error:
            outcome = str(error)
            self._tally.cut[type(error.__cause__).__name__ if error.__cause__ is not None else "stalled"] += 1
            log.warning("mirror_body_cut", reason=outcome, sent=sent.total, length=answer.length, **_named(answer))
            return False
        finally:
            self._account(request, answer, sent, began, outcome, client)

    def _account(self, request: Request, answer: Answer, sent: Sent, began: float, outcome: str, client: str) -> None:
        if isinstance(answer.body, Blob):
            label = self._tally.label(answer.registry)
            for source, count in sent.sources.items():
                self._tally.sent[label, source] += count
            if sent.first_byte is not None:
                self._tally.first_byte.observe(sent.first_byte - began)
        elif answer.kind == Kind.FILE.value and answer.body:
            self._tally.sent[self._tally.label(answer.registry), "origin"] += len(answer.body)  # read past the swarm
        self._pulls.answered(client, request.method, answer, sent, began, trio.current_time(), outcome)
        log.debug(
            "mirror_answer",
            method=request.method,
            status=answer.status,
            bytes=sent.total,
            seconds=round(trio.current_time() - began, 4),
            outcome=outcome,
            **_named(answer),
        )

    async def _next_request(self, stream: trio.SocketStream, reader: RequestReader) -> Request | None:
        """The next request; `None` if the client is done, or says nothing.

        Raises:
            BadRequest: It cannot be read.
        """
        deadline = trio.current_time() + IDLE_SECONDS
        begun = False
        while (request := reader.next_request()) is None:
            if reader.pending and not begun:
                begun, deadline = True, trio.current_time() + HEAD_SECONDS
            with trio.move_on_at(deadline) as scope:
                try:
                    data = await stream.receive_some(RECEIVE_BYTES)
                except trio.BrokenResourceError:
                    return None
                if not data:
                    return None
                reader.receive(data)
            if scope.cancelled_caught:
                if begun:
                    raise BadRequest(408, "the head of the request did not arrive in time")
                return None
        return request

    async def _refuse(self, stream: trio.SocketStream, error: BadRequest) -> None:
        """Say what is wrong and close; the rest of what was sent is not read as requests."""
        answer = failure(MirrorError(error.status, "UNSUPPORTED", str(error)), None)
        self._tally.answers["", "none", error.status] += 1
        log.debug("mirror_bad_request", status=error.status, reason=str(error))
        assert isinstance(answer.body, bytes)  # noqa: S101 - a failure has no blob
        head = f"HTTP/1.1 {error.status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(answer.body)}\r\n"
        with trio.move_on_after(LINGER_SECONDS):
            await _try(stream, head.encode() + b"Connection: close\r\n\r\n" + answer.body)
            await _drain(stream)


def _named(answer: Answer) -> dict[str, str]:
    target = answer.target
    if target is None or target.name is None:
        return {}
    return {"image": str(target.name), "reference": target.reference}


async def _try(stream: trio.SocketStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
        await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


async def _drain(stream: trio.SocketStream) -> None:
    left = LINGER_BYTES
    try:
        while left > 0 and (data := await stream.receive_some(RECEIVE_BYTES)):
            left -= len(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
