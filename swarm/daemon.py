"""The composition root: reads top to bottom as the description of a node.

Parts are built in the order in which they need one another, run in nested scopes, and end in the opposite order: commands
first, then downloads, announcements, connections, the network's files, and last the store, which flushes.
"""

from __future__ import annotations

import contextlib
import gc
import random
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog
import trio

from swarm import __version__, http, identity
from swarm.announce import Announcer, kept_names
from swarm.config import DEFAULT_PORT, Settings
from swarm.control.api import ControlServer
from swarm.dht.node import DhtNode
from swarm.dht.transport import UdpTransport
from swarm.download.service import DownloadService
from swarm.edges import Address
from swarm.egress import EgressPolicy, EgressSettings
from swarm.errors import ConfigError, SwarmError
from swarm.neighbourhood import Neighbourhood
from swarm.network import Network, load, open_network
from swarm.node import Node, Swarm
from swarm.origin.origin import OriginReader, OriginSettings
from swarm.peer.hub import PeerHub
from swarm.peer.settings import PeerSettings
from swarm.quantities import Endpoint
from swarm.store.disk import DiskStore

if TYPE_CHECKING:
    from swarm.mirror.mirror import Mirror

log = structlog.get_logger(__name__)

DESCRIPTORS_BESIDE: Final = 1024
"""For everything but clients of the mirror: peers, contents, commands."""

DEFAULT_NETWORK: Final = "default"
"""The open network of a node nobody gave one; on loopback only."""

PORT_ATTEMPTS: Final = 16
"""Free ports tried: the one free for UDP may be taken for TCP, or its neighbour."""

T = TypeVar("T")


class Stop:
    """How a node is told to end.

    Attributes:
        asked: No new work; running transfers are drained, announcements withdrawn.
        at_once: Nothing is waited for; what was verified is kept, and announcements are still withdrawn.
    """

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.at_once = trio.Event()

    def ask(self, *, at_once: bool = False) -> None:
        """Ask once, or again to end at once."""
        self.asked.set()
        if at_once:
            self.at_once.set()


async def run_node(
    settings: Settings,
    *,
    stop: Stop,
    ready: Callable[[dict[str, Any]], None] = lambda status: None,
    wait_for_commands: bool = False,
) -> None:
    """Run a node until `stop` is asked for, then leave in order.

    Args:
        settings: All of them, checked.
        stop: Ask it to end.
        ready: Called once with the node's status, when commands, peers and the DHT can reach it.
        wait_for_commands: Before leaving, answer the commands that wait, without a time limit.

    Raises:
        SwarmError: It cannot start, or a part failed; what was verified is kept.
    """
    rng = random.Random()
    async with AsyncExitStack() as life:
        face = http.listen(settings.http)
        if face is not None:
            life.callback(face.close)
        mirror_face = listen_for_mirror(settings)
        if mirror_face is not None:
            life.callback(mirror_face.close)
        store = life.enter_context(open_store(settings, rng))
        await life.enter_async_context(running(store.run))

        membership = open_membership(settings)
        await life.enter_async_context(running(membership.run))

        origin = await life.enter_async_context(open_origin(settings, rng))
        swarm = await life.enter_async_context(listening(settings, membership, store, origin, rng))
        await life.enter_async_context(running(swarm.dht.run))
        await life.enter_async_context(running(swarm.announcer.run))
        await life.enter_async_context(running(swarm.service.run))
        neighbourhood = Neighbourhood(membership.node_id, swarm.dht.known, swarm.dht.sample, swarm.hub, rng=rng)
        swarm.service.attach(swarm.hub, all_linked=neighbourhood.complete)
        await life.enter_async_context(running(neighbourhood.run))

        node = Node(settings, membership, store, swarm, origin, face)
        control = ControlServer(node, settings.directory)
        await life.enter_async_context(running(control.run))
        node.control = control
        if face is not None:
            await life.enter_async_context(running_aside(http.serve, node, face, settings.http))
        if mirror_face is not None:
            node.mirror = open_mirror(settings, mirror_face, store, swarm, origin)
            await life.enter_async_context(running(node.mirror.run))

        kept = kept_names(store.entries(), is_open=membership.is_open)
        swarm.announcer.restore(kept)
        node.is_ready = True
        log.info("ready", **_ready_fields(node, len(kept)))
        ready(node.status())

        await origin.warm()
        rest_collector()
        await stop.asked.wait()
        node.is_ready = False
        await leave(swarm, settings.drain, stop.at_once, control if wait_for_commands else None, node.mirror)
    log.info("stopped")


def rest_collector() -> None:
    """Take what start-up made out of the garbage collector's rounds, and let those be rarer.

    By default every 700 new objects start a round, and modules alone are some hundred thousand that each full round walks:
    7 % of all CPU of twenty busy daemons.  What lives in cycles here is small and short-lived.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def leave(
    swarm: Swarm, seconds: float, at_once: trio.Event, control: ControlServer | None, mirror: Mirror | None = None
) -> None:
    """Finish what runs, for at most so long; what does not finish is resumed at the next start.

    Args:
        at_once: Set, it ends the waiting.
        control: Its commands are answered first, however long they take.
        mirror: Its clients get what they were promised, within `seconds`.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when, at_once, nursery.cancel_scope)
        if control is not None:
            await control.wait_idle()
        until = trio.current_time() + seconds
        if mirror is not None:
            with trio.move_on_at(until):
                await mirror.drain()
        await swarm.service.drain(max(0.0, until - trio.current_time()))
        await swarm.announcer.withdraw_all()
        await swarm.hub.aclose(max(0.0, until - trio.current_time()))
        nursery.cancel_scope.cancel()
    await swarm.announcer.withdraw_all()  # nothing is left to withdraw, unless the waiting was cut short


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def open_store(settings: Settings, rng: random.Random) -> DiskStore:
    """The store, which locks the data directory: two nodes cannot share one."""
    wanted = settings.store
    return DiskStore(
        settings.directory,
        quota_bytes=wanted.quota or None,
        high_watermark=wanted.high_watermark,
        low_watermark=wanted.low_watermark,
        min_free_bytes=wanted.min_free,
        scrub_bytes_per_s=wanted.scrub_rate,
        rng=rng,
    )


def open_membership(settings: Settings) -> Network:
    """The closed network of a directory, or an open one by name.  The node's own key is made at its first start."""
    own = identity.load_or_create(settings.directory / "node.key")
    roles = ("seed",) if settings.seed else ()
    if settings.network.directory is not None:
        return load(settings.network.directory, identity=own, roles=roles)
    return open_network(settings.network.open or DEFAULT_NETWORK, own, roles=roles)


def listen_for_mirror(settings: Settings) -> socket.socket | None:
    """Bind the registry face, if there is to be one; room for its clients is made among the descriptors."""
    if settings.mirror.listen is None:
        return None
    from swarm.mirror.server import listen

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.mirror.clients + DESCRIPTORS_BESIDE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
    return listen(settings.mirror)


def open_mirror(settings: Settings, face: socket.socket, store: DiskStore, swarm: Swarm, origin: OriginReader) -> Mirror:
    """The registry face over the same downloads; imported only where there is one."""
    from swarm.mirror.mirror import Mirror

    return Mirror(settings.mirror, face, store, swarm.service, origin, settings.directory)


def open_origin(settings: Settings, rng: random.Random) -> OriginReader:
    """Reading origins, under the egress policy."""
    rules = {}
    if settings.mirror.listen is not None:
        from swarm.mirror.listed import egress_rule

        rules["mirror"] = egress_rule(settings.mirror)
    egress = EgressPolicy(_section(EgressSettings, settings.egress), rules=rules)
    return OriginReader(egress, _section(OriginSettings, settings.origin), rng=rng)


@asynccontextmanager
async def listening(
    settings: Settings, membership: Network, store: DiskStore, origin: OriginReader, rng: random.Random
) -> AsyncIterator[Swarm]:
    """The parts that talk to other nodes, on one port for UDP and TCP; port 0 takes one that is free for both.

    Raises:
        ConfigError: The port is in use, or the address is not ours.
    """
    address = await listen_address(settings)
    for attempt in range(PORT_ATTEMPTS):
        started = False
        try:
            with UdpTransport.open(address) as transport:
                swarm = connect(settings, membership, store, origin, transport, rng)
                async with running(swarm.hub.run, [transport.local_address]) as ports:
                    started = True
                    swarm.ports = ports
                    yield swarm
                    return
        except (ConfigError, BaseExceptionGroup) as error:
            # The number that was free for UDP is taken for TCP: another one will do, if any will.
            if started or address.port != 0 or attempt == PORT_ATTEMPTS - 1 or not _is_all(error, ConfigError):
                raise


def connect(
    settings: Settings,
    membership: Network,
    store: DiskStore,
    origin: OriginReader,
    transport: UdpTransport,
    rng: random.Random,
) -> Swarm:
    """Who knows whom: the DHT finds, the announcer announces, the service exchanges over the hub's links."""
    directory, network = settings.directory, settings.network
    advertise = network.advertise
    dht = DhtNode(
        transport,
        membership,
        rng=rng,
        join=[str(endpoint) for endpoint in network.join],
        state_path=directory / "dht.state",
        advertise=advertise,
    )
    announcer = Announcer(
        dht,
        membership,
        control_port=transport.local_address.port,
        addresses=advertise,
        state_path=directory / "announce.state",
        rng=rng,
        seed_role=settings.seed,
    )
    service = DownloadService(membership, store, announcer, origin, rng=rng, give_up_after=settings.peers.give_up)
    peers = PeerSettings(
        encrypt=settings.peers.encrypt,
        upload_rate=settings.peers.upload_rate,
        task_upload_rate=settings.peers.task_upload_rate,
        download_rate=settings.peers.download_rate,
        congestion_control=settings.peers.congestion_control,
        agent=f"swarm/{__version__}",
    )
    hub = PeerHub(membership, service, service, settings=peers, rng=rng)
    service.attach(hub)
    return Swarm(dht, announcer, service, hub, transport.local_address.host)


async def listen_address(settings: Settings) -> Address:
    """Where to listen, as a literal address.

    Raises:
        ConfigError: The name is not known.
    """
    endpoint = settings.network.listen
    if endpoint is None:
        endpoint = Endpoint("::" if settings.network.directory is not None else "127.0.0.1", DEFAULT_PORT)
    try:
        found = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {endpoint}: {error.strerror or error}; give an address of this machine") from error
    return Address(str(found[0][4][0]), endpoint.port)


# --- running parts ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(service: Callable[..., Awaitable[object]], *arguments: object) -> AsyncIterator[Any]:
    """Start a service and wait until it is; when the block ends, it is cancelled and waited for."""
    async with trio.open_nursery() as nursery:
        yield await nursery.start(service, *arguments)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def running_aside(service: Callable[..., Awaitable[object]], *arguments: object) -> AsyncIterator[None]:
    """Run a service that does not say when it has started."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service, *arguments)
        yield
        nursery.cancel_scope.cancel()


@contextlib.contextmanager
def flatten() -> Iterator[None]:
    """Let a deliberate exception out as itself, however many nurseries it crossed; bugs stay in their groups."""
    try:
        yield
    except BaseExceptionGroup as group:
        if not _is_all(group, SwarmError):
            raise
        raise _first(group) from group


def _is_all(error: BaseException, kind: type[BaseException]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_all(inner, kind) for inner in error.exceptions)
    return isinstance(error, kind)


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _section(cls: type[T], settings: object) -> T:
    """A part's own settings from the section of the same names."""
    return cls(**{item.name: getattr(settings, item.name) for item in fields(cls)})  # type: ignore[arg-type]  # both are dataclasses


def _ready_fields(node: Node, tasks: int) -> dict[str, Any]:
    status = node.status()
    names = ("version", "node", "network", "open", "pid")
    return {name: status[name] for name in names} | {"listen": status["control"], "tasks": tasks}
