"""One sender, one receiver over loopback; and what a daemon and a command cost on their own.

The sender holds 1 GiB.  Compared in the same run, on the same file system: nginx to `curl -o file` and then `sha256sum
file`; libtorrent 1 to 1.  Everything runs in one namespace, so no port of the machine is taken and none is in the way.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.benchmarks.many import BenchmarkFailed, Peer, work_directory
from tests.benchmarks.report import Run
from tests.benchmarks.torrent import make
from tests.system.cluster import SWARM, Daemon, clean_environment, hosts_dir, same
from tests.system.hosts import Hosts
from tests.system.origin import MIB, File, NginxOrigin
from tests.system.processes import Ended, Prepared, cpu_seconds, resident, start_together, wait

GIB: Final = 1 << 30
SENDER: Final = "127.0.0.2"
RECEIVER: Final = "127.0.0.3"
TORRENT_PIECE: Final = 4 * MIB  # as ours at this length
TIMEOUT: Final = 180.0
# Debian's sha256sum does without the processor's SHA instructions; this is what one that used them would need.
FAST_SHA256SUM: Final = [
    sys.executable,
    "-Ic",
    "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())",
]


def disk_dir() -> Path:
    """A directory on a real disk: ``BENCH_DISK_DIR``, else where temporary files go."""
    return Path(os.environ.get("BENCH_DISK_DIR", tempfile.gettempdir()))


def one_to_one(length: int, seed: int, *, parent: Path, link: bool = True) -> Run:
    """Three ways of moving the same bytes into a checked file below `parent`.

    Args:
        link: The file is the store's own (`--hard-link`), as what libtorrent got is what it seeds from; else a second copy.
    """
    with (
        Hosts(0) as hosts,
        NginxOrigin(hosts, parent=hosts_dir()) as origin,
        work_directory(parent) as work,
    ):
        file = origin.add("content", length, seed)
        plain_seconds, plain_cpu = _plain(hosts, origin, file, work, ["sha256sum"])
        fast_seconds, fast_cpu = _plain(hosts, origin, file, work, FAST_SHA256SUM)
        ours = _swarm(hosts, origin, file, work, *(["--hard-link"] if link else []))
        torrent_seconds, torrent_cpu = _libtorrent(hosts, file, work)
        gib = length / GIB
        figures = {
            **ours,
            "plain_seconds": plain_seconds,
            "of_plain_rate": plain_seconds / ours["seconds"],
            "fast_plain_seconds": fast_seconds,
            "of_fast_plain_rate": fast_seconds / ours["seconds"],
            "libtorrent_seconds": torrent_seconds,
            "mib_per_s": length / MIB / ours["seconds"],
            "cpu_s_per_gib": ours["cpu_s"] / gib,
            "plain_cpu_s_per_gib": plain_cpu / gib,
            "fast_plain_cpu_s_per_gib": fast_cpu / gib,
            "libtorrent_cpu_s_per_gib": torrent_cpu / gib,
            "of_libtorrent_cpu": ours["cpu_s"] / torrent_cpu,
        }
        return Run({name: value for name, value in figures.items() if name != "cpu_s"}, {"directory": str(parent)})


def _prepare(work: Path, length: int) -> None:
    """Before each way: nobody pays for what the one before left to be written, nor for the first touch of memory.

    In a virtual machine the host takes unused memory back within seconds, and each page of a file that is written is a fault
    to the host then: more than the copy itself costs.
    """
    os.sync()
    zeros, path = bytes(4 * MIB), work / "touched"
    with path.open("wb") as file:
        for _ in range(length // len(zeros)):
            file.write(zeros)
    path.unlink()
    os.sync()


def _timed(hosts: Hosts, command: list[str], work: Path, name: str) -> Ended:
    prepared = Prepared(hosts.command(0, command), work, name, environment=clean_environment())
    try:
        start_together([prepared])
        end = wait([prepared], TIMEOUT)[0]
    finally:
        prepared.close()
    if end.code:
        raise BenchmarkFailed(f"{name}: exit {end.code}: {end.err[-500:]}")
    return end


def _plain(hosts: Hosts, origin: NginxOrigin, file: File, work: Path, checksum: list[str]) -> tuple[float, float]:
    """Seconds and processor seconds of nginx to curl to a file, then a checksum of it."""
    _prepare(work, 3 * file.length)
    copy, before = work / "plain", cpu_seconds(origin.pid)
    script = f"curl -sSf -o {copy} {origin.url(file.name)} && {shlex.join(checksum)} {copy}"
    end = _timed(hosts, ["bash", "-c", script], work, "plain-run")
    if end.out.split()[:1] != [file.digest.removeprefix("sha256:")]:
        raise BenchmarkFailed("curl got another file")
    copy.unlink()
    return end.seconds, end.cpu + cpu_seconds(origin.pid) - before


def _daemon(hosts: Hosts, address: str, directory: Path, *join: str) -> Daemon:
    argv = [SWARM, "daemon", "--data-dir", str(directory / "data"), "--listen", f"{address}:7400", "--open-network", "bench"]
    faces = ["--http", f"{address}:7403"]
    return Daemon(0, hosts.command(0, [*argv, *faces, *join]), directory, clean_environment())


def _fetch(hosts: Hosts, daemon: Daemon, url: str, file: File, *options: str) -> Ended:
    copy = daemon.directory / "copy"
    arguments = [SWARM, "fetch", url, "-o", str(copy), "--data-dir", str(daemon.data_dir), "--digest", file.digest, "--json"]
    end = _timed(hosts, [*arguments, *options], daemon.directory, "fetch")
    if not same(copy, file):
        raise BenchmarkFailed("swarm fetched another file")
    copy.unlink()
    return end


def _swarm(hosts: Hosts, origin: NginxOrigin, file: File, work: Path, *options: str) -> dict[str, float]:
    """The sender has the content; the receiver may not ask the origin."""
    url = origin.url(file.name)
    with ExitStack() as stack:
        sender = _daemon(hosts, SENDER, work / "sender")
        stack.callback(sender.close)
        sender.wait_ready()
        _fetch(hosts, sender, url, file)
        receiver = _daemon(hosts, RECEIVER, work / "receiver", "--join", f"{SENDER}:7400")
        stack.callback(receiver.close)
        receiver.wait_ready()
        time.sleep(1)  # the daemons' start-up work is not part of the transfer
        _prepare(work, 3 * file.length)
        before = cpu_seconds(sender.pid) + cpu_seconds(receiver.pid)
        end = _fetch(hosts, receiver, url, file, "--no-origin", *options)
        cpu = end.cpu + cpu_seconds(sender.pid) + cpu_seconds(receiver.pid) - before
        peaks = {name: resident(it.pid)[1] / MIB for name, it in (("sender", sender), ("receiver", receiver))}
        return {
            "seconds": end.seconds,
            "cpu_s": cpu,
            "most_resident_mib": max(peaks.values()),
            **{f"{name}_most_resident_mib": peak for name, peak in peaks.items()},
        }


def _libtorrent(hosts: Hosts, file: File, work: Path) -> tuple[float, float]:
    """Seconds and processor seconds of libtorrent, seed to leech."""
    torrent, endpoints = work / "torrent", (f"{SENDER}:6881", f"{RECEIVER}:6881")
    make(file.path, TORRENT_PIECE, torrent)
    _prepare(work, 3 * file.length)
    with ExitStack() as stack:
        peers = []
        for endpoint, directory, others in (
            (endpoints[0], file.path.parent, ()),
            (endpoints[1], work / "leech", endpoints[:1]),
        ):
            peer = Peer(lambda argv: hosts.command(0, argv), torrent, directory, endpoint, *others)
            stack.callback(peer.close)
            peers.append(peer)
        for peer in peers:
            peer.wait("ready", 60)
        for peer in peers:
            peer.go()
        done = [peer.wait("done", TIMEOUT) for peer in peers][1]
        ends = [peer.end() for peer in reversed(peers)]
    if not same(work / "leech" / file.name, file):
        raise BenchmarkFailed("libtorrent got another file")
    return done["ended"] - done["began"], sum(it["cpu"] for it in ends)


# --- a daemon and a command on their own ------------------------------------------------------------------------------


def footprint(idle_seconds: float) -> Run:
    """Memory of an idle daemon, how soon it is ready, how soon `swarm --help` answers."""
    with Hosts(0) as hosts, work_directory(hosts_dir()) as work:
        help_end = _timed(hosts, [SWARM, "--help"], work, "help")
        daemon = _daemon(hosts, SENDER, work / "daemon")
        try:
            ready = daemon.wait_ready()
            time.sleep(idle_seconds)
            cpu = cpu_seconds(daemon.pid)
            time.sleep(idle_seconds)
            figures = {
                "ready_s": ready,
                "help_s": help_end.seconds,
                "idle_resident_mib": resident(daemon.pid)[0] / MIB,
                "idle_cpu_percent": 100 * (cpu_seconds(daemon.pid) - cpu) / idle_seconds,
            }
            code = daemon.terminate()
        finally:
            daemon.close()
        if code:
            raise BenchmarkFailed(f"the daemon ended with {code} at SIGTERM: {daemon.tail()}")
        return Run(figures)
