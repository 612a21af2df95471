"""N hosts want one file at the same moment: swarm, libtorrent, and everyone reading the origin."""

from __future__ import annotations

import json
import random
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from tests.benchmarks.memory import Kept, kept
from tests.benchmarks.report import Run
from tests.benchmarks.torrent import make
from tests.system.cluster import LINKED, Cluster, Fetched, clean_environment, hosts_dir, same
from tests.system.hosts import Hosts, Traffic, make_directory
from tests.system.origin import MIB, File, NginxOrigin
from tests.system.processes import Ended, Prepared, cpu_seconds, last_done, prepare, spread, start_together, wait

TORRENT_PORT: Final = 6881
TORRENT_PIECE: Final = 256 * 1024  # libtorrent's best at 100 MiB among 256 KiB, 512 KiB and 1 MiB


class BenchmarkFailed(Exception):
    """A copy is wrong or a program failed: there is no figure."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Who wants what over which links.

    Attributes:
        link: Rate of every link both ways, the origin's too; `None` leaves them free.
        origin: Rate of what the origin sends, where links are free.
        hard_link: Outputs are hard links to the store: where two copies per host would not fit into memory.
    """

    hosts: int
    length: int
    link: int | None = None
    origin: int | None = None
    hard_link: bool = False

    @property
    def floor(self) -> float:
        """Seconds that one copy needs over the origin's link, headers not counted."""
        rate = self.link or self.origin
        assert rate is not None
        return self.length * 8 / (rate * 1e6)

    @property
    def memory(self) -> int:
        """Bytes that the hosts' copies take: one in each store, and one as its output."""
        return self.hosts * self.length * (1 if self.hard_link else 2)

    @property
    def timeout(self) -> float:
        """Seconds after which a run has failed: what a plain download by all would need, and some."""
        return self.floor * (self.hosts + 1) * 1.2 + 60

    def shape(self, hosts: Hosts) -> None:
        if self.link is not None:
            hosts.limit_all(f"{self.link}mbit")
        if self.origin is not None:
            hosts.limit(0, egress=f"{self.origin}mbit")


@contextmanager
def laid_out(setting: Setting, seed: int) -> Iterator[tuple[Hosts, NginxOrigin, File, Kept]]:
    with Hosts(setting.hosts) as hosts, NginxOrigin(hosts, parent=hosts_dir()) as origin, kept(setting.memory) as memory:
        file = origin.add("content", setting.length, seed)
        setting.shape(hosts)
        yield hosts, origin, file, memory


@contextmanager
def work_directory(parent: Path) -> Iterator[Path]:
    """A directory for one measurement."""
    path = make_directory("work", parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# --- swarm --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """What is read around the moment in which all fetch."""

    cluster: Cluster
    origin: NginxOrigin
    before: dict[int, Traffic]
    daemons_before: float
    origin_before: float

    @classmethod
    def begin(cls, cluster: Cluster, origin: NginxOrigin) -> Measured:
        origin.forget()
        return cls(cluster, origin, cluster.hosts.traffic(), cluster.cpu(), cpu_seconds(origin.pid))

    def run(self, fetched: Sequence[Fetched], file: File, *, must: Sequence[int]) -> Run:
        """Figures of the fetches of the hosts that `must` have the file.

        Raises:
            BenchmarkFailed: One of them has not.
        """
        daemons = self.cluster.cpu() - self.daemons_before
        most_resident = self.cluster.most_resident()
        traffic = self.cluster.hosts.traffic()
        counted = [it for it in fetched if it.host in must]
        check(counted, file)
        # Reads that were still open are logged when their connections close.
        self.cluster.stop()
        ends = [it.end for it in counted]
        figures = {
            "copies": self.origin.copies(file),
            "seconds": last_done(ends),
            "own_seconds": max(float(it.said["seconds"]) for it in counted),
            "reads": float(len(self.origin.reads(file.name))),
            "heads": float(sum(it.method == "HEAD" for it in self.origin.requests())),
            "interface_copies": (traffic[0].sent - self.before[0].sent) / file.length,
            "start_spread_s": spread(ends),
            "daemons_cpu_s": daemons,
            "commands_cpu_s": sum(end.cpu for end in ends),
            "origin_cpu_s": cpu_seconds(self.origin.pid) - self.origin_before,
            "most_resident_mib": most_resident / MIB,
        }
        return Run(figures, {"hosts": [_detail(it) for it in fetched], "traffic": _moved(self.before, traffic)})


def check(fetched: Sequence[Fetched], file: File) -> None:
    for it in fetched:
        if it.code != 0:
            raise BenchmarkFailed(str(it))
        if not same(it.path, file):
            raise BenchmarkFailed(f"host {it.host} has another file than the origin")


def _detail(it: Fetched) -> dict[str, Any]:
    return {"host": it.host, "code": it.code, "began": it.end.began, "ended": it.end.ended, "cpu": it.end.cpu, **it.said}


def _moved(before: dict[int, Traffic], after: dict[int, Traffic]) -> dict[int, tuple[int, int]]:
    """Bytes received and sent by each host meanwhile."""
    return {host: (after[host].received - before[host].received, after[host].sent - before[host].sent) for host in after}


def at_once(setting: Setting, seed: int) -> Run:
    """All hosts fetch at the same moment; their daemons are up."""
    with laid_out(setting, seed) as (hosts, origin, file, memory), Cluster(hosts) as cluster:
        cluster.start_all()
        cluster.settle(LINKED)
        measured = Measured.begin(cluster, origin)
        options = ["--hard-link"] if setting.hard_link else []
        with memory.giving():
            fetched = cluster.fetch_all(origin.url(file.name), *options, timeout=setting.timeout)
        return measured.run(fetched, file, must=list(hosts.each()))


def joining(setting: Setting, seed: int, *, every: float) -> Run:
    """One host after the other begins to fetch, `every` so many seconds."""
    with laid_out(setting, seed) as (hosts, origin, file, memory), Cluster(hosts) as cluster:
        cluster.start_all()
        cluster.settle(LINKED)
        measured = Measured.begin(cluster, origin)
        fetches = [cluster.fetch(host, origin.url(file.name)) for host in hosts.each()]
        prepare([it.prepared for it in fetches])
        with memory.giving():
            first = time.monotonic()
            for number, fetch in enumerate(fetches):
                time.sleep(max(0.0, first + number * every - time.monotonic()))
                fetch.prepared.release()
            fetched = cluster.finish(fetches, setting.timeout)
        return measured.run(fetched, file, must=list(hosts.each()))


def killed(setting: Setting, seed: int, *, victims: int) -> Run:
    """In the middle, some hosts die: daemon and command get SIGKILL."""
    with laid_out(setting, seed) as (hosts, origin, file, memory), Cluster(hosts) as cluster:
        cluster.start_all()
        cluster.settle(LINKED)
        measured = Measured.begin(cluster, origin)
        fetches = [cluster.fetch(host, origin.url(file.name)) for host in hosts.each()]
        dying = random.Random(seed).sample(range(1, setting.hosts + 1), victims)
        with memory.giving():
            start_together([it.prepared for it in fetches])
            time.sleep(setting.floor / 2)
            cpu = sum(cpu_seconds(cluster.daemons[host].pid) for host in dying)
            for host in dying:
                fetches[host - 1].prepared.kill()
                cluster.daemons[host].kill()
            # What the dead had used before still counts.
            measured.daemons_before -= cpu
            fetched = cluster.finish(fetches, setting.timeout)
        found = measured.run(fetched, file, must=[host for host in hosts.each() if host not in dying])
        return Run(found.figures, {**found.details, "killed": dying})


def alone(setting: Setting, seed: int) -> Run:
    """One host without anybody to ask, against `curl` over the same link."""
    with laid_out(setting, seed) as (hosts, origin, file, memory), Cluster(hosts) as cluster:
        curl = _curl(hosts, [1], origin.url(file.name), cluster.root, setting.timeout)
        cluster.start_all()
        cluster.settle(LINKED)
        measured = Measured.begin(cluster, origin)
        with memory.giving():
            fetched = cluster.fetch_all(origin.url(file.name), timeout=setting.timeout)
        found = measured.run(fetched, file, must=[1])
        curl_seconds = last_done(curl)
        compared = {"curl_seconds": curl_seconds, "of_curl": found.figures["seconds"] / curl_seconds}
        return Run({**found.figures, **compared}, found.details)


def again(setting: Setting, seed: int) -> Run:
    """A host fetches what it has: once more by URL, once more by digest."""
    with laid_out(setting, seed) as (hosts, origin, file, _), Cluster(hosts) as cluster:
        cluster.start_all()
        url = origin.url(file.name)
        check([cluster.fetch_one(1, url, timeout=setting.timeout, name="first")], file)
        cluster.settle(LINKED)
        origin.forget()
        by_url = cluster.fetch_one(1, url, timeout=setting.timeout, name="second")
        heads = len(origin.requests())
        copies = origin.copies(file)
        origin.forget()
        by_digest = cluster.fetch_one(1, url, "--digest", file.digest, timeout=setting.timeout, name="third")
        check([by_url, by_digest], file)
        figures = {
            "copies": copies + origin.copies(file),
            "seconds": by_url.end.seconds,
            "requests": float(heads),
            "command_cpu_s": by_url.end.cpu,
            "by_digest_s": by_digest.end.seconds,
            "requests_by_digest": float(len(origin.requests())),
        }
        return Run(figures, {"hosts": [_detail(by_url), _detail(by_digest)]})


# --- everyone reads the origin --------------------------------------------------------------------------------------


def curl(setting: Setting, seed: int) -> Run:
    with laid_out(setting, seed) as (hosts, origin, file, memory), work_directory(hosts_dir()) as work:
        before = cpu_seconds(origin.pid)
        with memory.giving():
            ends = _curl(hosts, hosts.each(), origin.url(file.name), work, setting.timeout)
        if any(end.code or not same(work / f"curl-{host}", file) for host, end in zip(hosts.each(), ends, strict=True)):
            raise BenchmarkFailed("a curl failed")
        cpu = sum(end.cpu for end in ends) + cpu_seconds(origin.pid) - before
        figures = {"copies": origin.copies(file), "seconds": last_done(ends), "start_spread_s": spread(ends), "cpu_s": cpu}
        return Run(figures)


def _curl(hosts: Hosts, on: Sequence[int], url: str, work: Path, timeout: float) -> list[Ended]:
    prepared = []
    for host in on:
        command = hosts.command(host, ["curl", "-sSf", "-o", str(work / f"curl-{host}"), url])
        prepared.append(Prepared(command, work, f"curl-{host}"))
    try:
        start_together(prepared)
        return wait(prepared, timeout)
    finally:
        for it in prepared:
            it.close()


# --- libtorrent -----------------------------------------------------------------------------------------------------


class Peer:
    """One libtorrent process of `tests.benchmarks.torrent`."""

    def __init__(self, command: Callable[[Sequence[str]], list[str]], torrent: Path, directory: Path, *rest: str) -> None:
        directory.mkdir(exist_ok=True)
        argv = command([sys.executable, "-m", "tests.benchmarks.torrent", "run", str(torrent), str(directory), *rest])
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment())

    @property
    def _in(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    def wait(self, event: str, timeout: float) -> dict[str, float]:
        """The figures of its next line, which must tell of this event."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise BenchmarkFailed(f"libtorrent did not say {event} in {timeout:.0f} s")
        said = json.loads(self.process.stdout.readline() or b"{}")
        if said.pop("event", None) != event:
            raise BenchmarkFailed("libtorrent ended")
        figures: dict[str, float] = said
        return figures

    def go(self) -> None:
        self._in.write(b"go\n")
        self._in.flush()

    def end(self) -> dict[str, float]:
        self._in.close()
        return self.wait("end", 30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def libtorrent(setting: Setting, seed: int) -> Run:
    """The origin seeds, all hosts know one another, and all start at the same moment."""
    with laid_out(setting, seed) as (hosts, _, file, memory), work_directory(hosts_dir()) as work:
        torrent = work / "torrent"
        make(file.path, TORRENT_PIECE, torrent)
        endpoints = {host: hosts.endpoint(host, TORRENT_PORT) for host in hosts.all()}
        with ExitStack() as stack:
            peers = []
            for host in hosts.all():
                directory = file.path.parent if host == 0 else work / f"h{host}"
                known = [endpoint for other, endpoint in endpoints.items() if other != host]
                peer = Peer(lambda argv, host=host: hosts.command(host, argv), torrent, directory, endpoints[host], *known)  # type: ignore[misc]
                stack.callback(peer.close)
                peers.append(peer)
            with memory.giving():
                return _torrent_run(peers, hosts, file, work, setting.timeout)


def _torrent_run(peers: Sequence[Peer], hosts: Hosts, file: File, work: Path, timeout: float) -> Run:
    for peer in peers:
        peer.wait("ready", 60)
    before = hosts.traffic()
    for peer in peers:
        peer.go()
    done = [peer.wait("done", timeout) for peer in peers][1:]
    traffic = hosts.traffic()
    ends = [peer.end() for peer in peers]
    if not all(same(work / f"h{host}" / file.name, file) for host in hosts.each()):
        raise BenchmarkFailed("a copy by libtorrent is not the file")
    began = [it["began"] for it in done]
    figures = {
        "copies": ends[0]["uploaded"] / file.length,
        "seconds": max(it["ended"] for it in done) - min(began),
        "interface_copies": (traffic[0].sent - before[0].sent) / file.length,
        "start_spread_s": max(began) - min(began),
        "cpu_s": sum(it["cpu"] for it in ends),
    }
    return Run(figures, {"traffic": _moved(before, traffic)})
