"""Hosts whose container runtimes pull through `swarm daemon --mirror`, and a registry in host 0."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.system.cluster import SWARM, Cluster, clean_environment, hosts_dir
from tests.system.hosts import Hosts, make_directory
from tests.system.images import Image, Kind, Layer
from tests.system.registry import Access, Registry
from tests.system.runtimes import Containerd, Place, Podman, Pulled, Skopeo

MIRROR: Final = "127.0.0.1:7402"  # each host has its own loopback
BASE: Final = f"http://{MIRROR}"


class Mirrored:
    """What a test of the mirror works with; made by `mirrored`."""

    def __init__(self, hosts: Hosts, registry: Registry, cluster: Cluster, work: Path, stack: ExitStack) -> None:
        self.hosts, self.registry, self.cluster, self.work = hosts, registry, cluster, work
        self._stack = stack

    # --- clients --------------------------------------------------------------------------------------------------

    def containerd(self, host: int, *, mirror: bool = True) -> Containerd:
        """A containerd that runs in a host; with `mirror` as `swarm mirror configure` leaves it."""
        containerd = Containerd(self.work / f"c{host}", Place(self.hosts, host))
        self._stack.enter_context(containerd)
        if mirror:
            self.configure("--containerd", containerd.certs)
        else:
            directory = containerd.certs / self.registry.name
            directory.mkdir()
            (directory / "hosts.toml").write_text(f'[host."{self.registry.base}"]\n  capabilities = ["pull", "resolve"]\n')
        return containerd

    def podman(self, host: int) -> Podman:
        podman = Podman(self.work / f"p{host}", Place(self.hosts, host))
        self.configure("--podman", podman.registries)
        return podman

    def skopeo(self, host: int) -> Skopeo:
        skopeo = Skopeo(self.work / f"s{host}", Place(self.hosts, host))
        self.configure("--podman", skopeo.registries)
        return skopeo

    def configure(self, *place: object) -> None:
        """`swarm mirror configure`; Docker knows no registry but Docker Hub."""
        registries = [] if "--docker" in place else ["--registry", self.registry.base]
        argv = [SWARM, "mirror", "configure", *map(str, place), "--mirror", BASE, *registries]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, env=clean_environment())
        assert done.returncode == 0, done.stderr

    # --- the mirror itself ----------------------------------------------------------------------------------------

    def get(self, host: int, path: str, *options: str, timeout: float = 30) -> tuple[int, bytes, float]:
        """What curl gets from a host's mirror; status (0: no complete answer), body, and seconds."""
        body = self.work / f"body{host}"
        body.unlink(missing_ok=True)
        argv = [
            "curl",
            "-s",
            "-m",
            str(timeout),
            "-o",
            str(body),
            "-w",
            "%{http_code} %{time_total}",
            *options,
            f"{BASE}{path}",
        ]
        done = subprocess.run(self.hosts.command(host, argv), capture_output=True, text=True, timeout=timeout + 5)
        status, seconds = done.stdout.split()
        complete = done.returncode == 0
        return int(status) if complete else 0, body.read_bytes() if body.exists() else b"", float(seconds)

    def first_byte(self, host: int, path: str, timeout: float = 30) -> tuple[int, float]:
        """Status, and seconds until the first byte of the content (not of the header); the rest is read too.

        A header needs no content, so curl's own figure would not say it.
        """
        script = (
            "import sys,time,urllib.request as u; a=time.monotonic(); r=u.urlopen(sys.argv[1],timeout=float(sys.argv[2])); "
        )
        script += "r.read(1); b=time.monotonic()-a; r.read(); print(r.status, b)"
        argv = [sys.executable, "-Ic", script, f"{BASE}{path}", str(timeout)]
        done = subprocess.run(self.hosts.command(host, argv), capture_output=True, text=True, timeout=timeout + 5, check=True)
        status, seconds = done.stdout.split()
        return int(status), float(seconds)

    def blob_path(self, repository: str, digest: str) -> str:
        return f"/v2/{repository}/blobs/{digest}?ns={self.registry.name}"

    def log(self, host: int) -> str:
        return self.cluster.daemons[host].log.read_text(errors="replace")


def members(directory: Path, *hosts: int) -> dict[int, Path]:
    """A closed network, with a member's directory for each host."""
    for argv in (
        ["create", str(directory / "ca")],
        ["issue", str(directory / "ca"), "--out", str(directory / "n"), "--count", "9"],
    ):
        subprocess.run([SWARM, "network", *argv], check=True, capture_output=True, timeout=30, env=clean_environment())
    return {host: directory / "n" / str(host) for host in hosts}


def settings(registry: Registry, more: str = "", **of_registry: object) -> str:
    """A configuration that lets the mirror read the registry, which has no TLS."""
    values = {"endpoint": registry.base, **of_registry}
    if registry.token_host:
        values.setdefault("token_hosts", [registry.token_host])
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join([more, f'[mirror.registry."{registry.name}"]', *lines, ""])


def _toml(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


@contextmanager
def mirrored(
    number: int,
    *,
    access: Access = "open",
    rate: str | None = None,
    network: Mapping[int, Path] | None = None,
    more: str = "",
    options: Sequence[str] = (),
    hub: bool = False,
    listed: bool = True,
    **of_registry: object,
) -> Iterator[Mirrored]:
    """`number` hosts with a registry in host 0; no daemon and no client runs yet.

    Args:
        rate: Of every link, in the words of `tc`.
        more: Further settings of the daemons, as TOML before the registry's table.
        hub: The registry is Docker Hub too.
        listed: `False`: no setting names the registry, whose address is private.
        of_registry: Settings of the registry's table.
    """
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(number))
        registry = stack.enter_context(Registry(hosts, access=access, parent=hosts_dir()))
        work = make_directory("m", hosts_dir())
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        config = work / "swarm.toml"
        table = f'[mirror.registry."docker.io"]\nendpoint = "{registry.base}"\n' if hub else ""
        config.write_text((settings(registry, more, **of_registry) if listed else more) + table)
        all_options = ["--config", str(config), "--mirror", MIRROR, *options]
        cluster = stack.enter_context(Cluster(hosts, network=dict(network) if network else None, options=all_options))
        if rate is not None:
            hosts.limit_all(rate)
        # Clients first: they would otherwise wait for a mirror that is gone.
        with ExitStack() as clients:
            yield Mirrored(hosts, registry, cluster, work, clients)


def small_image(registry: Registry, *, seed: int = 1, kind: Kind = Kind.OCI) -> Image:
    """About 3 MiB in three layers, of which the first is the same for every seed."""
    layers = [Layer(200_000, seed=1), Layer(2_000_000, seed=100 + seed), Layer(1_000_000, seed=200 + seed, random_share=0.6)]
    return registry.images.image(layers, kind)


def assert_pulled(*pulls: Pulled) -> None:
    assert [it for it in pulls if it.code != 0] == []
