"""Container runtimes that pull through their hosts' mirrors, and what one mirror can do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from swarm.task import MIN_PIECE_BYTES
from tests.benchmarks.many import BenchmarkFailed, work_directory
from tests.benchmarks.report import Run
from tests.system.cluster import LINKED, SWARM, Daemon, clean_environment, hosts_dir
from tests.system.images import MIB, Descriptor, Image, Layer
from tests.system.mirrored import Mirrored, mirrored, settings
from tests.system.origin import NginxOrigin
from tests.system.processes import Ended, Prepared, cpu_seconds, last_done, resident, spread, start_together, wait
from tests.system.registry import Registry
from tests.system.runtimes import Containerd, Pulled

MIRROR: Final = ("127.0.0.1", 7452)  # beside the usual port: these cases share the machine's loopback


@dataclass(frozen=True, slots=True)
class Setting:
    """Who pulls what over which links.

    Attributes:
        layers: Bytes of files in each, MiB.
        random_share: See `tests.system.images.Layer`.
        size: Bytes of the image, about; for the floor.
        origin: Rate of what the registry sends, Mbit/s, others being free.
        link: Rate of every link, Mbit/s.
    """

    hosts: int
    layers: tuple[int, ...]
    size: int
    random_share: float = 1.0
    origin: int | None = None
    link: int | None = None

    @property
    def floor(self) -> float:
        """Seconds that one copy needs over the registry's link, headers not counted."""
        rate = self.origin or self.link
        assert rate is not None
        return self.size * 8 / (rate * 1e6)

    @property
    def timeout(self) -> float:
        return self.floor * (self.hosts + 1) * 1.2 + 60

    def image(self, registry: Registry, seed: int) -> Image:
        layers = [Layer(mib * MIB, 10 * seed + n, self.random_share) for n, mib in enumerate(self.layers)]
        return registry.images.image(layers)


@contextmanager
def _laid_out(setting: Setting) -> Iterator[Mirrored]:
    with mirrored(setting.hosts, rate=f"{setting.link}mbit" if setting.link else None) as m:
        if setting.origin is not None:
            m.hosts.limit(0, egress=f"{setting.origin}mbit")
        yield m


# --- containerd -----------------------------------------------------------------------------------------------------


def containerds(setting: Setting, seed: int, *, mirror: bool = True) -> Run:
    """All pull at the same moment, as a kubelet has them do: fetched and unpacked.

    Args:
        mirror: `False`: each reads the registry, for comparison.
    """
    with _laid_out(setting) as m:
        image = setting.image(m.registry, seed)
        reference = m.registry.push(image, "bench/image", "v1")
        if mirror:
            m.cluster.start_all()
        clients = [m.containerd(host, mirror=mirror) for host in m.hosts.each()]
        m.cluster.settle()
        before = (m.cluster.cpu(), _cpu([it.pid for it in clients]), m.hosts.traffic()[0].sent)
        pulled, seconds, apart = _together([it.cri_pull for it in clients], reference, setting.timeout)
        _check(pulled, clients, image, m.registry)
        daemons, most_resident = m.cluster.cpu() - before[0], m.cluster.most_resident()
        clients_cpu = _cpu([it.pid for it in clients]) - before[1]
        m.cluster.stop()
        figures = {
            "copies": m.registry.copies(image),
            "seconds": seconds,
            "start_spread_s": apart,
            "interface_copies": (m.hosts.traffic()[0].sent - before[2]) / image.size,
            "image_mib": image.size / MIB,
            "daemons_cpu_s": daemons,
            "clients_cpu_s": clients_cpu,
            "most_resident_mib": most_resident / MIB,
        }
        return Run(figures, {"pulls": [it.seconds for it in pulled], **_copies_by_layer(m.registry, image)})


def fetching(setting: Setting, seed: int) -> Run:
    """`ctr content fetch` in every host at the same moment: no unpacking."""
    with _laid_out(setting) as m:
        image = setting.image(m.registry, seed)
        reference = m.registry.push(image, "bench/image", "v1")
        m.cluster.start_all()
        clients = [m.containerd(host) for host in m.hosts.each()]
        m.cluster.settle()
        daemons = m.cluster.cpu()
        ends = _run_together(m, clients, reference, setting.timeout)
        _check_content(clients, image, m.registry)
        figures = {
            "seconds": last_done(ends),
            "start_spread_s": spread(ends),
            "daemons_cpu_s": m.cluster.cpu() - daemons,
            "most_resident_mib": m.cluster.most_resident() / MIB,
            "image_mib": image.size / MIB,
        }
        m.cluster.stop()
        return Run({**figures, "copies": m.registry.copies(image)}, _copies_by_layer(m.registry, image))


def updating(setting: Setting, seed: int) -> Run:
    """All have an image; all pull another one that shares all layers but the last."""
    with _laid_out(setting) as m:
        old = setting.image(m.registry, seed)
        layers = [Layer(mib * MIB, 10 * seed + n, setting.random_share) for n, mib in enumerate(setting.layers)]
        new = m.registry.images.image([*layers[:-1], Layer(layers[-1].size, 10 * seed + 9, setting.random_share)])
        references = [m.registry.push(it, "bench/image", tag) for it, tag in ((old, "v1"), (new, "v2"))]
        m.cluster.start_all()
        clients = [m.containerd(host) for host in m.hosts.each()]
        pulled, _, _ = _together([it.cri_pull for it in clients], references[0], setting.timeout)
        _check(pulled, clients, old, m.registry)
        # Connections that are still open have requests that are not in the log yet.
        m.cluster.settle()
        m.registry.forget()
        pulled, seconds, apart = _together([it.cri_pull for it in clients], references[1], setting.timeout)
        _check(pulled, clients, new, m.registry)
        m.cluster.stop()
        figures = {
            "new_layer_copies": m.registry.copies_of(new.layers[-1]),
            "old_layers_bytes": float(sum(it.sent for layer in new.layers[:-1] for it in m.registry.reads(layer.digest))),
            "seconds": seconds,
            "start_spread_s": apart,
        }
        return Run(figures, _copies_by_layer(m.registry, new))


def from_peer(link: int, seed: int) -> Run:
    """One host has an image; another asks its mirror for the manifest, and then for each layer: how long to the first byte.

    Every layer is small enough to be cut in the smallest pieces, of which the first is needed before a byte can be given out.
    """
    with mirrored(2, rate=f"{link}mbit") as m:
        image = m.registry.images.image([Layer(16 * MIB, 10 * seed + n) for n in range(9)])
        m.registry.push(image, "bench/image", "v1")
        m.cluster.start_all()
        manifest = f"/v2/bench/image/manifests/{image.digest}?ns={m.registry.name}"
        for path in (manifest, *(m.blob_path("bench/image", it.digest) for it in image.layers)):
            _answered(m.get(1, path, timeout=60)[0])
        m.cluster.settle(LINKED)
        m.registry.forget()
        _answered(m.get(2, manifest)[0])
        waits = []
        for layer in image.layers:
            status, waited = m.first_byte(2, m.blob_path("bench/image", layer.digest))
            _answered(status)
            waits.append(waited)
        m.cluster.stop()
        piece = MIN_PIECE_BYTES * 8 / (link * 1e6)
        figures = {
            "first_byte_s": sorted(waits)[len(waits) // 2],
            "last_first_byte_s": max(waits),
            "beyond_piece_s": max(waits) - piece,
            "copies": m.registry.copies(image),
        }
        return Run(figures, {"first_bytes": waits})


def _answered(status: int) -> None:
    if status != 200:
        raise BenchmarkFailed(f"the mirror answered {status}")


def _together(pulls: Sequence[Callable[..., Pulled]], reference: str, timeout: float) -> tuple[list[Pulled], float, float]:
    """What came of them, seconds from the first beginning to the last end, and between first and last beginning."""
    starts: list[float] = []

    def pull(one: Callable[..., Pulled]) -> Pulled:
        starts.append(time.monotonic())
        return one(reference, timeout=timeout)

    with ThreadPoolExecutor(len(pulls)) as threads:
        pulled = list(threads.map(pull, pulls))
        ended = time.monotonic()
    return pulled, ended - min(starts), max(starts) - min(starts)


def _run_together(m: Mirrored, clients: Sequence[Containerd], reference: str, timeout: float) -> list[Ended]:
    prepared = [
        Prepared(m.hosts.command(host, client.fetching(reference)), client.directory, "fetch", environment=clean_environment())
        for host, client in zip(m.hosts.each(), clients, strict=True)
    ]
    try:
        start_together(prepared)
        ends = wait(prepared, timeout)
    finally:
        for it in prepared:
            it.close()
    for end in ends:
        if end.code:
            raise BenchmarkFailed(f"ctr: exit {end.code}: {end.err[-500:]}")
    return ends


def _check(pulled: Sequence[Pulled], clients: Sequence[Containerd], image: Image, registry: Registry) -> None:
    for it in pulled:
        if it.code:
            raise BenchmarkFailed(f"a pull failed after {it.seconds:.1f} s: {it.said[-500:]}")
    _check_content(clients, image, registry)


def _check_content(clients: Sequence[Containerd], image: Image, registry: Registry) -> None:
    """containerd checked the digests; that it has everything is what remains."""
    for client in clients:
        for blob in image.blobs:
            path = client.content(blob.digest)
            if not path.exists() or path.stat().st_size != registry.images.path(blob.digest).stat().st_size:
                raise BenchmarkFailed(f"a client lacks {blob.digest}")


def _copies_by_layer(registry: Registry, image: Image) -> dict[str, Any]:
    return {
        "copies_by_layer": [registry.copies_of(layer) for layer in image.layers],
        "layers": [it.size for it in image.layers],
    }


def _cpu(pids: Sequence[int]) -> float:
    """Processor seconds of processes and of the children they have now."""
    return sum(cpu_seconds(pid) + _cpu(_children(pid)) for pid in pids)


def _children(pid: int) -> list[int]:
    return [int(it) for it in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- one mirror -----------------------------------------------------------------------------------------------------


@contextmanager
def _one_mirror(registry: Registry) -> Iterator[Daemon]:
    """A daemon on loopback with a mirror in front of this registry."""
    address, port = MIRROR
    with work_directory(hosts_dir()) as work:
        config = work / "swarm.toml"
        config.write_text(settings(registry))
        argv = [SWARM, "daemon", "--config", str(config), "--data-dir", str(work / "d/data"), "--open-network", "bench"]
        argv += ["--listen", f"{address}:7450", "--http", f"{address}:7453", "--mirror", f"{address}:{port}"]
        daemon = Daemon(0, argv, work / "d", clean_environment())
        try:
            daemon.wait_ready()
            yield daemon
        finally:
            daemon.close()


def _path(registry: Registry, kind: str, digest: str) -> str:
    return f"/v2/bench/image/{kind}/{digest}?ns={registry.name}"


def local(length: int, seed: int) -> Run:
    """A blob that the node has, to `curl -o /dev/null`; the same file by nginx in the same run; manifests per second."""
    with Registry(parent=hosts_dir()) as registry, NginxOrigin(parent=hosts_dir()) as nginx, _one_mirror(registry) as daemon:
        image = registry.images.image([Layer(length, seed)])
        registry.push(image, "bench/image", "v1")
        blob = image.layers[0]
        (nginx._root / "files/blob").hardlink_to(registry.images.path(blob.digest))
        url = f"http://{MIRROR[0]}:{MIRROR[1]}{_path(registry, 'blobs', blob.digest)}"
        _curl(url, blob)
        _curl(nginx.url("blob"), blob)
        theirs, theirs_cpu = _measured(lambda: _curl(nginx.url("blob"), blob), nginx.pid)
        ours, ours_cpu = _measured(lambda: _curl(url, blob), daemon.pid)
        manifests = _pulling(_path(registry, "manifests", image.digest), 8, "--requests", "8000")
        gib = blob.size / (1 << 30)
        figures = {
            "mib_per_s": blob.size / MIB / ours,
            "nginx_mib_per_s": blob.size / MIB / theirs,
            "of_nginx_rate": theirs / ours,
            "cpu_s_per_gib": ours_cpu / gib,
            "nginx_cpu_s_per_gib": theirs_cpu / gib,
            "of_nginx_cpu": ours_cpu / theirs_cpu,
            "manifests_per_s": float(manifests["per_s"]),
            "manifest_errors": float(manifests["errors"]),
            "first_byte_s": _first_byte(url),
            "copies": registry.copies_of(blob),
        }
        return Run(figures, {"manifests": manifests})


def _curl(url: str, blob: Descriptor) -> float:
    """Seconds."""
    argv = ["curl", "-sSf", "-o", "/dev/null", "-w", "%{size_download} %{time_total}", url]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    if done.returncode or int(done.stdout.split()[0]) != blob.size:
        raise BenchmarkFailed(f"curl: exit {done.returncode}: {done.stdout} {done.stderr}")
    return float(done.stdout.split()[1])


def _measured(transfer: Callable[[], float], pid: int, times: int = 5) -> tuple[float, float]:
    """Seconds and the server's processor seconds of one transfer: the median and the mean of several."""
    before = _cpu([pid])
    seconds = sorted(transfer() for _ in range(times))
    return seconds[times // 2], (_cpu([pid]) - before) / times


def _first_byte(url: str) -> float:
    """Median seconds until the first byte of an answer, the connection included."""
    argv = ["curl", "-sSf", "-r", "0-0", "-o", "/dev/null", "-w", "%{time_starttransfer}", url]
    times = sorted(float(subprocess.run(argv, capture_output=True, check=True, timeout=30).stdout) for _ in range(15))
    return times[len(times) // 2]


def crowd(clients: int, length: int, seed: int) -> Run:
    """All clients at once want one blob that nobody has yet."""
    with Registry(parent=hosts_dir()) as registry, _one_mirror(registry) as daemon:
        image = registry.images.image([Layer(length, seed)])
        registry.push(image, "bench/image", "v1")
        blob = image.layers[0]
        before = _cpu([daemon.pid])
        found = _pulling(_path(registry, "blobs", blob.digest), clients)
        cpu, most_resident = _cpu([daemon.pid]) - before, resident(daemon.pid)[1]
        if found["digests"] != [blob.digest.removeprefix("sha256:")]:
            raise BenchmarkFailed(f"a client got other bytes than the registry's: {found}")
        daemon.terminate()
        figures = {
            "copies": registry.copies_of(blob),
            "errors": float(found["errors"]),
            "most_resident_mib": most_resident / MIB,
            "seconds": float(found["seconds"]),
            "last_first_byte_s": float(found["last_first_byte_s"]),
            "cpu_s": cpu,
        }
        return Run(figures, {"clients": found})


def _pulling(path: str, clients: int, *options: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "tests.benchmarks.pulling", *map(str, MIRROR), path, str(clients), *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=400)
    if done.returncode:
        raise BenchmarkFailed(f"tests.benchmarks.pulling: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
