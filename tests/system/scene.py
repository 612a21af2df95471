"""What most system tests stand on: hosts, an origin with one file, daemons; and what they assert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.system.cluster import Cluster, Fetched, hosts_dir, same
from tests.system.hosts import Hosts
from tests.system.origin import File, NginxOrigin


@dataclass(frozen=True, slots=True)
class Scene:
    hosts: Hosts
    origin: NginxOrigin
    cluster: Cluster
    file: File

    @property
    def url(self) -> str:
        return self.origin.url(self.file.name)

    def copies(self) -> float:
        """Copies out of the origin so far.

        Reads still open are not counted: stop the daemons, or know that none is.
        """
        return self.origin.copies(self.file)

    def assert_all_have_it(self, fetched: Sequence[Fetched]) -> None:
        failed = [str(it) for it in fetched if it.code != 0]
        assert not failed, "\n".join(failed)
        assert [it.host for it in fetched if not same(it.path, self.file)] == []


@contextmanager
def scene(
    number: int,
    length: int,
    *,
    rate: str | None = None,
    ipv4: bool = True,
    ipv6: bool = False,
    network: dict[int, Path] | None = None,
    options: Sequence[str] = (),
) -> Iterator[Scene]:
    """`number` hosts, every link at `rate`, an origin with a file of `length` bytes; no daemon runs yet."""
    with (
        Hosts(number, ipv4=ipv4, ipv6=ipv6) as hosts,
        NginxOrigin(hosts, parent=hosts_dir()) as origin,
        Cluster(hosts, network=network, options=options) as cluster,
    ):
        file = origin.add("content", length)
        if rate is not None:
            hosts.limit_all(rate)
        yield Scene(hosts, origin, cluster, file)
