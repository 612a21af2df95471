"""`swarm doctor`: find what is wrong, and say what to do."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cli.options import config_option, data_dir_option, json_option, network_options
from cli.output import emit_json, printable
from swarm.errors import DaemonUnreachable, SwarmError
from swarm.quantities import GIB, human_duration, human_size

if TYPE_CHECKING:
    from swarm.config import Settings
    from swarm.quantities import Endpoint

OK: Final = "ok"
WARNING: Final = "warning"
FAILED: Final = "failed"

LOW_SPACE_BYTES: Final = 1 * GIB
FEW_DESCRIPTORS: Final = 1024
"""512 links with two sockets each, and a file for each task served."""

MAX_SKEW_SECONDS: Final = 300.0
EXPIRES_SOON_SECONDS: Final = 14 * 86400.0
CLOCK_UNSYNCHRONISED: Final = 5
"""adjtimex(2): TIME_ERROR."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found and, unless it is well, what to do."""

    check: str
    state: str
    message: str
    do: str = ""


@click.command(context_settings={"max_content_width": 110})
@config_option
@data_dir_option
@network_options
@click.option("--origin", metavar="URL", help="Also ask this origin, as a fetch would.")
@json_option
def doctor(
    config: Path | None,
    data_dir: Path | None,
    network: Path | None,
    open_network: str | None,
    origin: str | None,
    as_json: bool,
) -> int:
    """Find what is wrong with this node, and say what to do: ports, clock, disk, peers, origin.

    Exits with 1 if something has to be done.

    \b
    Examples:
      swarm doctor
      swarm doctor --origin https://example.com/model.bin
    """
    findings = []
    for finding in examine(config, data_dir, network, open_network, origin):
        findings.append(finding)
        if not as_json:
            _print(finding)
    well = all(finding.state != FAILED for finding in findings)
    if as_json:
        emit_json({"ok": well, "checks": [asdict(finding) for finding in findings]})
    return 0 if well else 1


def _print(finding: Finding) -> None:
    mark = {OK: "ok     ", WARNING: "warning", FAILED: "FAILED "}[finding.state]
    print(f"{mark}  {finding.check}: {printable(finding.message)}")
    if finding.do:
        print(f"         {printable(finding.do)}")
    sys.stdout.flush()


def examine(
    config: Path | None, data_dir: Path | None, network: Path | None, open_network: str | None, origin: str | None
) -> Iterator[Finding]:
    """Every check, in the order in which one thing depends on another."""
    from swarm.config import load

    flags = {"data_dir": data_dir, "network.directory": network, "network.open": open_network}
    try:
        settings = load(file=config, flags=flags)
    except SwarmError as error:
        yield Finding("configuration", FAILED, str(error), "correct it; docs/reference/configuration.md lists all settings")
        return
    yield Finding("configuration", OK, "can be read")
    yield from _disk(settings)
    status = None
    try:
        status = _status(settings)
        yield Finding("daemon", OK, f"runs (process {status['pid']}, {status['state']})")
    except DaemonUnreachable:
        yield Finding("daemon", WARNING, "does not run", "start it with swarm daemon; swarm fetch works alone meanwhile")
    except SwarmError as error:
        yield Finding("daemon", FAILED, str(error), "run swarm doctor as the user who runs the daemon")
    yield from _limits()
    if status is None:
        yield from _ports(settings)
        yield _kernel_clock()
        yield from _membership(settings)
    else:
        yield Finding(
            "ports", OK, f"{status['control']} (DHT, control), {status['pieces']} (pieces), http {status['http'] or 'off'}"
        )
        yield _skew(status)
        yield from _network(status)
    yield from _join(settings, status)
    if origin is not None:
        yield _origin(settings, status, origin)


def _status(settings: Settings) -> dict[str, Any]:
    from swarm.control.client import ask

    return ask(settings.directory, "status").result


def _disk(settings: Settings) -> Iterator[Finding]:
    directory = settings.directory
    try:
        found = directory.stat()
    except FileNotFoundError:
        parent = next(p for p in directory.absolute().parents if p.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding("data directory", OK, f"{directory} will be made at the first start")
        else:
            yield Finding(
                "data directory", FAILED, f"{directory} does not exist and {parent} is not writable",
                f"run: sudo install -d -m 700 -o $USER {directory}, or choose another with --data-dir",
            )  # fmt: skip
            return
        found = parent.stat()
        directory = parent
    except OSError as error:
        yield Finding("data directory", FAILED, f"{directory}: {error.strerror}", "choose another with --data-dir")
        return
    else:
        yield _data_directory(directory, found)
    free = shutil.disk_usage(directory).free
    needed = max(LOW_SPACE_BYTES, 2 * settings.store.min_free)
    if free <= settings.store.min_free:
        text = f"{human_size(free)} free, store.min_free keeps {human_size(settings.store.min_free)} for others"
        yield Finding("disk", FAILED, text, "free some room, or lower store.min_free")
    elif free < needed:
        yield Finding("disk", WARNING, f"only {human_size(free)} free", "free some room, or give the store another disk")
    else:
        yield Finding("disk", OK, f"{human_size(free)} free")


def _data_directory(directory: Path, found: os.stat_result) -> Finding:
    if not stat.S_ISDIR(found.st_mode):
        return Finding("data directory", FAILED, f"{directory} is not a directory", "choose another with --data-dir")
    if found.st_uid != os.geteuid():
        owner = f"{directory} belongs to user {found.st_uid}"
        return Finding("data directory", FAILED, owner, "run as that user, or choose another with --data-dir")
    if found.st_mode & 0o022:
        return Finding("data directory", FAILED, f"others may write to {directory}", f"run: chmod 700 {directory}")
    return Finding("data directory", OK, str(directory))


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_DESCRIPTORS:
        yield Finding(
            "descriptors", WARNING, f"this shell allows {soft} open files, a busy node wants {FEW_DESCRIPTORS}",
            f"run: ulimit -n {FEW_DESCRIPTORS if hard in (resource.RLIM_INFINITY,) or hard >= FEW_DESCRIPTORS else hard}",
        )  # fmt: skip


def _ports(settings: Settings) -> Iterator[Finding]:
    """Whether a daemon could listen, with nothing left behind."""
    from swarm.config import DEFAULT_PORT
    from swarm.quantities import Endpoint

    closed = settings.network.directory is not None
    listen = settings.network.listen or Endpoint("::" if closed else "127.0.0.1", DEFAULT_PORT)
    wanted = [(listen, socket.SOCK_DGRAM, "DHT"), (listen, socket.SOCK_STREAM, "control")]
    if listen.port:
        wanted.append((Endpoint(listen.host, listen.port + 1), socket.SOCK_STREAM, "pieces"))
    if settings.http.listen is not None:
        wanted.append((settings.http.listen, socket.SOCK_STREAM, "HTTP"))
    if settings.mirror.listen is not None:
        wanted.append((settings.mirror.listen, socket.SOCK_STREAM, "mirror"))
    well = True
    for endpoint, kind, what in wanted:
        problem = _cannot_bind(endpoint, kind)
        if problem:
            well = False
            transport = "UDP" if kind == socket.SOCK_DGRAM else "TCP"
            seen = f"ss -lnp{transport[0].lower()} 'sport = :{endpoint.port}'"
            do = f"see who has it: {seen}; or choose another in the configuration"
            yield Finding("ports", FAILED, f"{endpoint} ({transport}, {what}): {problem}", do)
    if well:
        yield Finding("ports", OK, ", ".join(dict.fromkeys(str(endpoint) for endpoint, _, _ in wanted)) + " are free")


def _cannot_bind(endpoint: Endpoint, kind: socket.SocketKind) -> str:
    try:
        family, _, _, _, address = socket.getaddrinfo(endpoint.host, endpoint.port, type=kind, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            if kind == socket.SOCK_STREAM:
                probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _skew(status: dict[str, Any]) -> Finding:
    skew = status["clock_skew_seconds"]
    if abs(skew) < MAX_SKEW_SECONDS:
        return (
            _kernel_clock() if not status["dht_contacts"] else Finding("clock", OK, f"{abs(skew):.0f} s off from other nodes")
        )
    direction = "ahead of" if skew > 0 else "behind"
    return Finding(
        "clock",
        WARNING,
        f"{human_duration(abs(skew))} {direction} the other nodes; downloads work, announcements may be short-lived",
        "set it: timedatectl set-ntp true, or run chrony",
    )


def _kernel_clock() -> Finding:
    """What the kernel knows: whether something keeps the clock right."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        buffer = ctypes.create_string_buffer(512)  # struct timex, all zero: read only
        if ctypes.CDLL(None, use_errno=True).adjtimex(buffer) == CLOCK_UNSYNCHRONISED:
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}; the kernel says that nothing keeps it right"
            return Finding("clock", WARNING, text, "compare it with a watch; timedatectl set-ntp true, or run chrony")
    return Finding("clock", OK, time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def _membership(settings: Settings) -> Iterator[Finding]:
    """The network's files as the daemon would read them; nothing is written."""
    if settings.network.directory is None:
        name = settings.network.open or "default"
        yield Finding("network", OK, f"open network {name!r}: no protection, private content is never shared in it")
        return
    from swarm.identity import Identity
    from swarm.network import load

    try:
        network = load(settings.network.directory, identity=Identity.generate())
    except SwarmError as error:
        yield Finding("network", FAILED, str(error), "see docs/how-to/network.md")
        return
    found = network.status()
    yield from _network(
        {
            "problems": list(found.problems),
            "certificate_expires": found.not_after,
            "open": found.is_open,
            "network": found.name,
            "node": found.node_id.hex(),
        }
    )


def _network(status: dict[str, Any]) -> Iterator[Finding]:
    for problem in status["problems"]:
        yield Finding("network", WARNING, problem, "see docs/how-to/network.md")
    left = status["certificate_expires"] - time.time()
    if left < EXPIRES_SOON_SECONDS and not status["open"] and not status["problems"]:
        yield Finding(
            "network",
            WARNING,
            f"this node's certificate ends in {human_duration(max(0.0, left))}",
            "issue a new one: swarm network issue",
        )
    elif not status["problems"]:
        kind = "open, no protection" if status["open"] else "closed"
        yield Finding("network", OK, f"{status['network']} ({kind}), this node is {status['node']}")


def _join(settings: Settings, status: dict[str, Any] | None) -> Iterator[Finding]:
    """Whether the nodes to join have addresses, and whether anybody answers."""
    names = status["join"] if status is not None else [str(endpoint) for endpoint in settings.network.join]
    from swarm.quantities import parse_endpoint

    for name in names:
        endpoint = parse_endpoint(name)
        try:
            socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
        except OSError as error:
            yield Finding(
                "peers",
                FAILED,
                f"{endpoint.host} (to join) has no address: {error.strerror or error}",
                "correct the name, or the DNS",
            )
    if status is None:
        return
    contacts, links = status["dht_contacts"], status["peers"]
    if contacts or links:
        yield Finding("peers", OK, f"{contacts} in the routing table, {links} connected")
    elif names:
        yield Finding(
            "peers", FAILED, f"none of {', '.join(names)} answers",
            "is a daemon there, in the same network, and are UDP and TCP open on its port and the next one?",
        )  # fmt: skip
    else:
        yield Finding(
            "peers", WARNING, "this node knows no other", "give it one with --join; without others it reads the origin itself"
        )


def _origin(settings: Settings, status: dict[str, Any] | None, url: str) -> Finding:
    try:
        if status is not None:
            from swarm.control.client import ask

            said = ask(settings.directory, "check-origin", {"url": url}).result
        else:
            said = _ask_origin(settings, url)
    except SwarmError as error:
        return Finding("origin", FAILED, str(error), "check the URL, the network between, and egress.allow")
    size = human_size(said["bytes"]) if said["bytes"] is not None else "of unknown length"
    if not said["validator"]:
        text = f"answers in {human_duration(said['seconds'])}, {size}, but says nothing that tells versions apart"
        return Finding("origin", WARNING, text, "it is not shared unless fetched with --digest or --immutable")
    return Finding("origin", OK, f"answers in {human_duration(said['seconds'])}, {size}, {said['validator']}")


def _ask_origin(settings: Settings, url: str) -> dict[str, Any]:
    import random

    import trio

    from swarm.daemon import flatten, open_origin
    from swarm.node import origin_view

    async def main() -> dict[str, Any]:
        async with open_origin(settings, random.Random()) as origin:
            return await origin_view(origin, url)

    with flatten():
        return trio.run(main)
