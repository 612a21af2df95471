"""The demo's origin: a small web server that serves one file, no faster than told, and counts what it sends."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

CHUNK_BYTES: Final = 64 * 1024
BURST_SECONDS: Final = 0.1
"""Credit kept for a reader that pauses: shorter loses rate to scheduling, longer hides the limit."""


class Throttle:
    """A shared rate: all connections together get no more than that."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()

    def wait_for(self, count: int) -> float:
        """Reserve room for `count` bytes; seconds to wait before sending them."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now - BURST_SECONDS) + count / self._rate
            return max(0.0, self._free_at - now)


class DemoOrigin:
    """Serves `path` at `url` in threads of its own from `__enter__` to `__exit__`.

    Attributes:
        sent: Body bytes given out.
        reads: GET requests answered.
    """

    def __init__(self, path: Path, etag: str, rate: float) -> None:
        self.path = path
        self.length = path.stat().st_size
        self.etag = f'"{etag}"'
        self.sent = 0
        self.reads = 0
        self.throttle = Throttle(rate)
        self._lock = threading.Lock()
        origin = self

        class Handler(_Handler):
            pass

        Handler.origin = origin
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{self.path.name}"

    def count(self, sent: int = 0, reads: int = 0) -> None:
        with self._lock:
            self.sent += sent
            self.reads += reads

    def __enter__(self) -> DemoOrigin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    origin: DemoOrigin

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a reader that goes away is no news
            super().handle()

    def do_HEAD(self) -> None:
        self._head(200, 0, self.origin.length)

    def do_GET(self) -> None:
        length = self.origin.length
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.headers.get("If-Range", self.origin.etag) != self.origin.etag:
            self._head(200, 0, length)
            self._send(0, length)
            return
        start, stop = int(wanted[1]), min(length, int(wanted[2]) + 1 if wanted[2] else length)
        if start >= stop:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{length}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._head(206, start, stop)
        self._send(start, stop)

    def _head(self, status: int, start: int, stop: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", self.origin.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{self.origin.length}")
        self.end_headers()

    def _send(self, start: int, stop: int) -> None:
        self.origin.count(reads=1)
        with self.origin.path.open("rb") as file:
            file.seek(start)
            while start < stop:
                data = file.read(min(CHUNK_BYTES, stop - start))
                time.sleep(self.origin.throttle.wait_for(len(data)))
                self.origin.count(sent=len(data))
                try:
                    self.wfile.write(data)
                except OSError:  # the reader went away
                    self.close_connection = True
                    return
                start += len(data)

    def log_message(self, format: str, *args: object) -> None:
        """The demo prints its own table."""
