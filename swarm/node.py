"""A running node as its faces see it: the control socket, the HTTP face and the metrics ask nothing else."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from swarm import __version__
from swarm.announce import Announcer
from swarm.config import Settings
from swarm.control.api import Content, ControlServer
from swarm.control.views import find_entry, task_view
from swarm.dht.node import DhtNode
from swarm.download.request import Fetched, FetchRequest, Progress, TaskActivity
from swarm.download.service import DownloadService
from swarm.edges import Address, Source, StoredTask
from swarm.errors import ConfigError, StoreError
from swarm.metrics import Histogram, Sample
from swarm.network import Network
from swarm.origin.origin import OriginReader
from swarm.peer.hub import PeerHub
from swarm.peer.settings import Ports
from swarm.quantities import MIB
from swarm.store.disk import DiskStore
from swarm.task import split_url

if TYPE_CHECKING:
    from swarm.mirror.mirror import Mirror

log = structlog.get_logger(__name__)

MAX_REMEMBERED_FETCHES: Final = 1024
"""Finished fetches whose numbers `task show` can still give."""

REPAIRS: Final = 3
"""How often a fetch starts over because what the store had turned out rotten."""

COPY_BYTES: Final = 1 * MIB

PAGE_BYTES: Final = resource.getpagesize()


NOT_LISTENING: Final = Ports(0, 0)


@dataclass(slots=True)
class Swarm:
    """The parts that talk to other nodes, and where they listen."""

    dht: DhtNode
    announcer: Announcer
    service: DownloadService
    hub: PeerHub
    host: str
    ports: Ports = NOT_LISTENING

    def listens(self, port: int) -> Address:
        return Address(self.host, port)


class Node:
    """Fetches, views and samples.

    Attributes:
        is_ready: Started, and not stopping.
        durations: Of fetches that succeeded, seconds.
        control: Set once there is one.
        mirror: The registry face, where there is one.
    """

    def __init__(
        self,
        settings: Settings,
        membership: Network,
        store: DiskStore,
        swarm: Swarm,
        origin: OriginReader,
        face: socket.socket | None,
    ) -> None:
        self._settings = settings
        self._membership = membership
        self._store = store
        self._swarm = swarm
        self._origin = origin
        self._face = face
        self._began = trio.current_time()
        self._finished: OrderedDict[bytes, Fetched] = OrderedDict()
        self.is_ready = False
        self.durations = Histogram()
        self.control: ControlServer | None = None
        self.mirror: Mirror | None = None

    # --- fetching -------------------------------------------------------------------------------------------------

    async def fetch(
        self,
        request: FetchRequest,
        progress: Callable[[Progress], None] | None,
        opened: Callable[[StoredTask | None], None] | None = None,
    ) -> tuple[Fetched, Content]:
        """Have the content, and open it; `opened` as for `DownloadService.fetch`.

        What an earlier run left in the store is hashed before it is handed out; what rotted is fetched again.

        Raises:
            SwarmError: As `DownloadService.fetch`.
        """
        for _ in range(REPAIRS):
            fetched, stored = await self._swarm.service.fetch(request, progress, opened)
            try:
                rotten = await stored.verify() if fetched.from_local else []
                if not rotten:
                    self._remember(fetched)
                    return await self._content(request, fetched, stored)
            except BaseException:
                stored.close()
                raise
            stored.close()
            log.warning("stored content is rotten, fetching it again", task=fetched.task_id, pieces=len(rotten))
        raise StoreError("the disk keeps changing what is written to it; check it, or use another --data-dir")

    def _remember(self, fetched: Fetched) -> None:
        before = self._finished.pop(fetched.task_id, None)
        # A fetch served from the store says nothing about how the content came here: keep what does.
        whole = fetched.from_local == fetched.length
        self._finished[fetched.task_id] = before if before is not None and whole else fetched
        while len(self._finished) > MAX_REMEMBERED_FETCHES:
            self._finished.popitem(last=False)
        self.durations.observe(fetched.seconds)
        log.info(
            "fetched",
            task=fetched.task_id,
            bytes=fetched.length,
            seconds=round(fetched.seconds, 3),
            from_origin=fetched.from_origin,
            from_peers=fetched.from_peers,
            from_local=fetched.from_local,
            peers=fetched.peers,
            why_origin=fetched.why_origin,
        )

    async def _content(self, request: FetchRequest, fetched: Fetched, stored: StoredTask) -> tuple[Fetched, Content]:
        if request.byte_range is None:
            return fetched, stored
        start, stop = request.byte_range
        stop = stored.geometry.length if stop is None else min(stop, stored.geometry.length)
        if start >= stop:
            raise ConfigError(f"the range begins at {start}, the content has {stored.geometry.length} bytes")
        try:
            part = await trio.to_thread.run_sync(_copy_range, stored, start, stop, self._settings.directory)
        finally:
            stored.close()
        return replace(fetched, length=stop - start), part

    # --- views ------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        network = self._membership.status()
        dht = self._swarm.dht.statistics()
        totals = self._swarm.service.totals
        return {
            "state": "ready" if self.is_ready else "stopping" if self.control is not None else "starting",
            "version": __version__,
            "pid": os.getpid(),
            "node": network.node_id.hex(),
            "network": network.name or network.network_id.hex()[:16],
            "network_id": network.network_id.hex(),
            "open": network.is_open,
            "roles": sorted(network.roles),
            "certificate_expires": network.not_after,
            "uptime_seconds": round(trio.current_time() - self._began, 1),
            "control": str(self._swarm.listens(self._swarm.ports.control)),
            "pieces": str(self._swarm.listens(self._swarm.ports.pieces)),
            "http": str(_name_of(self._face)) if self._face is not None else None,
            "mirror": self.mirror.address if self.mirror is not None else None,
            "data_dir": str(self._settings.directory.absolute()),
            "addresses": list(self._swarm.announcer.hosts),
            "commands": self.control.active if self.control is not None else 0,
            "join": [str(endpoint) for endpoint in self._settings.network.join],
            "peers": len(self._swarm.hub.links()),
            "dht_contacts": dht.contacts,
            "clock_skew_seconds": round(dht.clock_skew, 1),
            "store": self._store_view(),
            "from_peers": totals.bytes_from_peers,
            "from_origin": totals.bytes_from_origin,
            "sent": totals.bytes_to_peers,
            "problems": list(network.problems),
        }

    def _store_view(self) -> dict[str, Any]:
        entries = self._store.entries()
        complete = sum(entry.complete for entry in entries)
        return {
            "complete": complete,
            "partial": len(entries) - complete,
            "bytes": self._store.statistics().used_bytes,
            "quota_bytes": self._settings.store.quota,
            "free_bytes": _free_bytes(self._settings.directory),
        }

    def tasks(self) -> list[dict[str, Any]]:
        active = self._activity()
        return [task_view(entry, active.get(entry.task.id)) for entry in self._store.entries()]

    def task(self, name: str) -> dict[str, Any]:
        entry = find_entry(self._store.entries(), name)
        return task_view(entry, self._activity().get(entry.task.id), self._finished.get(entry.task.id))

    def _activity(self) -> dict[bytes, TaskActivity]:
        return {activity.task_id: activity for activity in self._swarm.service.activity()}

    def peers(self) -> list[dict[str, Any]]:
        received: Counter[str] = Counter()
        sent: Counter[str] = Counter()
        for activity in self._swarm.service.activity():
            for node, _, in_bytes, out_bytes in activity.peers:
                received[node] += in_bytes
                sent[node] += out_bytes
        return [
            {
                "node": link.node_id.hex(),
                "address": str(link.address),
                "encrypted": link.encrypted_pieces,
                "received": received[link.node_id.hex()],
                "sent": sent[link.node_id.hex()],
            }
            for link in self._swarm.hub.links()
        ]

    # --- changes ------------------------------------------------------------------------------------------------------

    def pin(self, name: str, pinned: bool) -> dict[str, Any]:
        entry = find_entry(self._store.entries(), name)
        self._store.pin(entry.task.id, pinned)
        return {"task": entry.task.id.hex(), "pinned": pinned}

    async def remove(self, name: str) -> dict[str, Any]:
        entry = find_entry(self._store.entries(), name)
        self._swarm.service.release(entry.task.id)
        await self._store.remove(entry.task.id)
        self._finished.pop(entry.task.id, None)
        return {"task": entry.task.id.hex(), "removed": True}

    async def pull_image(self, image: str, platform: str | None) -> dict[str, Any]:
        return await self._running_mirror().pull(image, platform)

    async def images(self) -> list[dict[str, Any]]:
        return await self._running_mirror().images()

    def _running_mirror(self) -> Mirror:
        if self.mirror is None:
            raise ConfigError("this daemon has no registry mirror; start it with --mirror 127.0.0.1:7402")
        return self.mirror

    async def check_origin(self, url: str) -> dict[str, Any]:
        return await origin_view(self._origin, url)

    # --- metrics ------------------------------------------------------------------------------------------------------

    @property
    def histograms(self) -> dict[str, Histogram]:
        """See `metrics.Measured`."""
        first_byte = self.mirror.tally.first_byte if self.mirror is not None else Histogram()
        return {"swarm_fetch_duration_seconds": self.durations, "swarm_mirror_first_byte_seconds": first_byte}

    def samples(self) -> Iterator[Sample]:
        """Every declared value now, see `metrics.METRICS`."""
        totals = self._swarm.service.totals
        store = self._store_view()
        yield "swarm_build_info", {"version": __version__, "network": self._membership.name}, 1
        yield "swarm_uptime_seconds", {}, trio.current_time() - self._began
        yield "swarm_received_bytes_total", {"source": "peers"}, totals.bytes_from_peers
        yield "swarm_received_bytes_total", {"source": "origin"}, totals.bytes_from_origin
        yield "swarm_received_bytes_total", {"source": "local"}, totals.bytes_from_local
        yield "swarm_received_pieces_total", {"source": "peers"}, totals.pieces_from_peers
        yield "swarm_received_pieces_total", {"source": "origin"}, totals.pieces_from_origin
        yield "swarm_sent_bytes_total", {}, totals.bytes_to_peers
        yield "swarm_sent_pieces_total", {}, totals.pieces_to_peers
        for reason, count in totals.why_origin.items():
            yield "swarm_origin_reads_total", {"reason": str(reason)}, count
        for result, count in totals.fetches.items():
            yield "swarm_fetches_total", {"result": result}, count
        yield "swarm_verification_failures_total", {}, totals.pieces_bad
        yield "swarm_wasted_pieces_total", {}, totals.pieces_wasted
        yield "swarm_lies_total", {}, totals.lies
        yield "swarm_bans_total", {}, totals.bans
        yield "swarm_peers", {}, len(self._swarm.hub.links())
        yield from self._peer_samples()
        yield "swarm_announcements", {}, self._swarm.announcer.statistics().tasks
        for state in ("complete", "partial"):
            yield "swarm_tasks", {"state": state}, store[state]
        yield "swarm_store_bytes", {}, store["bytes"]
        yield "swarm_store_quota_bytes", {}, store["quota_bytes"]
        yield "swarm_store_free_bytes", {}, store["free_bytes"]
        kept = self._store.statistics()
        for event, count in (
            ("evicted", kept.evicted),
            ("evicted_bytes", kept.evicted_bytes),
            ("rotten_pieces", kept.rotten_pieces),
        ):
            yield "swarm_store_events_total", {"event": event}, count
        yield "swarm_control_requests", {}, self.control.active if self.control is not None else 0
        if self.mirror is not None:
            yield from self.mirror.samples()
        yield from _process_samples()

    def _peer_samples(self) -> Iterator[Sample]:
        peers = self._swarm.hub.statistics()
        for event in ("dials", "dials_failed", "accepted", "refused", "violations", "frames_sent", "frames_received"):
            yield "swarm_peer_events_total", {"event": event}, getattr(peers, event)
        dht = self._swarm.dht.statistics()
        yield "swarm_dht_contacts", {}, dht.contacts
        for event in ("datagrams_in", "datagrams_out", "bytes_in", "bytes_out", "timeouts"):
            yield "swarm_dht_events_total", {"event": event}, getattr(dht, event)
        for prefix, counts in (("dropped", dht.dropped), ("query", dht.queries)):
            for name, count in counts.items():
                yield "swarm_dht_events_total", {"event": f"{prefix}_{name}"}, count


async def origin_view(origin: OriginReader, url: str) -> dict[str, Any]:
    """One HEAD, as a fetch would do it.

    Raises:
        SwarmError: What the fetch would fail with.
    """
    split_url(url)
    began = trio.current_time()
    info = await origin.head(Source(url))
    return {"bytes": info.length, "validator": info.validator, "seconds": round(trio.current_time() - began, 3)}


def _process_samples() -> Iterator[Sample]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    yield "swarm_process_cpu_seconds_total", {}, used.ru_utime + used.ru_stime
    yield "swarm_process_resident_bytes", {}, int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    yield "swarm_process_open_descriptors", {}, len(os.listdir("/proc/self/fd"))


def _free_bytes(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


def _name_of(listener: socket.socket) -> Address:
    try:
        return Address(*listener.getsockname()[:2])
    except OSError:  # closed meanwhile
        return Address("", 0)


class _Part:
    """Some bytes of a content in an unnamed file: what `--range` hands over."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def path(self) -> Path | None:
        return None

    def open_read_only(self) -> int:
        """A new descriptor at the beginning, which the caller closes."""
        return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _copy_range(stored: StoredTask, start: int, stop: int, directory: Path) -> _Part:
    descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        for offset in range(start, stop, COPY_BYTES):
            data = memoryview(stored.read(offset, min(COPY_BYTES, stop - offset)))
            while data:
                data = data[os.write(descriptor, data) :]
    except OSError as error:
        os.close(descriptor)
        raise StoreError(f"cannot copy the range: {error.strerror}") from error
    except BaseException:
        os.close(descriptor)
        raise
    return _Part(descriptor)
