"""nginx as the origin: `sendfile`, strong ETags, ranges, and an access log from which copies are counted.

*Origin copies* of a file = bytes of its content that the origin handed to its sockets / length of the file.  A reader
that goes away makes that a slight overcount, never an undercount; the bytes through the origin's interface, headers
and retransmissions included, are the cross-check.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.system.hosts import Hosts, make_directory

PORT: Final = 8080
MIB: Final = 1 << 20

_CONFIG: Final = """
daemon off;
user root;
worker_processes 1;
pid {root}/nginx.pid;
error_log {root}/error.log warn;
events {{ worker_connections 1024; }}
http {{
  log_format requests escape=json
    '{{"method":"$request_method","path":"$uri","range":"$http_range","status":$status,'
    '"sent":$body_bytes_sent,"from":"$remote_addr","agent":"$http_user_agent","time":$msec}}';
  access_log {root}/access.log requests;
  sendfile on;
  tcp_nopush on;
  keepalive_timeout 30;
  client_body_temp_path {root}/body;
  proxy_temp_path {root}/proxy;
  fastcgi_temp_path {root}/fastcgi;
  uwsgi_temp_path {root}/uwsgi;
  scgi_temp_path {root}/scgi;
  default_type application/octet-stream;
  server {{
    {listen}
    root {root}/files;
    location = /to-metadata {{ return 302 http://169.254.169.254/latest/meta-data/; }}
    location = /forbidden {{ return 403; }}
    location = /unauthorized {{ return 401; }}
    location = /broken {{ return 503; }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the access log."""

    method: str
    path: str
    range: str
    status: int
    sent: int
    sender: str
    time: float


@dataclass(frozen=True, slots=True)
class File:
    """Content the origin serves.

    Attributes:
        path: Where it lies on this machine.
        digest: ``sha256:...`` of it.
    """

    name: str
    path: Path
    length: int
    digest: str


class OriginFailed(Exception):
    """nginx did not start; the message is its error log."""


class NginxOrigin:
    """nginx in host 0 of `hosts`, or on loopback without hosts; use it with `with`.

    Its files lie in memory by default (`/dev/shm`), so that twenty hosts on one machine measure links, not one disk.
    """

    def __init__(self, hosts: Hosts | None = None, *, parent: Path = Path("/dev/shm")) -> None:
        self._hosts = hosts
        self._parent = parent
        self._root = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._seen = 0  # bytes of the access log before the last `forget`
        self.base = ""

    def __enter__(self) -> NginxOrigin:
        self._root = make_directory("origin", self._parent)
        try:
            (self._root / "files").mkdir()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._root, ignore_errors=True)

    # --- serving --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._hosts is None:
            port = _free_port()
            self.base, listen = f"http://127.0.0.1:{port}", f"listen 127.0.0.1:{port};"
        else:
            self.base = f"http://{self._hosts.endpoint(0, PORT)}"
            listen = f"listen {PORT}; listen [::]:{PORT};"
        config = self._root / "nginx.conf"
        config.write_text(_CONFIG.format(root=self._root, listen=listen))
        argv = ["nginx", "-e", f"{self._root}/error.log", "-p", str(self._root), "-c", str(config)]
        command = argv if self._hosts is None else self._hosts.command(0, argv)
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._wait_pid_file()

    def _wait_pid_file(self) -> None:
        """nginx writes its pid after it has bound its ports."""
        assert self._process is not None
        deadline = time.monotonic() + 10
        while not (self._root / "nginx.pid").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise OriginFailed((self._root / "error.log").read_text())
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop nginx, so that nobody can read the origin any more; the files and the log stay."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)
        self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # --- files ----------------------------------------------------------------------------------------------------

    def add(self, name: str, length: int, seed: int = 1) -> File:
        """Serve `length` random bytes, the same for the same seed."""
        path = self._root / "files" / name
        digest, source, left = hashlib.sha256(), random.Random(seed), length
        with path.open("wb") as file:
            while left:
                chunk = source.randbytes(min(left, 4 * MIB))
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
        return File(name, path, length, f"sha256:{digest.hexdigest()}")

    def url(self, name: str) -> str:
        return f"{self.base}/{name}"

    # --- counting -------------------------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        """The requests that ended since the last `forget`, in that order; nginx logs a request when it ends."""
        with (self._root / "access.log").open("rb") as log:
            log.seek(self._seen)
            return [_parse(line) for line in log if line.endswith(b"\n")]

    def forget(self) -> None:
        """Count from here."""
        self._seen = (self._root / "access.log").stat().st_size

    def reads(self, name: str) -> list[Request]:
        """The requests of one file that carried bytes of it."""
        return [it for it in self.requests() if it.path == f"/{name}" and it.status in (200, 206) and it.sent]

    def copies(self, file: File) -> float:
        """How many copies of a file the origin has sent since the last `forget`."""
        return sum(it.sent for it in self.reads(file.name)) / file.length


def _parse(line: bytes) -> Request:
    it = json.loads(line)
    return Request(it["method"], it["path"], it["range"], it["status"], it["sent"], it["from"], it["time"])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
