"""`swarm demo`: an origin, some daemons and one file, all on this machine, and what it saved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from cli.demo_origin import DemoOrigin
from cli.options import json_option
from cli.output import emit_json, print_table
from cli.progress import PHASES
from swarm.control.client import ControlConnection
from swarm.errors import ConfigError, DaemonUnreachable, IntegrityError, NoSpace, SwarmError
from swarm.quantities import MIB, human_duration, human_size, parse_rate, parse_size

READY_SECONDS: Final = 20.0
LEAVE_SECONDS: Final = 10.0
MAX_NODES: Final = 32
MIN_FREE_BYTES: Final = 64 * MIB
"""What each daemon leaves free, and what we leave free beyond that."""

WRITE_BYTES: Final = 4 * MIB


@dataclass(slots=True)
class Daemon:
    """One `swarm daemon` in a process of its own."""

    number: int
    data_dir: Path
    process: subprocess.Popen[bytes]
    ready: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Fetching:
    """One node's fetch: the newest progress, then the result or the error."""

    number: int
    news: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    error: SwarmError | None = None
    seconds: float = 0.0


@click.command(context_settings={"max_content_width": 110})
@click.option("--nodes", type=click.IntRange(1, MAX_NODES), default=6, show_default=True, help="How many daemons.")
@click.option("--size", default="256MiB", show_default=True, help="Size of the file.")
@click.option("--rate", default="32MiB/s", show_default=True, help="What the origin sends per second, to all together.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where to put it all [default: the temporary directory].",
)
@json_option
def demo(nodes: int, size: str, rate: str, directory: Path | None, as_json: bool) -> None:
    """A small swarm on this machine: what it saves.

    Starts an origin that sends no more than --rate, and --nodes daemons in their own processes; all fetch one file of
    random bytes at the same moment.  Everything is on loopback and is removed afterwards; no root needed.

    \b
    Examples:
      swarm demo
      swarm demo --nodes 3 --size 64MiB --json
    """
    length, speed = parse_size(size, "--size"), parse_rate(rate, "--rate")
    if not 1 <= length <= 1 << 40 or speed < 1:
        raise ConfigError("--size and --rate must be at least one byte, and --size at most 1 TiB")
    with _workplace(directory, length * (nodes + 1)) as place:
        report = _run(place, nodes, length, speed, quiet=as_json)
    if as_json:
        emit_json(report)
    else:
        _print(report)


@contextlib.contextmanager
def _workplace(parent: Path | None, needed: int) -> Iterator[Path]:
    free = shutil.disk_usage(parent or tempfile.gettempdir()).free
    if free < needed + 2 * MIN_FREE_BYTES:
        raise NoSpace(
            f"the demo needs {human_size(needed)} in {parent or tempfile.gettempdir()}, {human_size(free)} are free; "
            "give a smaller --size, or another --directory"
        )
    with tempfile.TemporaryDirectory(prefix="swarm-demo-", dir=parent, ignore_cleanup_errors=True) as place:
        yield Path(place)


def _run(place: Path, nodes: int, length: int, rate: float, *, quiet: bool) -> dict[str, Any]:
    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    say(f"writing {human_size(length)} of random bytes")
    path = place / "content.bin"
    digest = _write_random(path, length)
    with DemoOrigin(path, digest[:16], rate) as origin, _daemons(place, nodes, say) as daemons:
        say(f"{nodes} nodes fetch {origin.url} at once; the origin sends {human_size(rate)}/s to all together")
        began = time.monotonic()
        fetches = _fetch_all(daemons, origin, quiet=quiet)
        seconds = time.monotonic() - began
        return _report(fetches, origin, digest, rate, seconds)


def _write_random(path: Path, length: int) -> str:
    """Random bytes, so that nothing can compress or guess them; returns their SHA-256."""
    hasher = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, length, WRITE_BYTES):
            block = os.urandom(min(WRITE_BYTES, length - start))
            hasher.update(block)
            file.write(block)
    return hasher.hexdigest()


@contextlib.contextmanager
def _daemons(place: Path, count: int, say: Callable[[str], None]) -> Iterator[list[Daemon]]:
    network = f"demo-{secrets.token_hex(8)}"  # another demo on this machine is another network
    daemons: list[Daemon] = []
    began = time.monotonic()
    try:
        for number in range(1, count + 1):
            join = ["--join", str(daemons[0].ready["control"])] if daemons else []
            daemons.append(_start(place, number, network, join))
            if number == 1:
                _wait_ready(daemons[0])
        for daemon in daemons[1:]:
            _wait_ready(daemon)
        say(f"{count} daemons ready after {human_duration(time.monotonic() - began)}")
        yield daemons
    finally:
        _stop(daemons)


def _start(place: Path, number: int, network: str, join: Sequence[str]) -> Daemon:
    data_dir = place / f"node-{number}"
    reading, writing = os.pipe()
    command = [
        sys.executable, "-m", "cli.main", "daemon", "--data-dir", str(data_dir), "--listen", "127.0.0.1:0",
        "--open-network", network, "--http", "off", "--log-level", "warning", "--log-format", "json",
        "--ready-fd", str(writing), *join,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    environment["SWARM_STORE_MIN_FREE"] = str(MIN_FREE_BYTES)
    environment["SWARM_DRAIN"] = "1s"
    try:
        with (place / f"node-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writing], env=environment
            )
    finally:
        os.close(writing)
    daemon = Daemon(number, data_dir, process)
    daemon.ready["fd"] = reading
    return daemon


def _wait_ready(daemon: Daemon) -> None:
    """Read the line that the daemon writes when it is ready.

    Raises:
        DaemonUnreachable: It ended, or took too long; the message is the end of what it said.
    """
    timer = threading.Timer(READY_SECONDS, daemon.process.kill)
    timer.start()
    try:
        with os.fdopen(daemon.ready.pop("fd"), "r") as stream:
            line = stream.readline()
    finally:
        timer.cancel()
    if not line:
        said = daemon.data_dir.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        raise DaemonUnreachable(f"daemon {daemon.number} did not start: {said[-1] if said else 'it said nothing'}")
    daemon.ready.update(json.loads(line))


def _stop(daemons: Sequence[Daemon]) -> None:
    for daemon in daemons:
        if "fd" in daemon.ready:
            os.close(daemon.ready.pop("fd"))
        daemon.process.terminate()
    deadline = time.monotonic() + LEAVE_SECONDS
    for daemon in daemons:
        try:
            daemon.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            daemon.process.kill()
            daemon.process.wait()


def _fetch_all(daemons: Sequence[Daemon], origin: DemoOrigin, *, quiet: bool) -> list[Fetching]:
    fetches = [Fetching(daemon.number) for daemon in daemons]
    threads = [
        threading.Thread(target=_fetch, args=(daemon, origin.url, fetch), daemon=True)
        for daemon, fetch in zip(daemons, fetches, strict=True)
    ]
    for thread in threads:
        thread.start()
    with _display(fetches, origin, quiet=quiet) as show:
        while any(thread.is_alive() for thread in threads):
            show()
            time.sleep(0.2)
        show()
    for fetch in fetches:
        if fetch.error is not None:
            raise fetch.error
    return fetches


def _fetch(daemon: Daemon, url: str, fetch: Fetching) -> None:
    """What `swarm fetch` asks of its daemon; the bytes stay in the node's store."""
    began = time.monotonic()
    try:
        with ControlConnection(daemon.data_dir) as connection:
            answer = connection.ask("fetch", {"url": url, "progress": True}, fetch.news.update)
        fetch.result = answer.result
        answer.close()
    except SwarmError as error:
        fetch.error = error
    fetch.seconds = time.monotonic() - began


def _report(fetches: Sequence[Fetching], origin: DemoOrigin, digest: str, rate: float, seconds: float) -> dict[str, Any]:
    """Raises `IntegrityError` if a node has something else than the origin's bytes."""
    rows = []
    for fetch in fetches:
        result = fetch.result or {}
        if result.get("digest") != f"sha256:{digest}":
            raise IntegrityError(f"node {fetch.number} has {result.get('digest')}, the origin has sha256:{digest}")
        names = ("from_peers", "from_origin", "digest", "why_origin")
        rows.append({"node": fetch.number, "seconds": round(fetch.seconds, 2), **{name: result[name] for name in names}})
    plain = len(rows) * origin.length / rate
    return {
        "nodes": rows,
        "bytes": origin.length,
        "seconds": round(seconds, 2),
        "origin_bytes": origin.sent,
        "origin_reads": origin.reads,
        "origin_copies": round(origin.sent / origin.length, 3),
        "origin_rate": rate,
        "plain_seconds": round(plain, 2),
        "plain_copies": len(rows),
    }


def _print(report: dict[str, Any]) -> None:
    rows = [
        [str(row["node"]), f"{row['seconds']:.1f}", human_size(row["from_peers"]), human_size(row["from_origin"])]
        for row in report["nodes"]
    ]
    print_table(["NODE", "SECONDS", "FROM PEERS", "FROM ORIGIN"], rows, right=frozenset({0, 1, 2, 3}))
    count = len(rows)
    print()
    print(
        f"with swarm:    all {count} done in {report['seconds']:.1f} s, "
        f"the origin sent {human_size(report['origin_bytes'])}: {report['origin_copies']:.2f} copies"
    )
    print(
        f"without swarm: {count} plain downloads need {report['plain_seconds']:.1f} s "
        f"at {human_size(report['origin_rate'])}/s, the origin sends {human_size(report['bytes'] * count)}: {count} copies"
    )
    print("every copy has the origin's SHA-256")


@contextlib.contextmanager
def _display(fetches: Sequence[Fetching], origin: DemoOrigin, *, quiet: bool) -> Iterator[Any]:
    """A function that shows how far everybody is: a live table on a terminal, a line every two seconds elsewhere."""
    if quiet:
        yield lambda: None
    elif not sys.stderr.isatty():
        yield _lines(fetches, origin)
    else:
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(stderr=True), refresh_per_second=5, transient=True) as live:
            yield lambda: live.update(_table(fetches, origin))


def _lines(fetches: Sequence[Fetching], origin: DemoOrigin) -> Any:
    due = time.monotonic() + 2

    def show() -> None:
        nonlocal due
        if time.monotonic() >= due:
            due += 2
            shares = " ".join(f"{_share(fetch, origin):4.0%}" for fetch in fetches)
            print(f"nodes have {shares}; the origin sent {human_size(origin.sent)}", file=sys.stderr)

    return show


def _share(fetch: Fetching, origin: DemoOrigin) -> float:
    return 1.0 if fetch.result is not None else fetch.news.get("done", 0) / origin.length


def _table(fetches: Sequence[Fetching], origin: DemoOrigin) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(title=f"the origin sent {human_size(origin.sent)}: {origin.sent / origin.length:.2f} copies", expand=False)
    for name in ("node", "", "", "from peers", "from origin", "doing"):
        table.add_column(name, justify="right" if name.startswith("from") else "left")
    for fetch in fetches:
        news = fetch.result or fetch.news
        share = _share(fetch, origin)
        table.add_row(
            str(fetch.number),
            ProgressBar(total=1.0, completed=share, width=30),
            f"{share:4.0%}",
            human_size(news.get("from_peers", 0)),
            human_size(news.get("from_origin", 0)),
            "done" if fetch.result is not None else PHASES.get(fetch.news.get("phase", ""), "starting"),
        )
    return table
