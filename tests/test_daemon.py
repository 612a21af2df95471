"""The composition root: starting and stopping parts, and what their failures become."""

import socket
from dataclasses import replace

import pytest
import trio

from swarm.config import HttpSettings, NetworkSettings, PeersSettings, Settings, StoreSettings
from swarm.daemon import Stop, _section, flatten, listen_address, run_node, running
from swarm.dht.transport import UdpTransport
from swarm.download.service import DownloadService
from swarm.egress import EgressSettings
from swarm.errors import ConfigError, StoreBusy, SwarmError
from swarm.origin.origin import OriginSettings
from swarm.quantities import Endpoint


def settings(tmp_path, **network):
    fixed = {"listen": Endpoint("127.0.0.1", 0), "open": "test", **network}
    return Settings(
        data_dir=tmp_path / "data",
        network=NetworkSettings(**fixed),
        http=HttpSettings(listen=None),
        store=StoreSettings(min_free=0),
    )


def test_parts_take_their_settings_from_the_section_of_the_same_names():
    given = Settings()
    assert _section(OriginSettings, given.origin) == OriginSettings()  # the same defaults, documented once
    assert _section(EgressSettings, given.egress) == EgressSettings()


def test_the_service_waits_for_peers_as_long_as_the_setting_says(tmp_path, monkeypatch):
    given = {}

    class Spied(DownloadService):
        def __init__(self, *parts, **options):
            given.update(options)
            super().__init__(*parts, **options)

    monkeypatch.setattr("swarm.daemon.DownloadService", Spied)

    async def main():
        stop = Stop()
        with trio.fail_after(20):
            wanted = replace(settings(tmp_path), peers=PeersSettings(give_up=70.0))
            await run_node(wanted, stop=stop, ready=lambda _: stop.ask())

    trio.run(main)
    assert given["give_up_after"] == 70.0


def test_a_node_starts_says_so_and_leaves_nothing(tmp_path):
    said = []

    async def main():
        stop = Stop()

        def ready(status):
            said.append(status)
            stop.ask()

        with trio.fail_after(20):
            await run_node(settings(tmp_path), stop=stop, ready=ready)

    for _ in range(2):  # the second time on the same store, with the same identity
        trio.run(main)
    assert said[0]["state"] == "ready"
    assert said[0]["node"] == said[1]["node"]
    assert said[0]["control"].startswith("127.0.0.1:")
    assert not (tmp_path / "data" / "control.sock").exists()


def test_a_node_told_to_stop_at_once_waits_for_no_command(tmp_path):
    from swarm.control.protocol import reachable_path

    async def main():
        stop = Stop()
        ready = trio.Event()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:

                async def node():
                    await run_node(settings(tmp_path), stop=stop, ready=lambda _: ready.set(), wait_for_commands=True)

                nursery.start_soon(node)
                await ready.wait()
                with reachable_path(tmp_path / "data" / "control.sock") as name:
                    stream = await trio.open_unix_socket(name)
                async with stream:  # a command that has not said what it wants
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    stop.ask()
                    with trio.move_on_after(0.2) as waited:
                        while nursery.child_tasks:
                            await trio.testing.wait_all_tasks_blocked(0.01)
                    assert waited.cancelled_caught
                    stop.ask(at_once=True)

    trio.run(main)


def test_two_nodes_on_one_store_are_refused_as_what_it_is(tmp_path):
    async def main():
        stop = Stop()
        ready = trio.Event()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:

                async def first():
                    await run_node(settings(tmp_path), stop=stop, ready=lambda _: ready.set())

                nursery.start_soon(first)
                await ready.wait()
                with pytest.raises(StoreBusy), flatten():
                    await run_node(settings(tmp_path), stop=Stop())
                stop.ask()

    trio.run(main)


def test_a_port_in_use_ends_the_start_and_frees_the_store(tmp_path):
    async def main(port):
        with flatten():
            await run_node(settings(tmp_path, listen=Endpoint("127.0.0.1", port)), stop=Stop())

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for _ in range(2):
            with pytest.raises(ConfigError, match="in use"):
                trio.run(main, taken.getsockname()[1])


def test_a_port_taken_for_tcp_only_is_tried_again_when_any_will_do(tmp_path, monkeypatch):
    """A free UDP port may be taken for TCP: another one is tried, and the attempts are bounded."""
    attempts = []
    real = UdpTransport.open

    def open_taken(address):
        transport = real(address)
        attempts.append(transport)
        if len(attempts) <= 2:
            listener = socket.create_server(("127.0.0.1", transport.local_address.port))
            listeners.append(listener)
        return transport

    listeners: list[socket.socket] = []
    monkeypatch.setattr(UdpTransport, "open", open_taken)

    async def main():
        stop = Stop()
        with trio.fail_after(20), flatten():
            await run_node(settings(tmp_path), stop=stop, ready=lambda _: stop.ask())

    try:
        trio.run(main)
    finally:
        for listener in listeners:
            listener.close()
    assert len(attempts) == 3


def test_where_to_listen_follows_from_the_network(tmp_path):
    def address(**network):
        return str(trio.run(listen_address, Settings(network=NetworkSettings(**network))))

    assert address() == "127.0.0.1:7400"
    assert address(open="x") == "127.0.0.1:7400"
    assert address(directory=tmp_path) == "[::]:7400"
    assert address(listen=Endpoint("localhost", 5)).endswith(":5")
    with pytest.raises(ConfigError, match="no-such-host"):
        address(listen=Endpoint("no-such-host.invalid", 5))


def test_one_deliberate_error_comes_out_as_itself_and_a_bug_stays_a_bug():
    async def failing(error):
        async with trio.open_nursery() as nursery, trio.open_nursery():
            nursery.start_soon(raise_, error)

    async def raise_(error):
        raise error

    with pytest.raises(SwarmError, match="meant"), flatten():
        trio.run(failing, SwarmError("meant"))
    with pytest.raises(ExceptionGroup), flatten():
        trio.run(failing, ValueError("bug"))


def test_a_part_is_running_inside_the_block_and_gone_after_it():
    events = []

    async def part(*, task_status):
        events.append("start")
        task_status.started("value")
        try:
            await trio.sleep_forever()
        finally:
            events.append("end")

    async def main():
        async with running(part) as value:
            events.append(value)

    trio.run(main)
    assert events == ["start", "value", "end"]
