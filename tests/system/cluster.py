"""`swarm daemon` on every host, `swarm fetch` on all of them at once, and what came of it.

Data directories and outputs of all hosts lie in memory (`/dev/shm`) unless ``BENCH_HOSTS_DIR`` names another place:
twenty hosts share the one disk of this machine, which twenty machines do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tests.system.hosts import Hosts, make_directory
from tests.system.origin import File
from tests.system.processes import Ended, NotReady, Prepared, cpu_seconds, resident, start_together, wait

PORT: Final = 7400
SWARM: Final = str(Path(sys.executable).parent / "swarm")
READY_TIMEOUT: Final = 60.0  # seconds; twenty daemons start at once on two cores


def hosts_dir() -> Path:
    """Where data directories go."""
    return Path(os.environ.get("BENCH_HOSTS_DIR", "/dev/shm"))


LINKED: Final = 5.0
"""Seconds of calm after which daemons that started together are connected as in a cluster that has been up for a while."""


def clean_environment() -> dict[str, str]:
    """What a daemon on a bare host sees: no setting of whoever runs the tests reaches it."""
    kept = ("PATH", "HOME", "LANG", "PYTHONPATH")
    return {key: os.environ[key] for key in kept if key in os.environ}


def same(path: Path, file: File) -> bool:
    """Whether a copy is the origin's file, byte for byte."""
    if not path.is_file() or path.stat().st_size != file.length:
        return False
    with path.open("rb") as copy:
        return f"sha256:{hashlib.file_digest(copy, 'sha256').hexdigest()}" == file.digest


@dataclass(frozen=True, slots=True)
class Fetched:
    """A `swarm fetch` that ended.

    Attributes:
        said: What it printed with ``--json``, or nothing.
        path: Where its copy was to go.
    """

    host: int
    end: Ended
    said: dict[str, Any]
    path: Path

    @property
    def code(self) -> int:
        return self.end.code

    def __str__(self) -> str:
        return (
            f"host {self.host}: exit {self.code} after {self.end.seconds:.1f} s {self.said or ''} {self.end.err.strip()[-500:]}"
        )


class Fetch:
    """A `swarm fetch` that stands ready."""

    def __init__(self, host: int, prepared: Prepared, path: Path) -> None:
        self.host, self.prepared, self.path = host, prepared, path

    def result(self) -> Fetched:
        """Once it has ended."""
        assert self.prepared.ended is not None
        return Fetched(self.host, self.prepared.ended, _last_object(self.prepared.ended.out), self.path)


def _last_object(out: str) -> dict[str, Any]:
    for line in reversed(out.splitlines()):
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            return said
    return {}


class Daemon:
    """One `swarm daemon`.

    Attributes:
        ready_after: Seconds from its start to ``READY=1``.
    """

    def __init__(self, host: int, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> None:
        self.host = host
        self.directory = directory
        self.data_dir = directory / "data"
        self.log = directory / "daemon.log"
        directory.mkdir(parents=True, exist_ok=True)
        notify = directory / "notify"
        notify.unlink(missing_ok=True)
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(str(notify))
        self._began = time.monotonic()
        self.ready_after: float | None = None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment, "NOTIFY_SOCKET": str(notify)},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> float:
        """Seconds from start to ``READY=1``.

        Raises:
            NotReady: It ended, or said nothing in time; the message holds the end of its log.
        """
        deadline = self._began + timeout
        self._notified.settimeout(0.2)
        while self.ready_after is None:
            try:
                if b"READY=1" in self._notified.recv(4096):
                    self.ready_after = time.monotonic() - self._began
            except TimeoutError:
                if not self.running or time.monotonic() > deadline:
                    raise NotReady(f"the daemon of host {self.host} is not ready: {self.tail()}") from None
        return self.ready_after

    def tail(self, length: int = 2000) -> str:
        return self.log.read_text(errors="replace")[-length:]

    def kill(self) -> None:
        """As a power cut would: SIGKILL, nothing is put in order."""
        self.process.kill()
        self.wait_ended(10)

    def terminate(self, timeout: float = 40) -> int:
        """SIGTERM; returns the exit code once it has ended."""
        self.process.terminate()
        return self.wait_ended(timeout)

    def wait_ended(self, timeout: float) -> int:
        """Wait for its end; returns the exit code.

        Raises:
            NotReady: It still runs after `timeout` seconds.
        """
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NotReady(f"the daemon of host {self.host} did not end in {timeout} s: {self.tail()}") from None

    def close(self) -> None:
        if self.running:
            self.process.kill()
            self.process.wait(10)
        self._notified.close()

    def statistics(self) -> tuple[float, int, int]:
        """Processor seconds, bytes resident now and at most; of a daemon that runs."""
        return cpu_seconds(self.pid), *resident(self.pid)


class Cluster:
    """Daemons on hosts; use it with `with`.  Everything it started is gone and removed afterwards.

    Args:
        hosts: Where; every host but the origin gets at most one daemon.
        network: A network directory per host; without it all are in one open network.
        options: Further arguments of every daemon.
        parent: Where the directories of all hosts go.
    """

    def __init__(
        self,
        hosts: Hosts,
        *,
        network: Mapping[int, Path] | None = None,
        options: Sequence[str] = (),
        parent: Path | None = None,
    ) -> None:
        self.hosts = hosts
        self.daemons: dict[int, Daemon] = {}
        self._network = network
        self._options = options
        self._parent = parent or hosts_dir()
        self._fetches: list[Fetch] = []
        self.root = Path()

    def __enter__(self) -> Cluster:
        self.root = make_directory("cluster", self._parent)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self._show_logs()
        finally:
            for fetch in self._fetches:
                fetch.prepared.close()
            for daemon in self.daemons.values():
                daemon.close()
            shutil.rmtree(self.root, ignore_errors=True)

    def _show_logs(self) -> None:
        """Printed where a test fails: pytest shows it with the failure."""
        for daemon in self.daemons.values():
            print(f"--- host {daemon.host}: {daemon.tail()}", file=sys.stderr)

    # --- daemons --------------------------------------------------------------------------------------------------

    def directory(self, host: int) -> Path:
        return self.root / f"h{host}"

    def start(
        self,
        host: int,
        *extra: str,
        listen: str | None = None,
        join: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Daemon:
        """Start a host's daemon, again if it ran before; not yet ready.

        Args:
            extra: Further arguments of this daemon.
            listen: Instead of the host's own address.
            join: Whom it knows, instead of host 1.
            environment: What its environment has besides a bare host's.
        """
        if host in self.daemons:
            self.daemons[host].close()
        network = ["--network", str(self._network[host])] if self._network else ["--open-network", "bench"]
        known = join or self.hosts.endpoint(1, PORT)
        argv = [SWARM, "daemon", "--data-dir", str(self.directory(host) / "data"), *network]
        argv += ["--listen", listen or self.hosts.endpoint(host, PORT), *(["--join", known] if host != 1 else [])]
        # Through env(1): it is for the daemon, not for the `ip` that runs it.
        added = ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []
        command = self.hosts.command(host, [*added, *argv, *self._options, *extra])
        self.daemons[host] = Daemon(host, command, self.directory(host), clean_environment())
        return self.daemons[host]

    def start_all(self, *hosts: int) -> None:
        """Start these hosts' daemons (default: all), the first one first, and wait until all are ready."""
        chosen = hosts or tuple(self.hosts.each())
        self.start(chosen[0]).wait_ready()
        for host in chosen[1:]:
            self.start(host)
        for host in chosen[1:]:
            self.daemons[host].wait_ready()

    def settle(self, calm: float = 0.5, timeout: float = 20) -> None:
        """Wait until the daemons' start-up work is over: for `calm` seconds all together use under a tenth of a core.

        They pause up to `LINKED` seconds between looks for one another.
        """
        deadline = time.monotonic() + timeout
        calm_since = time.monotonic()
        before = self.cpu()
        while time.monotonic() < min(deadline, calm_since + calm):
            time.sleep(0.5)
            now = self.cpu()
            if now - before >= 0.05:
                calm_since = time.monotonic()
            before = now

    def cpu(self) -> float:
        """Processor seconds of the daemons that run."""
        return sum(cpu_seconds(daemon.pid) for daemon in self.daemons.values() if daemon.running)

    def most_resident(self) -> int:
        """Bytes: the most that any one daemon that runs ever had resident."""
        return max((resident(daemon.pid)[1] for daemon in self.daemons.values() if daemon.running), default=0)

    def stop(self) -> None:
        """SIGTERM to all at once, and wait for their ends."""
        running = [daemon for daemon in self.daemons.values() if daemon.running]
        for daemon in running:
            daemon.process.terminate()
        for daemon in running:
            daemon.wait_ended(40)  # a second SIGTERM would cut the first one's work short

    # --- commands -------------------------------------------------------------------------------------------------

    def fetch(self, host: int, url: str, *options: str, output: Path | None = None, name: str = "copy") -> Fetch:
        """A `swarm fetch --json` that stands ready on a host; let it go with `start_together` or `fetch_all`."""
        path = output or self.directory(host) / name
        self.directory(host).mkdir(exist_ok=True)
        data_dir = self.directory(host) / "data"
        argv = [SWARM, "fetch", url, "-o", str(path), "--data-dir", str(data_dir), "--json", *options]
        command = self.hosts.command(host, argv)
        prepared = Prepared(command, self.directory(host), f"fetch-{name}", environment=clean_environment())
        fetch = Fetch(host, prepared, path)
        self._fetches.append(fetch)
        return fetch

    def fetch_all(self, url: str, *options: str, timeout: float, on: Sequence[int] = (), name: str = "copy") -> list[Fetched]:
        """Fetch on all hosts (or `on` some) at the same moment and wait for all."""
        fetches = [self.fetch(host, url, *options, name=name) for host in on or self.hosts.each()]
        start_together([it.prepared for it in fetches])
        return self.finish(fetches, timeout)

    def finish(self, fetches: Sequence[Fetch], timeout: float) -> list[Fetched]:
        wait([it.prepared for it in fetches], timeout)
        return [it.result() for it in fetches]

    def fetch_one(self, host: int, url: str, *options: str, timeout: float, name: str = "copy") -> Fetched:
        return self.fetch_all(url, *options, timeout=timeout, on=[host], name=name)[0]

    def command(self, host: int, *arguments: str, timeout: float = 20) -> subprocess.CompletedProcess[str]:
        """A short `swarm` command against a host's daemon."""
        argv = self.hosts.command(host, [SWARM, *arguments])
        environment = {**clean_environment(), "SWARM_DATA_DIR": str(self.directory(host) / "data")}
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=environment)

    def signal(self, host: int, number: signal.Signals) -> None:
        self.daemons[host].process.send_signal(number)
