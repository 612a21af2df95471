"""N hosts on one machine: a network namespace each, joined by a bridge that lives in a namespace of its own.

Nothing touches the machine's own interfaces or routes, so nothing outside can be reached from a host.  Host 0 is the
origin.  Every namespace and directory is named after the process that made it, by pid and start time: two runs do not
meet, and whoever comes next removes what a killed run left behind.

Rates are shaped by `tbf`, the one qdisc every kernel has: what a host sends on its own interface, what it receives on
the bridge's side of it.  The kernel need not have `netem`; loss is made by iptables.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final

PREFIX: Final = "swarmtest"
MAX_HOSTS: Final = 200  # the last number of a /24, with the origin's and some spare

# A burst of 256 KiB holds a few GSO packets of 64 KiB, which a smaller bucket would drop or cut; 50 ms of queue behind
# it is what a home router has, and keeps TCP at the full rate.
TBF: Final = ("burst", "256kb", "latency", "50ms")

_OWNER: Final = re.compile(rf"^{PREFIX}-(\d+)-(\d+)-")
_serial = count(1)


class HostsError(Exception):
    """A namespace, link or qdisc could not be made; the message is what `ip`, `tc` or `iptables` said."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes through a host's interface since it was made, headers included."""

    received: int
    sent: int


def run(*argv: str, stdin: str | None = None) -> str:
    """Run a short command to its end and return what it printed.

    Raises:
        HostsError: It failed.
    """
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise HostsError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _ip(lines: Iterable[str], namespace: str | None = None) -> None:
    run("ip", *(["-n", namespace] if namespace else []), "-batch", "-", stdin="\n".join(lines) + "\n")


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; `None` if there is none.  With the pid it names one process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def namespaces() -> list[str]:
    return [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line]


def owned_name() -> str:
    """The beginning of every name this process gives to something that would outlive it."""
    pid = os.getpid()
    return f"{PREFIX}-{pid}-{_start_time(pid)}-"


def _is_stale(name: str) -> bool:
    """Whether the process that gave this name is gone; a later one with its pid has another start time."""
    owner = _OWNER.match(name)
    return owner is not None and _start_time(int(owner[1])) != int(owner[2])


def remove_stale() -> list[str]:
    """Remove the namespaces of processes that are gone; returns their names."""
    stale = [name for name in namespaces() if _is_stale(name)]
    for name in stale:
        _remove(name)
    return stale


def make_directory(kind: str, parent: Path) -> Path:
    """A new directory that the next `make_directory` in `parent` removes if this process leaves it behind."""
    for path in parent.glob(f"{PREFIX}-*"):
        if _is_stale(path.name):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{owned_name()}{kind}-", dir=parent))


def _remove(namespace: str) -> None:
    """Kill what runs in a namespace of ours, then delete it."""
    for pid in run("ip", "netns", "pids", namespace).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    run("ip", "netns", "del", namespace)


class Hosts:
    """Hosts 0 (the origin) to `number`; use it with `with`.

    Args:
        number: How many hosts besides the origin, at most `MAX_HOSTS`.
        ipv4: Whether hosts have 10.77.0.x.
        ipv6: Whether hosts have fd77::x.
    """

    def __init__(self, number: int, *, ipv4: bool = True, ipv6: bool = False) -> None:
        if not 0 <= number <= MAX_HOSTS:
            raise ValueError(f"at most {MAX_HOSTS} hosts, not {number}")
        if not (ipv4 or ipv6):
            raise ValueError("a host needs an address family")
        self.number = number
        self.ipv4, self.ipv6 = ipv4, ipv6
        self._prefix = f"{owned_name()}{next(_serial)}"
        self._bridge = f"{self._prefix}-bridge"

    # --- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Hosts:
        remove_stale()
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    def _up(self) -> None:
        _ip(f"netns add {name}" for name in (self._bridge, *map(self.namespace, self.all())))
        _ip(
            (
                "link set lo up",
                # No spanning-tree delay: a port forwards as soon as it is up.
                "link add br0 type bridge forward_delay 0",
                "link set br0 type bridge mcast_snooping 0",
                "link set br0 up",
            ),
            self._bridge,
        )
        # A switch has no firewall: where the machine has br_netfilter loaded, each frame would go through its hooks.
        off = 'for f in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -e "$f" ] || echo 0 > "$f"; done'
        run("ip", "netns", "exec", self._bridge, "sh", "-c", off)
        for host in self.all():
            self._add(host)

    def _add(self, host: int) -> None:
        port, namespace = f"port{host}", self.namespace(host)
        _ip(
            (
                f"link add {port} type veth peer name eth0 netns {namespace}",
                f"link set {port} master br0",
                f"link set {port} up",
            ),
            self._bridge,
        )
        lines = ["link set lo up"]
        if self.ipv4:
            lines.append(f"addr add {self._ipv4(host)}/24 dev eth0")
        if self.ipv6:
            # nodad: usable at once instead of after a second of duplicate detection.
            lines.append(f"addr add {self._ipv6(host)}/64 dev eth0 nodad")
        lines.append("link set eth0 up")
        if self.ipv4:
            # A default route into nowhere, so that a dial elsewhere sends a packet that a test can count.
            lines.append("route add default via 10.77.0.253 onlink dev eth0")
        if self.ipv6:
            lines.append("route add default via fd77::fffd dev eth0")
        _ip(lines, namespace)

    def down(self) -> None:
        """Kill every process in the namespaces and remove them; harmless when repeated."""
        ours = [name for name in namespaces() if name.startswith(f"{self._prefix}-")]
        for name in ours:
            _remove(name)

    # --- names ----------------------------------------------------------------------------------------------------

    def all(self) -> range:
        """Every host, the origin first."""
        return range(self.number + 1)

    def each(self) -> range:
        """Every host but the origin."""
        return range(1, self.number + 1)

    def namespace(self, host: int) -> str:
        return f"{self._prefix}-h{host}"

    def _ipv4(self, host: int) -> str:
        return f"10.77.0.{host or 254}"

    def _ipv6(self, host: int) -> str:
        return f"fd77::{host or 254:x}"

    def address(self, host: int) -> str:
        """The host's address: IPv4 where there is one."""
        return self._ipv4(host) if self.ipv4 else self._ipv6(host)

    def endpoint(self, host: int, port: int) -> str:
        """``address:port``, with brackets around IPv6."""
        return f"{self._ipv4(host)}:{port}" if self.ipv4 else f"[{self._ipv6(host)}]:{port}"

    # --- processes ------------------------------------------------------------------------------------------------

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """`argv` as run inside the host; `ip netns exec` becomes the program, so its pid is the program's."""
        return ["ip", "netns", "exec", self.namespace(host), *argv]

    def popen(self, host: int, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program in a host; the caller ends it, `down` kills what is left."""
        return subprocess.Popen(self.command(host, argv), **options)

    def run(self, host: int, *argv: str) -> str:
        """Run a short command in a host to its end."""
        return run(*self.command(host, argv))

    # --- links ----------------------------------------------------------------------------------------------------

    def limit(self, host: int, *, egress: str | None = None, ingress: str | None = None) -> None:
        """Shape what a host sends and receives, in the words of `tc` (``"50mbit"``); `None` leaves a direction alone."""
        for rate, namespace, device in ((egress, self.namespace(host), "eth0"), (ingress, self._bridge, f"port{host}")):
            if rate is not None:
                run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, *TBF)

    def limit_all(self, rate: str) -> None:
        """Every link, the origin's too, at one rate both ways."""
        for host in self.all():
            self.limit(host, egress=rate, ingress=rate)

    def loss(self, host: int, fraction: float) -> None:
        """Drop this fraction, in [0, 1), of what arrives at a host; 0 heals it."""
        rule = ("INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random", "--probability", str(fraction), "-j", "DROP")
        for tables in self._tables():
            self.run(host, tables, "-F", "INPUT")
            if fraction:
                self.run(host, tables, "-A", *rule)

    def cut(self, *hosts: int) -> None:
        """Pull the cable of these hosts."""
        _ip((f"link set port{host} down" for host in hosts), self._bridge)

    def heal(self, *hosts: int) -> None:
        """Plug the cable in again."""
        _ip((f"link set port{host} up" for host in hosts), self._bridge)

    def split(self, one: Iterable[int], other: Iterable[int]) -> None:
        """Partition: nothing passes between the two groups until `unsplit`."""
        one, other = tuple(one), tuple(other)
        for here, there in ((one, other), (other, one)):
            for host in here:
                self._drop_from(host, there)

    def _drop_from(self, host: int, senders: Iterable[int]) -> None:
        for tables in self._tables():
            of = self._ipv4 if tables == "iptables" else self._ipv6
            self.run(host, tables, "-I", "INPUT", "-s", ",".join(map(of, senders)), "-j", "DROP")

    def unsplit(self, *hosts: int) -> None:
        for host in hosts:
            for tables in self._tables():
                self.run(host, tables, "-F", "INPUT")

    def _tables(self) -> list[str]:
        return ["iptables"] * self.ipv4 + ["ip6tables"] * self.ipv6

    def count_packets_to(self, host: int, destination: str) -> None:
        """Begin to count what a host sends to a network, such as ``"169.254.0.0/16"``; read with `packets_to`."""
        tables = "ip6tables" if ":" in destination else "iptables"
        self.run(host, tables, "-I", "OUTPUT", "-d", destination)

    def packets_to(self, host: int, *, ipv6: bool = False) -> int:
        """Packets that every rule of `count_packets_to` has seen in this host."""
        listing = self.run(host, "ip6tables" if ipv6 else "iptables", "-L", "OUTPUT", "-v", "-n", "-x")
        return sum(int(line.split()[0]) for line in listing.splitlines()[2:])

    def traffic(self) -> dict[int, Traffic]:
        """What went through each host's interface so far."""
        return {host: self._traffic(host) for host in self.all()}

    def _traffic(self, host: int) -> Traffic:
        shown = run("ip", "-n", self.namespace(host), "-s", "-j", "link", "show", "dev", "eth0")
        counted = json.loads(shown)[0]["stats64"]
        return Traffic(received=counted["rx"]["bytes"], sent=counted["tx"]["bytes"])
