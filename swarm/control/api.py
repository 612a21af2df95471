"""The node's side of the control socket."""

from __future__ import annotations

import array
import contextlib
import os
import socket as stdlib_socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
import trio

from swarm.control.arriving import Arriving, Told
from swarm.control.protocol import (
    MAX_REQUEST_BYTES,
    SOCKET_NAME,
    decode_line,
    encode_line,
    error_message,
    reachable_path,
)
from swarm.control.views import fetched_view, progress_view
from swarm.download.request import Fetched, FetchRequest, Progress
from swarm.edges import Source
from swarm.errors import ConfigError, LocalProtocolError, StoreError, SwarmError
from swarm.task import Digest, split_url

log = structlog.get_logger(__name__)

MAX_CONNECTIONS: Final = 256
"""Commands waiting at one time; each costs a descriptor or two, and the node needs the rest for peers."""

REQUEST_SECONDS: Final = 10.0
"""A client that connected and says nothing is not kept."""

PROGRESS_SECONDS: Final = 0.2
"""At most five progress lines a second: as often as a person can see."""

ARRIVING_SECONDS: Final = 1.0
"""How often a command is told what can be copied: what is left at the end is copied in a fraction of this."""

BACKLOG: Final = 128
MAX_HEADERS: Final = 64
"""Extra request headers of one fetch; more than any origin takes."""


class Content(Protocol):
    """Finished content, open for reading until `close`."""

    @property
    def path(self) -> Path | None:
        """Where it lies, for a hard link."""
        ...

    def open_read_only(self) -> int:
        """A new descriptor, which the caller closes."""
        ...

    def close(self) -> None: ...


class Node(Protocol):
    """What the control socket asks of the node.  Names of tasks are as people give them."""

    async def fetch(
        self,
        request: FetchRequest,
        progress: Callable[[Progress], None] | None,
        opened: Callable[[Arriving | None], None] | None,
    ) -> tuple[Fetched, Content]: ...
    def status(self) -> dict[str, Any]: ...
    def tasks(self) -> list[dict[str, Any]]: ...
    def task(self, name: str) -> dict[str, Any]: ...
    def peers(self) -> list[dict[str, Any]]: ...
    def pin(self, name: str, pinned: bool) -> dict[str, Any]: ...
    async def remove(self, name: str) -> dict[str, Any]: ...
    async def pull_image(self, image: str, platform: str | None) -> dict[str, Any]: ...
    async def images(self) -> list[dict[str, Any]]: ...
    async def check_origin(self, url: str) -> dict[str, Any]: ...


class ControlServer:
    """Accepts commands on `<data dir>/control.sock`.

    The caller holds the store's lock on the data directory: that, not the socket file, is what keeps a second node away,
    so a socket left behind by a killed node is simply replaced.
    """

    def __init__(self, node: Node, data_dir: Path) -> None:
        self._node = node
        self._path = data_dir / SOCKET_NAME
        self._active = 0
        self._idle = trio.Event()
        self._idle.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then the socket file is gone.

        Raises:
            StoreError: The socket cannot be made.
        """
        listener, inode = self._listen()
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    connection, _ = await listener.accept()
                    if self._active >= MAX_CONNECTIONS:
                        connection.close()  # the command reads it as a node that went away, and says so
                        continue
                    self._active += 1
                    self._idle = trio.Event() if self._active == 1 else self._idle
                    nursery.start_soon(self._serve, connection)
        finally:
            listener.close()
            self._unlink(inode)

    @property
    def active(self) -> int:
        """Commands being answered."""
        return self._active

    async def wait_idle(self) -> None:
        """Wait until no command is being answered."""
        while self._active:
            await self._idle.wait()

    def _listen(self) -> tuple[trio.socket.SocketType, int]:
        """Bind under another name and rename: whoever finds the socket can connect to it, and a stale one is replaced."""
        temporary = self._path.with_name(f".{SOCKET_NAME}.{os.getpid()}")
        listener = trio.socket.from_stdlib_socket(_bound(temporary, self._path))
        return listener, self._path.stat().st_ino

    def _unlink(self, inode: int) -> None:
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == inode:
                self._path.unlink()

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        try:
            with connection:
                await _Conversation(self._node, connection).run()
        except (OSError, trio.BrokenResourceError):
            log.debug("control connection broke")
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()


def _bound(temporary: Path, path: Path) -> stdlib_socket.socket:
    listener = stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        temporary.unlink(missing_ok=True)
        with reachable_path(temporary) as name:
            listener.bind(name)
        listener.listen(BACKLOG)
        temporary.rename(path)
    except OSError as error:
        listener.close()
        raise StoreError(f"cannot make the control socket {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    return listener


class _Conversation:
    """One connection: read the request, answer it, stop when the client goes away."""

    def __init__(self, node: Node, connection: trio.socket.SocketType) -> None:
        self._node = node
        self._connection = connection

    async def run(self) -> None:
        line = await self._read_line()
        if line is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, nursery.cancel_scope)
            await self._answer(line)
            nursery.cancel_scope.cancel()

    async def _read_line(self) -> bytes | None:
        buffer = bytearray()
        with trio.move_on_after(REQUEST_SECONDS):
            while len(buffer) <= MAX_REQUEST_BYTES:
                data = await self._connection.recv(64 * 1024)
                if not data:
                    return None
                buffer += data
                line, found, rest = buffer.partition(b"\n")
                if found and not rest:
                    return bytes(line)
                if found:
                    break
            await self._send(error_message(LocalProtocolError("one request of at most 256 KiB on each connection")))
        return None

    async def _cancel_when_gone(self, scope: trio.CancelScope) -> None:
        """The client sends nothing after its request: whatever comes is the end, or somebody who does not know the protocol."""
        with contextlib.suppress(OSError):
            await self._connection.recv(1)
        scope.cancel()

    async def _answer(self, line_untrusted: bytes) -> None:
        try:
            request = decode_line(line_untrusted)
            if request.get("op") == "fetch":
                await self._fetch(request)
            else:
                await self._send({"result": await self._simple(request)})
        except SwarmError as error:
            await self._send_if_there(error_message(error))
        except OSError:
            log.debug("control client went away")
        except Exception:  # the one per connection: a bug met by one command must not end the node for all
            log.exception("control request failed")
            await self._send_if_there(error_message(SwarmError("the daemon failed to answer; its log says why")))

    async def _send_if_there(self, message: dict[str, Any], descriptor: int = -1) -> None:
        with contextlib.suppress(OSError):
            await self._send(message, descriptor)

    async def _simple(self, request: dict[str, Any]) -> Any:
        node = self._node
        match request.get("op"):
            case "status":
                return node.status()
            case "tasks":
                return {"tasks": node.tasks()}
            case "task":
                return node.task(_text(request, "name"))
            case "peers":
                return {"peers": node.peers()}
            case "pin" | "unpin" as operation:
                return node.pin(_text(request, "name"), operation == "pin")
            case "rm":
                return await node.remove(_text(request, "name"))
            case "image-pull":
                return await node.pull_image(
                    _text(request, "image"), _text(request, "platform") if request.get("platform") is not None else None
                )
            case "images":
                return {"images": await node.images()}
            case "check-origin":
                return await node.check_origin(_text(request, "url"))
            case other:
                raise ConfigError(f"the daemon does not know the request {other!r}; is it older than this command?")

    async def _fetch(self, request: dict[str, Any]) -> None:
        early = request.get("early") is True and request.get("range") is None
        wait = _Wait(self._node, fetch_request(request), progress=bool(request.get("progress")), early=early)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait.run)
                # One writer: a line cut short would garble the next.
                async for message, descriptor in wait.messages():
                    try:
                        await self._send_if_there(message, descriptor)
                    finally:
                        if descriptor >= 0:
                            os.close(descriptor)
            fetched, content = wait.outcome()
            descriptor = content.open_read_only()
            try:
                result = {**fetched_view(fetched), "store_path": str(content.path) if content.path is not None else None}
                await self._send({"result": result}, descriptor)
            finally:
                os.close(descriptor)
        finally:
            wait.close()

    async def _send(self, message: dict[str, Any], descriptor: int = -1) -> None:
        data = memoryview(encode_line(message))
        if descriptor >= 0:
            rights = [(stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            data = data[await self._connection.sendmsg([data], rights) :]
        while data:
            data = data[await self._connection.send(data) :]


class _Wait:
    """One fetch that a client waits for: what is new while it runs, then how it ended."""

    def __init__(self, node: Node, request: FetchRequest, *, progress: bool, early: bool) -> None:
        self._node = node
        self._request = request
        self._wanted = progress
        self._early = early
        self._latest: Progress | None = None
        self._told: Told | None = None
        self._opened: Told | None = None
        self._news = trio.Event()
        self._done = trio.Event()
        self._result: tuple[Fetched, Content] | None = None
        self._error: SwarmError | None = None

    async def run(self) -> None:
        try:
            self._result = await self._node.fetch(
                self._request, self._tell if self._wanted else None, self._open if self._early else None
            )
        except SwarmError as error:
            self._error = error
        finally:
            self._done.set()
            self._news.set()

    def _tell(self, progress: Progress) -> None:
        self._latest = progress
        self._news.set()

    def _open(self, content: Arriving | None) -> None:
        for former in (self._told, self._opened):
            if former is not None:
                former.close()  # at once: what is in use is in the way of what follows
        self._told, self._opened = None, None if content is None else Told(content)
        self._news.set()

    async def messages(self) -> AsyncIterator[tuple[dict[str, Any], int]]:
        """Lines to send, each with -1 or a descriptor to close, no more often than a person can see, until the fetch ends."""
        looked = trio.current_time()
        while not self._done.is_set():
            with trio.move_on_at(looked + ARRIVING_SECONDS if self._told is not None else float("inf")):
                await self._news.wait()
            self._news = trio.Event()
            if self._opened is not None:
                for opening in self._opening(self._opened):
                    yield opening
            if self._done.is_set():
                break
            if self._latest is not None:
                yield {"progress": progress_view(self._latest)}, -1
                self._latest = None
            if self._told is not None and trio.current_time() >= looked + ARRIVING_SECONDS:
                looked = trio.current_time()
                for message in self._told.news():
                    yield message, -1
            with trio.move_on_after(PROGRESS_SECONDS):
                await self._done.wait()
        if self._told is not None:
            for message in self._told.losses():
                yield message, -1

    def _opening(self, opened: Told) -> Iterator[tuple[dict[str, Any], int]]:
        self._told, self._opened = opened, None
        try:
            yield opened.opening()
        except StoreError as error:  # it is copied at the end then, or fails there
            log.debug("content is not handed out early", reason=str(error))
            self._told.close()
            self._told = None

    def outcome(self) -> tuple[Fetched, Content]:
        """How it ended; `close` closes the content.

        Raises:
            SwarmError: It failed.
        """
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise LocalProtocolError("asked for the outcome of a fetch that has not ended")
        return self._result

    def close(self) -> None:
        for told in (self._told, self._opened):
            if told is not None:
                told.close()
        if self._result is not None:
            self._result[1].close()


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise LocalProtocolError(f"the request lacks {key}")
    return value


def fetch_request(request: dict[str, Any]) -> FetchRequest:
    """Check what a command asks to fetch.

    Raises:
        ConfigError: A URL, digest, header or range that cannot be.
        LocalProtocolError: Not what this version's command sends.
    """
    digest = Digest.parse(request["digest"]) if request.get("digest") else None
    url = request.get("url")
    if url is not None:
        split_url(_text(request, "url"))
    elif digest is None:
        raise LocalProtocolError("a fetch needs a URL or a digest")
    return FetchRequest(
        source=Source(url, headers=_headers(request.get("headers", []))) if url is not None else None,
        digest=digest,
        immutable=request.get("immutable") is True,
        share=request.get("share") is True,
        tag=str(request.get("tag", "")),
        application=str(request.get("application", "")),
        no_origin=request.get("no_origin") is True,
        byte_range=_byte_range(request.get("range")),
    )


_HEADER_NAME_CHARACTERS: Final = frozenset("!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
"""RFC 9110, 5.6.2: what a field name may hold."""


def _headers(value: Any) -> tuple[tuple[str, str], ...]:
    """A line break in a value would be a second header, or a second request."""
    if not isinstance(value, list) or len(value) > MAX_HEADERS:
        raise ConfigError(f"at most {MAX_HEADERS} headers can be given")
    headers = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise LocalProtocolError("headers are pairs of texts")
        name, content = pair
        if not name or not _HEADER_NAME_CHARACTERS.issuperset(name):
            raise ConfigError(f"not a header name: {name[:80]!r}; write --header 'Name: value'")
        if any(c in content for c in "\r\n\0"):
            raise ConfigError(f"the value of the header {name} holds a line break; put it on one line")
        headers.append((name, content))
    return tuple(headers)


def _byte_range(value: Any) -> tuple[int, int | None] | None:
    if value is None:
        return None
    match value:
        case [int(start), None] if start >= 0:
            return start, None
        case [int(start), int(stop)] if 0 <= start < stop:
            return start, stop
        case _:
            raise ConfigError("not a range: give --range FIRST-LAST, both counted from 0, or FIRST-")
