"""Reading an origin: CPU-seconds per GiB of this end, and MiB/s, against plain httpx and a bare socket.  Prints JSON.

    python -m tests.benchmarks.origin [--mib N] [--no-tls]

nginx serves a file from memory on loopback.  Every reader runs in a process of its own, so that none pays for another's
imports, and hashes nothing: what is measured is the reading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

MIB = 1024 * 1024
PIECE = 4 * MIB

NGINX = """
daemon off; pid {directory}/pid; error_log {directory}/log; worker_processes 1; master_process off;
events {{}}
http {{
  access_log off; sendfile on;
  client_body_temp_path {directory}/1; proxy_temp_path {directory}/2; fastcgi_temp_path {directory}/3;
  uwsgi_temp_path {directory}/4; scgi_temp_path {directory}/5;
  server {{ listen unix:{directory}/ready; }}
  server {{ listen 127.0.0.1:{port}; root {directory}/root; }}
  server {{ listen 127.0.0.1:{tls_port} ssl; root {directory}/root;
    ssl_certificate {directory}/server.pem; ssl_certificate_key {directory}/server.pem; }}
}}
"""


async def ours(url: str, ca: str, *, ranged: bool) -> int:
    """Through `OriginReader`, whole or in pieces of 4 MiB."""
    import logging

    import structlog

    from swarm.edges import Source
    from swarm.egress import EgressPolicy
    from swarm.origin.origin import OriginReader, OriginSettings

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    size = 0
    async with OriginReader(EgressPolicy(), OriginSettings(ca=(("localhost", ca),))) as reader:
        source = Source(url)
        info = await reader.head(source)
        length = info.length or 0
        for start in range(0, length, PIECE if ranged else length):
            async with reader.read(source, start, start + PIECE if ranged else None, expect=info) as body:
                async for chunk in body.chunks():
                    size += len(chunk)
    return size


async def httpx_raw(url: str, ca: str) -> int:
    import ssl

    import httpx

    size = 0
    context = ssl.create_default_context(cafile=ca)
    async with (
        httpx.AsyncClient(trust_env=False, verify=context) as client,
        client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
    ):
        async for chunk in response.aiter_raw():
            size += len(chunk)
    return size


async def bare_socket(url: str, ca: str) -> int:
    """The least that trio can do."""
    port = int(url.split(":")[2].split("/")[0])
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(b"GET /content HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    size = 0
    while data := await stream.receive_some(256 * 1024):
        size += len(data)
    await stream.aclose()
    return size


READERS = {
    "ours": lambda url, ca: ours(url, ca, ranged=False),
    "ours_ranged": lambda url, ca: ours(url, ca, ranged=True),
    "httpx": httpx_raw,
    "socket": bare_socket,
}


def read_once(reader: str, url: str, ca: str) -> None:
    """Body of a reader's process: print what it took, imports not counted."""
    import httpx  # noqa: F401
    import structlog  # noqa: F401

    import swarm.origin.http
    import swarm.origin.origin  # noqa: F401

    cpu, wall = time.process_time(), time.perf_counter()
    size = trio.run(READERS[reader], url, ca)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gib = size / (1024 * MIB)
    print(json.dumps({"cpu_seconds_per_gib": round(cpu / gib, 3), "mib_per_s": round(size / MIB / wall)}))


@contextlib.contextmanager
def nginx(mib: int) -> Iterator[tuple[str, str, str]]:
    """A running nginx: its http URL, its https URL and its authority's file."""
    import socket

    from tests.origin.test_tls import authority_file, server_context

    program = shutil.which("nginx") or "/usr/sbin/nginx"
    directory = Path(tempfile.mkdtemp(prefix="swarm-bench-origin-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        directory.chmod(0o755)
        (directory / "root").mkdir()
        with (directory / "root" / "content").open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))
        server_context(directory, "localhost")
        with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
            port, tls_port = a.getsockname()[1], b.getsockname()[1]
        (directory / "conf").write_text(NGINX.format(directory=directory, port=port, tls_port=tls_port))
        server = subprocess.Popen([program, "-c", str(directory / "conf")], stderr=subprocess.DEVNULL)
        try:
            _wait_for(port, server)
            yield f"http://localhost:{port}/content", f"https://localhost:{tls_port}/content", authority_file(directory)
        finally:
            server.terminate()
            server.wait(10)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    import socket

    for _ in range(200):
        if server.poll() is not None:
            raise SystemExit("nginx did not start")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise SystemExit("nginx does not answer")


def measured(reader: str, url: str, ca: str, runs: int) -> dict[str, Any]:
    """The best of several runs: what disturbs a run only ever makes it slower."""
    command = [sys.executable, "-m", "tests.benchmarks.origin", "--reader", reader, url, ca]
    found = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout) for _ in range(runs)
    ]
    best: dict[str, Any] = min(found, key=lambda result: result["cpu_seconds_per_gib"])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-tls", action="store_true")
    parser.add_argument("--reader", nargs=3, metavar=("READER", "URL", "CA"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        read_once(*options.reader)
        return
    with nginx(options.mib) as (url, tls_url, ca):
        results = {name: measured(name, url, ca, options.runs) for name in READERS}
        if not options.no_tls:
            results |= {f"{name}_tls": measured(name, tls_url, ca, options.runs) for name in ("ours", "httpx")}
    print(json.dumps({"mib": options.mib, "results": results}))


if __name__ == "__main__":
    main()
