"""Real daemons and commands as processes, and an origin in a thread, for the tests of this directory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

SWARM: Final = [sys.executable, "-m", "cli.main"]
TIMEOUT: Final = 30


def environment(**more: str) -> dict[str, str]:
    """No setting of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    return {
        **kept,
        "SWARM_ORIGIN_RETRY_SECONDS": "0.5",
        "SWARM_ORIGIN_STALL_TIMEOUT": "2s",
        "SWARM_STORE_MIN_FREE": "1MiB",
        **more,
    }


def swarm(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [*SWARM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment(**more))


def spawn(*arguments: object, **more: str) -> subprocess.Popen[str]:
    """Start a command."""
    command = [*SWARM, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more))


class Daemon:
    """A `swarm daemon` on loopback and free ports, ready when made."""

    def __init__(self, data_dir: Path, *options: str, http: str = "off", network: Sequence[str] = (), **more: str) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_name(data_dir.name + ".log")
        reading, writing = os.pipe()
        network = network or ("--open-network", "test")
        fixed = ["--data-dir", str(data_dir), "--listen", "127.0.0.1:0", "--http", http, *network, "--ready-fd", str(writing)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*SWARM, "daemon", *fixed, *options],
                stdin=subprocess.DEVNULL,
                stderr=log,
                stdout=log,
                pass_fds=[writing],
                env=environment(**more),
            )
        os.close(writing)
        timer = threading.Timer(TIMEOUT, self.process.kill)
        timer.start()
        with os.fdopen(reading) as stream:
            line = stream.readline()
        timer.cancel()
        if not line:
            self.process.wait()
            raise AssertionError(f"not ready: {self.log.read_text()}")
        self.status: dict[str, Any] = json.loads(line)

    @property
    def control(self) -> str:
        return str(self.status["control"])

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def fetch(self, url: str, target: Path, *options: str) -> dict[str, Any]:
        """The object of a fetch, good or bad."""
        ended = swarm("fetch", url, "-o", target, "--data-dir", self.data_dir, "--json", *options)
        assert "Traceback" not in ended.stderr
        said: dict[str, Any] = json.loads(ended.stdout)
        return said

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Origin:
    """A web server in a thread: `files` by path, `statuses` by path; `hold` stops bodies half way until it is cleared."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.statuses: dict[str, int] = {}
        self.etags: dict[str, str] = {}
        self.sent = 0
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.flowing = threading.Event()
        self.flowing.set()
        self.reached = threading.Event()
        self.free_bytes = 1 << 20
        self._lock = threading.Lock()
        origin = self

        class Handler(_Handler):
            pass

        Handler.origin = origin
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def hold(self) -> None:
        """From now on bodies stop after `free_bytes` in all; `reached` is set when one did."""
        self.flowing.clear()

    def count(self, sent: int) -> None:
        with self._lock:
            self.sent += sent
            over = self.sent > self.free_bytes and not self.flowing.is_set()
        if over:
            self.reached.set()
            self.flowing.wait(TIMEOUT)

    def __enter__(self) -> Origin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.flowing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    origin: Origin

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        origin = self.origin
        origin.requests.append((self.command, self.path, dict(self.headers)))
        status = origin.statuses.get(self.path, 200 if self.path in origin.files else 404)
        content = origin.files.get(self.path, b"")
        if status != 200:
            self._head(status, 0)
            return
        start, stop = 0, len(content)
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(len(content), int(last) + 1 if last else len(content)), 206
        extra = {"ETag": origin.etags.get(self.path, '"1"'), "Accept-Ranges": "bytes"}
        if status == 206:
            extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._head(status, stop - start, **extra)
        while body and start < stop:
            part = content[start : min(stop, start + 65536)]
            origin.count(len(part))
            self.wfile.write(part)
            start += len(part)

    def _head(self, status: int, length: int, **extra: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **extra}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def notify_socket(path: Path) -> Iterator[socket.socket]:
    """What systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(path))
        channel.settimeout(TIMEOUT)
        yield channel
