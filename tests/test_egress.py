"""The egress policy: what each asker may reach, whatever the spelling, and that the connection goes nowhere else."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from swarm import egress
from swarm.edges import Address
from swarm.egress import EgressPolicy, EgressSettings, Permit, Reach, Zone, unwrap, zone_of
from swarm.errors import ConfigError, NotPermitted

PUBLIC = "93.184.216.34"
PUBLIC_6 = "2606:2800:220:1::34"


class Spy:
    """A network on which nothing is real: records every connection attempt."""

    def __init__(self, names: Mapping[str, Sequence[Sequence[str]]] | None = None) -> None:
        self.names = {name: list(answers) for name, answers in (names or {}).items()}
        self.lookups: list[str] = []
        self.dialled: list[Address] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """Made-up names; whatever the C library takes for a number is read by it, as in life."""
        self.lookups.append(host)
        answers = self.names.get(host)
        if answers:
            return answers.pop(0) if len(answers) > 1 else answers[0]
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [str(entry[4][0]) for entry in found]

    async def connect(self, address: Address) -> trio.abc.Stream:
        self.dialled.append(address)
        return trio.testing.memory_stream_pair()[0]

    def policy(self, *allow: str, rules: dict[str, egress.Rule] | None = None, ports: tuple[int, ...] = ()) -> EgressPolicy:
        return EgressPolicy(EgressSettings(allow, ports), rules=rules, resolver=self.resolve, connector=self.connect)


def run(act: Callable[[], Awaitable[object]]) -> None:
    async def main() -> None:
        with trio.fail_after(300):
            await act()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def dial(policy: EgressPolicy, host: str, requester: str, port: int = 80, *, from_public: bool = False) -> egress.Dialled:
    found: list[egress.Dialled] = []

    async def act() -> None:
        permit = policy.permit(requester, host, port, redirected=from_public, from_public=from_public)
        found.append(await policy.connect(host, port, permit))

    run(act)
    return found[0]


NOWHERE_FOR_ANYBODY = [
    "169.254.169.254",
    "169.254.170.2",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.0.8",
    "192.88.99.1",
    "0.0.0.0",  # noqa: S104 - never bound
    "0",
    "0.1.2.3",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "::169.254.169.254",
    "::ffff:0:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::7f00:1",
    "64:ff9b::a00:1",
    "64:ff9b:1::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "fe80::1",
    "fe80::a9fe:a9fe",
    "fec0::1",
    "ff02::1",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "100::1",
    "5f00::1",
    "4000::1",
    "metadata.google.internal",
    "metadata.google.internal.",
    "METADATA.Google.Internal",
    "metadata",
    "instance-data",
]
NOWHERE_FOR_STRANGERS = [
    "127.0.0.1",
    "127.1",
    "127.255.255.254",
    "0x7f000001",
    "0x7f.1",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "10.0.0.1",
    "0xa000001",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "192.168.257",
    "100.64.0.1",
    "100.127.255.255",
    "198.18.0.1",
    "203.0.113.7",
    "::ffff:10.0.0.1",
    "fc00::1",
    "fd12:3456::1",
    "3fff::1",
    "2001:db8::1",
]


@pytest.mark.parametrize("requester", ["user", "mirror", "proxy", "job"])
@pytest.mark.parametrize("host", NOWHERE_FOR_ANYBODY)
def test_metadata_and_its_disguises_get_no_connection_whoever_asks(host: str, requester: str) -> None:
    spy = Spy()
    with pytest.raises(NotPermitted, match=r"egress\.allow"):
        dial(spy.policy(), host, requester)
    assert spy.dialled == []


@pytest.mark.parametrize("requester", ["mirror", "proxy", "job"])
@pytest.mark.parametrize("host", NOWHERE_FOR_STRANGERS)
def test_private_and_loopback_and_their_disguises_get_no_connection_from_strangers(host: str, requester: str) -> None:
    spy = Spy()
    with pytest.raises(NotPermitted, match=r"egress\.allow"):
        dial(spy.policy(), host, requester)
    assert spy.dialled == []


@pytest.mark.parametrize("host", NOWHERE_FOR_STRANGERS)
def test_the_local_user_reaches_private_and_loopback_addresses(host: str) -> None:
    spy = Spy()
    dial(spy.policy(), host, "user")
    assert len(spy.dialled) == 1


@pytest.mark.parametrize("requester", ["user", "mirror", "proxy", "job"])
@pytest.mark.parametrize("host", [PUBLIC, PUBLIC_6, "64:ff9b::5db8:d822", "1.1.1.1"])
def test_everybody_reaches_public_addresses(host: str, requester: str) -> None:
    spy = Spy()
    dial(spy.policy(), host, requester)
    assert spy.dialled == [Address(host, 80)]


@pytest.mark.parametrize("requester", ["peer", "", "scheduler"])
def test_a_peer_may_name_nothing(requester: str) -> None:
    with pytest.raises(NotPermitted):
        Spy().policy().permit(requester, "example.org", 80)


def test_a_metadata_name_is_refused_before_dns_is_asked() -> None:
    spy = Spy({"metadata.google.internal": [[PUBLIC]]})
    with pytest.raises(NotPermitted):
        dial(spy.policy(), "metadata.google.internal", "user")
    assert spy.lookups == []


# --- DNS that lies -----------------------------------------------------------------------------------------------


def test_dns_rebinding_between_two_connections_is_refused_the_second_time() -> None:
    spy = Spy({"rebind.example": [[PUBLIC], ["127.0.0.1"]]})
    policy = spy.policy()
    dial(policy, "rebind.example", "job")
    with pytest.raises(NotPermitted, match=r"127\.0\.0\.1"):
        dial(policy, "rebind.example", "job")
    assert spy.dialled == [Address(PUBLIC, 80)]


def test_a_name_is_looked_up_once_and_dialled_by_the_address_that_was_checked() -> None:
    spy = Spy({"rebind.example": [[PUBLIC], ["127.0.0.1"]]})
    dial(spy.policy(), "rebind.example", "job")
    assert spy.lookups == ["rebind.example"]
    assert spy.dialled == [Address(PUBLIC, 80)]


@pytest.mark.parametrize("answer", [[PUBLIC, "127.0.0.1"], ["127.0.0.1", PUBLIC], [PUBLIC, "::ffff:10.0.0.1"]])
def test_an_answer_that_mixes_public_and_private_addresses_is_refused_whole(answer: list[str]) -> None:
    spy = Spy({"mixed.example": [answer]})
    with pytest.raises(NotPermitted):
        dial(spy.policy(), "mixed.example", "job")
    assert spy.dialled == []


def test_link_local_addresses_that_mdns_adds_are_passed_over() -> None:
    spy = Spy({"box.local": [["fe80::1%eth0", "192.168.1.7"]]})
    dial(spy.policy(), "box.local", "user")
    assert spy.dialled == [Address("192.168.1.7", 80)]


def test_link_local_alone_is_refused_with_a_scope_too() -> None:
    spy = Spy({"box.local": [["fe80::1%eth0"]]})
    with pytest.raises(NotPermitted):
        dial(spy.policy(), "box.local", "user")


def test_a_mapped_answer_is_dialled_as_the_ipv4_address_it_is() -> None:
    spy = Spy({"mapped.example": [[f"::ffff:{PUBLIC}"]]})
    assert dial(spy.policy(), "mapped.example", "job").address == Address(PUBLIC, 80)


def test_an_answer_of_a_thousand_addresses_is_cut() -> None:
    spy = Spy({"many.example": [[f"93.184.{i // 250}.{i % 250}" for i in range(1000)]]})
    policy = spy.policy()
    found: list[Address] = []

    async def act() -> None:
        found.extend(await policy.resolve("many.example", 80, policy.permit("job", "many.example", 80)))

    run(act)
    assert len(found) == egress.MAX_ADDRESSES


def test_a_socket_that_ended_up_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Diverted:
        def __init__(self, *_: object) -> None: ...
        async def connect(self, address: object) -> None: ...
        def getpeername(self) -> tuple[str, int]:
            return ("127.0.0.1", 80)

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(trio.socket, "socket", Diverted)

    async def act() -> None:
        with pytest.raises(OSError, match="instead of"):
            await egress.connect_tcp(Address(PUBLIC, 80))

    run(act)
    assert closed == [True]


# --- what the operator lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "host"),
    [
        ("10.1.0.0/16", "10.1.2.3"),
        ("10.1.2.3", "10.1.2.3"),
        ("fd12::/16", "fd12::1"),
        ("[fd12::1]", "fd12::1"),
        ("169.254.169.254", "169.254.169.254"),
        ("169.254.0.0/16", "2852039166"),
        ("fd00:ec2::254", "fd00:ec2::254"),
    ],
)
def test_a_listed_network_is_reached_by_a_job(entry: str, host: str) -> None:
    spy = Spy()
    dial(spy.policy(entry), host, "job")
    assert len(spy.dialled) == 1


@pytest.mark.parametrize(("entry", "host"), [("registry.corp", "Registry.corp."), ("*.corp", "a.b.corp")])
def test_a_listed_host_is_reached_at_its_private_address(entry: str, host: str) -> None:
    spy = Spy({host: [["10.0.0.9"]]})
    dial(spy.policy(entry), host, "job")
    assert spy.dialled == [Address("10.0.0.9", 80)]


@pytest.mark.parametrize("host", ["corp", "evilcorp", "corp.evil.example"])
def test_a_host_that_only_resembles_a_listed_one_gains_nothing(host: str) -> None:
    spy = Spy({host: [["10.0.0.9"]]})
    with pytest.raises(NotPermitted):
        dial(spy.policy("*.corp", "registry.corp"), host, "job")


@pytest.mark.parametrize("entry", ["0.0.0.0/0", "169.0.0.0/8", "fd00::/8", "::/0", "rebind.example"])
def test_a_wide_entry_does_not_open_metadata(entry: str) -> None:
    for address in ("169.254.169.254", "fd00:ec2::254"):
        spy = Spy({"rebind.example": [[address]]})
        with pytest.raises(NotPermitted):
            dial(spy.policy(entry), "rebind.example", "job")
        assert spy.dialled == []


def test_a_listed_metadata_name_still_needs_its_address_listed() -> None:
    spy = Spy({"metadata.google.internal": [["169.254.169.254"]]})
    with pytest.raises(NotPermitted, match=r"169\.254\.169\.254"):
        dial(spy.policy("metadata.google.internal"), "metadata.google.internal", "user")
    dial(spy.policy("metadata.google.internal", "169.254.169.254"), "metadata.google.internal", "user")
    assert len(spy.dialled) == 1


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "10.0.0.1/8", "::g", "300.1.2.3", "*", "", "http://x"])
def test_an_entry_that_means_nothing_is_a_configuration_error(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"egress\.allow"):
        EgressPolicy(EgressSettings((entry,)))


@pytest.mark.parametrize(("port", "allowed"), [(80, True), (443, True), (5000, True), (22, False), (25, False), (1023, False)])
def test_strangers_do_not_reach_well_known_ports_of_other_protocols(port: int, allowed: bool) -> None:
    policy = Spy().policy()
    for requester in ("mirror", "proxy", "job"):
        if allowed:
            policy.permit(requester, PUBLIC, port)
        else:
            with pytest.raises(NotPermitted, match=r"egress\.ports"):
                policy.permit(requester, PUBLIC, port)
    policy.permit("user", PUBLIC, port)
    Spy().policy(ports=(port,)).permit("job", PUBLIC, port)


# --- redirects and rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "::1"])
def test_a_public_server_cannot_send_even_a_user_to_a_private_address(host: str) -> None:
    spy = Spy()
    with pytest.raises(NotPermitted):
        dial(spy.policy(), host, "user", from_public=True)
    assert spy.dialled == []
    dial(spy.policy(host), host, "user", from_public=True)
    assert len(spy.dialled) == 1


def test_permits_of_different_reach_differ_so_that_connections_are_not_shared() -> None:
    policy = Spy().policy()
    user, job = policy.permit("user", "x", 80), policy.permit("job", "x", 80)
    assert len({user, job, policy.permit("user", "x", 80, redirected=True, from_public=True)}) == 3


def test_a_mirror_rule_opens_its_registries_but_not_where_they_redirect_to() -> None:
    def registries(host: str, port: int, redirected: bool) -> Reach:
        if redirected:
            return Reach.PUBLIC
        return Reach.LOCAL if host == "registry.corp" else Reach.NOTHING

    names = {"registry.corp": [["10.0.0.9"]], "cdn.example": [[PUBLIC]], "inside.corp": [["10.0.0.10"]]}
    spy = Spy(names)
    policy = spy.policy(rules={"mirror": registries})
    dial(policy, "registry.corp", "mirror")
    with pytest.raises(NotPermitted):
        dial(policy, "cdn.example", "mirror")
    dial(policy, "cdn.example", "mirror", from_public=True)
    with pytest.raises(NotPermitted):
        dial(policy, "inside.corp", "mirror", from_public=True)
    assert [str(a) for a in spy.dialled] == ["10.0.0.9:80", f"{PUBLIC}:80"]


# --- properties ------------------------------------------------------------------------------------------------


@given(st.ip_addresses(v=4))
def test_every_spelling_of_an_ipv4_address_in_ipv6_leads_no_further_than_the_address(v4: ipaddress.IPv4Address) -> None:
    plain = zone_of(v4)
    assert zone_of(ipaddress.IPv6Address(f"::ffff:{v4}")) is plain
    assert unwrap(f"::ffff:{v4}") == v4
    for template in ("64:ff9b::{0}", "::{0}", "::ffff:0:{0}", "64:ff9b:1::{0}"):
        found = zone_of(ipaddress.IPv6Address(template.format(v4)))
        assert found is Zone.FORBIDDEN or (found is plain is Zone.PUBLIC) or (found is Zone.LOOPBACK and template == "::{0}")
    six_to_four = ipaddress.IPv6Address((0x2002 << 112) | (int(v4) << 80) | 1)
    assert zone_of(six_to_four) is Zone.FORBIDDEN


@given(st.one_of(st.ip_addresses(), st.sampled_from(["127.0.0.1", "::1"]).map(ipaddress.ip_address)))
def test_nothing_that_the_registries_call_not_global_counts_as_public(address: egress.IPAddress) -> None:
    plain = unwrap(str(address))
    if zone_of(plain) is Zone.PUBLIC and plain not in ipaddress.ip_network("64:ff9b::/96"):
        assert plain.is_global
        assert not plain.is_multicast
        assert not plain.is_reserved


@given(st.text(max_size=40))
def test_reading_an_address_raises_only_value_error(text: str) -> None:
    try:
        address = unwrap(text)
    except ValueError:
        return
    assert not (address.version == 6 and address.ipv4_mapped)


# --- happy eyeballs --------------------------------------------------------------------------------------------


def test_families_take_turns_beginning_with_the_first() -> None:
    addresses = [Address(host, 1) for host in ("::1", "::2", "::3", "1.1.1.1", "1.1.1.2")]
    assert [a.host for a in egress.take_turns(addresses)] == ["::1", "1.1.1.1", "::2", "1.1.1.2", "::3"]
    assert egress.take_turns([]) == []


def test_a_dead_ipv6_address_costs_a_quarter_of_a_second() -> None:
    async def connect(address: Address) -> trio.abc.Stream:
        if ":" in address.host:
            await trio.sleep_forever()
        return trio.testing.memory_stream_pair()[0]

    async def act() -> None:
        began = trio.current_time()
        found = await egress.connect_first([Address(PUBLIC_6, 1), Address(PUBLIC, 1)], connect)
        assert found.address.host == PUBLIC
        assert trio.current_time() - began == pytest.approx(0.25)

    run(act)


def test_a_refused_address_is_followed_by_the_next_at_once_and_the_first_reason_is_told() -> None:
    async def refuse(address: Address) -> trio.abc.Stream:
        raise ConnectionRefusedError(111, address.host)

    async def act() -> None:
        began = trio.current_time()
        with pytest.raises(ConnectionRefusedError, match=PUBLIC):
            await egress.connect_first([Address(PUBLIC, 1), Address("1.1.1.1", 1)], refuse)
        assert trio.current_time() == began

    run(act)


def test_two_addresses_that_answer_together_leave_one_connection_open() -> None:
    opened: list[trio.testing.MemorySendStream] = []
    together = trio.Event()

    async def connect(address: Address) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        with trio.CancelScope(shield=True):
            await together.wait()
        opened.append(theirs.receive_stream)  # type: ignore[arg-type]  # only closed below
        return ours

    async def act() -> None:
        async with trio.open_nursery() as nursery:

            async def release() -> None:
                await trio.sleep(1)
                together.set()

            nursery.start_soon(release)
            found = await egress.connect_first([Address(PUBLIC, 1), Address("1.1.1.1", 1)], connect)
        assert len(opened) == 2
        still_open = 0
        for end in opened:
            with trio.move_on_after(1) as waited:
                assert await end.receive_some() == b""  # type: ignore[attr-defined]  # a receive stream
            still_open += waited.cancelled_caught
        assert still_open == 1
        await found.stream.aclose()

    run(act)


def test_cancelling_a_dial_leaves_nothing_open() -> None:
    async def act() -> None:
        cancelled = 0

        async def connect(address: Address) -> trio.abc.Stream:
            nonlocal cancelled
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                cancelled += 1
                raise
            raise AssertionError

        with trio.move_on_after(1):
            await egress.connect_first([Address(PUBLIC, 1), Address("1.1.1.1", 1)], connect)
        assert cancelled == 2

    run(act)


def test_a_label_too_long_for_dns_is_a_failed_lookup() -> None:
    async def act() -> None:
        with pytest.raises(socket.gaierror):
            await egress.system_resolver("a" * 70 + ".example", 80)

    trio.run(act)


def test_a_trusted_dial_skips_the_check_and_nothing_else() -> None:
    spy = Spy({"proxy.corp": [["10.0.0.5"]]})

    async def act() -> None:
        assert (await spy.policy().connect_trusted("proxy.corp", 3128)).address == Address("10.0.0.5", 3128)

    run(act)


def test_a_permit_without_reach_reaches_only_what_is_listed() -> None:
    spy = Spy()
    policy = spy.policy(PUBLIC, rules={"proxy": lambda host, port, redirected: Reach.NOTHING})
    assert policy.permit("proxy", PUBLIC, 80) == Permit("proxy", Reach.NOTHING)
    dial(policy, PUBLIC, "proxy")
    with pytest.raises(NotPermitted):
        dial(policy, "1.1.1.1", "proxy")
