"""The node's HTTP face: metrics, health and read-only views.

Nothing here changes anything; whatever does goes through the control socket.  It answers `GET` and `HEAD` under its own
address only: a Host header somebody else's web page could cause (DNS rebinding) and any `Origin` are refused, so that a
browser on this machine is no way in.

Starlette and hypercorn are imported when the first client connects.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from swarm import __version__, listening
from swarm.config import HttpSettings
from swarm.errors import SwarmError
from swarm.metrics import CONTENT_TYPE, Measured, exposition

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MAX_CONNECTIONS: Final = 64
"""At one time; what comes beyond is closed at once, so that scrapers and strangers leave descriptors for peers."""

MAX_HEAD_BYTES: Final = 16 * 1024
IDLE_SECONDS: Final = 10
"""A client that has not asked by then, or not again, is not kept, however slowly it goes on sending (slowloris)."""

BACKLOG: Final = 64

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class Node(Measured, Protocol):
    """What the HTTP face shows.  Names of tasks are as people give them."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests: started, and not stopping."""
        ...

    def status(self) -> dict[str, Any]: ...
    def tasks(self) -> list[dict[str, Any]]: ...
    def task(self, name: str) -> dict[str, Any]: ...
    def peers(self) -> list[dict[str, Any]]: ...


def listen(settings: HttpSettings) -> socket.socket | None:
    """Bind now, so that a port in use is said at start; `None` if the face is off.

    Raises:
        ConfigError: The address is in use or not ours.
    """
    advice = "choose another address with --http, or --http off"
    return listening.listen(settings.listen, refusal="cannot listen on {} for HTTP", advice=advice, backlog=BACKLOG)


async def serve(node: Node, listener: socket.socket, settings: HttpSettings) -> None:
    """Answer requests until cancelled; the listener is closed then.

    The server is imported, in a thread, when the first client connects: a node nobody asks does without its 5 MiB.
    """
    with listener:
        await trio.lowlevel.wait_readable(listener)
        handle = await trio.to_thread.run_sync(_server, node, settings)
        active = 0

        async def answer(stream: trio.SocketStream) -> None:
            nonlocal active
            if active >= MAX_CONNECTIONS:
                await stream.aclose()
                return
            active += 1
            try:
                await handle(stream)
            finally:
                active -= 1

        await trio.serve_listeners(answer, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


def _server(node: Node, settings: HttpSettings) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """What answers one connection.  Not `hypercorn.trio.serve`, which accepts without bound."""
    from hypercorn.app_wrappers import ASGIWrapper
    from hypercorn.config import Config
    from hypercorn.trio.tcp_server import TCPServer
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import ConnectionState

    config = Config()
    config.accesslog = config.errorlog = None
    config.h11_max_incomplete_size = MAX_HEAD_BYTES
    config.keep_alive_timeout = IDLE_SECONDS
    config.include_server_header = False
    application = ASGIWrapper(guarded(application_for(node), settings.hosts))  # type: ignore[arg-type]  # plain ASGI types
    context = WorkerContext(None)

    async def handle(stream: trio.SocketStream) -> None:
        await TCPServer(application, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]  # it takes both

    return handle


def guarded(application: Asgi, hosts: tuple[str, ...]) -> Asgi:
    """Refuse what a web page of somebody else could make a browser send (SECURITY: T17)."""
    allowed = frozenset(host.lower() for host in (*hosts, "localhost"))

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        named = [value for name, value in headers if name == b"host"]
        if len(named) != 1 or not _is_allowed(named[0], allowed):
            await _refuse(send, 403, "this node does not answer under that name; see http.hosts")
        elif any(name == b"origin" for name, _ in headers):
            await _refuse(send, 403, "requests from web pages are refused")
        else:
            await application(scope, receive, send)

    return guard


def _is_allowed(host_untrusted: str, allowed: frozenset[str]) -> bool:
    """A literal address cannot be rebound; a name must be one of ours."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?", host_untrusted)
    if match is None:
        return False
    try:
        ipaddress.ip_address(match[1] or match[2])
    except ValueError:
        return match[2] is not None and match[2].lower().rstrip(".") in allowed
    return True


async def _refuse(send: Send, status: int, text: str) -> None:
    body = text.encode() + b"\n"
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def application_for(node: Node) -> Starlette:
    """The routes."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    safe = {"x-content-type-options": "nosniff", "cache-control": "no-store", "cross-origin-resource-policy": "same-origin"}

    def view(read: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                return JSONResponse(read(request), headers=safe)
            except SwarmError as error:
                return JSONResponse({"error": error.kind, "message": str(error)}, status_code=404, headers=safe)

        return answer

    async def metrics(_: Request) -> Response:
        return Response(exposition(node), media_type=CONTENT_TYPE, headers=safe)

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok\n", headers=safe)

    async def ready(_: Request) -> Response:
        return PlainTextResponse(
            "ready\n" if node.is_ready else "not ready\n", status_code=200 if node.is_ready else 503, headers=safe
        )

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/healthz", health),
            Route("/readyz", ready),
            Route("/v1/status", view(lambda _: node.status())),
            Route("/v1/tasks", view(lambda _: {"tasks": node.tasks()})),
            Route("/v1/tasks/{task}", view(lambda request: node.task(request.path_params["task"]))),
            Route("/v1/peers", view(lambda _: {"peers": node.peers()})),
            Route("/v1/openapi.json", view(lambda _: OPENAPI)),
        ]
    )


def _operation(
    summary: str, content: str = "application/json", more: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": summary, "content": {content: {}}}, **more}}}


OPENAPI: Final[dict[str, Any]] = {
    "openapi": "3.1.0",
    "info": {"title": "swarm node", "version": __version__, "description": "Read-only; changes go through the control socket."},
    "paths": {
        "/metrics": _operation("Metrics in the Prometheus text format", "text/plain"),
        "/healthz": _operation("The process answers", "text/plain"),
        "/readyz": _operation("The node takes requests", "text/plain", {"503": {"description": "Starting or stopping"}}),
        "/v1/status": _operation("What the node says about itself"),
        "/v1/tasks": _operation("Tasks in the store"),
        "/v1/tasks/{task}": {
            **_operation("One task, with what it is doing", more={"404": {"description": "No such task"}}),
            "parameters": [{"name": "task", "in": "path", "required": True, "schema": {"type": "string"}}],
        },
        "/v1/peers": _operation("Members this node is connected to"),
        "/v1/openapi.json": _operation("This description"),
    },
}
