"""Membership: who is in, who is out, and what happens while a daemon runs."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from swarm import certificates, network, network_admin, wire
from swarm.edges import Membership
from swarm.errors import ConfigError, IntegrityError, NotAMember, RemoteProtocolError
from swarm.identity import Identity
from swarm.network import Network, open_network
from swarm.task import Digest, blob_task
from tests.closed_network import DAY, ClosedNetwork, Wall

OPEN_NETWORK_ID = "c97f6ce391eb3528cd92c13938b9dcc4ff491de62766a84d2c17a7c57f9a38dd"
OPEN_TASK_KEY = "bf93654747c2a008c14f3e957cb1d8df9c474501"
OPEN_MAC = "c2e7fb35b6154d7e71fcc4e8579ae5f8"
BODY = wire.ProofBody(bytes(32), 10**6, 256 * 1024, 1, bytes(32), 1_800_000_000)


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def closed(tmp_path: Path, wall: Wall) -> ClosedNetwork:
    return ClosedNetwork(tmp_path, wall)


def acquainted(closed: ClosedNetwork, *names: str) -> list[Network]:
    """Members who know each other's certificates."""
    members = [closed.load(name) for name in names]
    for one in members:
        for other in members:
            one.learn(other.certificate)
    return members


# --- keys of tasks ---------------------------------------------------------------------------------------------------


def test_whoever_watches_the_dht_without_the_network_cannot_tell_which_digest_a_key_stands_for(closed, tmp_path, wall):
    """SECURITY: T22."""
    a, b = closed.load("a"), closed.load("b")
    task = blob_task(Digest("sha256", hashlib.sha256(b"what is fetched").hexdigest())).id
    key = a.task_key(task)
    assert key == b.task_key(task), "members find one another"
    guesses = [task[:20], *(hashlib.new(name, task).digest()[:20] for name in ("sha1", "sha256", "sha512"))]
    guesses += [hashlib.blake2b(task, digest_size=20).digest(), hashlib.blake2b(task).digest()[:20]]
    elsewhere = ClosedNetwork(tmp_path / "another", wall)
    assert key not in [*guesses, elsewhere.load("a").task_key(task), open_network("test", Identity(bytes(32))).task_key(task)]


# --- signatures ------------------------------------------------------------------------------------------------------


def test_a_network_is_what_the_engines_ask_for(closed):
    membership: Membership = closed.load("a")
    assert (len(membership.network_id), len(membership.node_id), len(membership.public_key)) == (32, 20, 32)
    assert not membership.is_open


def test_what_a_known_member_signed_is_believed(closed):
    a, b = acquainted(closed, "a", "b")
    assert b.verify("proof", a.sign("proof", BODY), wire.ProofBody) == BODY


def test_a_member_believes_itself(closed):
    a = closed.load("a")
    assert a.verify("proof", a.sign("proof", BODY), wire.ProofBody) == BODY
    assert a.certificate_of(a.public_key) == a.certificate


def test_what_an_unknown_key_signed_is_refused_until_its_certificate_comes(closed):
    a, b = closed.load("a"), closed.load("b")
    signed = a.sign("proof", BODY)
    with pytest.raises(NotAMember):
        b.verify("proof", signed, wire.ProofBody)
    assert b.learn(a.certificate) == a.public_key
    assert b.verify("proof", signed, wire.ProofBody) == BODY


def test_a_proof_replayed_as_a_claim_is_refused(closed):
    a, b = acquainted(closed, "a", "b")
    with pytest.raises(IntegrityError):
        b.verify("claim", a.sign("proof", BODY), wire.ProofBody)


def test_a_signature_replayed_from_another_network_is_refused(tmp_path, wall):
    # The same key is a member of both, so that only the network id can tell.
    (tmp_path / "1").mkdir()
    first, second = ClosedNetwork(tmp_path / "1", wall), ClosedNetwork(tmp_path / "2", wall)
    a = first.load("a")
    (tmp_path / "2" / "a").mkdir()
    shutil.copy(tmp_path / "1" / "a" / "node.key", tmp_path / "2" / "a" / "node.key")
    same_key, b = acquainted(second, "a", "b")
    assert same_key.public_key == a.public_key
    with pytest.raises(IntegrityError):
        b.verify("proof", a.sign("proof", BODY), wire.ProofBody)


def test_a_body_changed_on_the_way_is_refused(closed):
    a, b = acquainted(closed, "a", "b")
    signed = a.sign("proof", BODY)
    changed = wire.Signed(signed.body[:-1] + bytes([signed.body[-1] ^ 1]), signed.key, signed.signature)
    with pytest.raises(IntegrityError):
        b.verify("proof", changed, wire.ProofBody)


def test_a_signed_body_that_is_no_proof_is_the_signers_fault(closed):
    a, b = acquainted(closed, "a", "b")
    with pytest.raises(RemoteProtocolError):
        b.verify("proof", a.identity.sign("proof", a.network_id, b"\xff"), wire.ProofBody)


@given(body=st.binary(max_size=300))
@settings(max_examples=50, deadline=None)
def test_garbage_signed_by_a_member_is_a_protocol_error(body):
    a = open_network("garbage", Identity(bytes(range(32))))
    with pytest.raises(RemoteProtocolError):
        a.verify("proof", a.identity.sign("proof", a.network_id, body), wire.ProofBody)


# --- membership -------------------------------------------------------------------------------------------------------


def test_a_member_of_another_network_is_refused(tmp_path, wall):
    first, second = ClosedNetwork(tmp_path / "1", wall), ClosedNetwork(tmp_path / "2", wall)
    a, b = first.load("a"), second.load("b")
    assert a.network_id != b.network_id
    with pytest.raises(NotAMember, match="not from this network's authority"):
        b.learn(a.certificate)
    assert not b.is_member(a.public_key)


def test_a_member_out_of_date_is_refused(closed, wall):
    a = network.load(closed.issue("a", days=1), clock=wall)
    b = closed.load("b")
    wall.now += DAY - 1
    b.learn(a.certificate)
    wall.now += 1
    assert not b.is_member(a.public_key)
    assert b.certificate_of(a.public_key) is None
    with pytest.raises(NotAMember, match="out of date since"):
        b.learn(a.certificate)
    with pytest.raises(NotAMember):
        b.verify("proof", a.sign("proof", BODY), wire.ProofBody)


def test_a_new_member_is_believed_by_a_clock_a_day_behind_and_no_longer(closed, wall):
    a, b = closed.load("a"), closed.load("b")
    wall.now -= DAY
    b.learn(a.certificate)
    wall.now -= 1
    with pytest.raises(NotAMember, match="clock behind"):
        b.learn(a.certificate)


def test_nobody_is_a_member_once_the_authority_is_out_of_date(tmp_path, wall):
    closed = ClosedNetwork(tmp_path, wall, days=10)
    a, b = acquainted(closed, "a", "b")
    wall.now += 10 * DAY
    assert not b.is_member(a.public_key)


def test_a_certificate_that_outlives_its_authority_ends_with_it(tmp_path, wall):
    closed = ClosedNetwork(tmp_path, wall, days=10)
    b = closed.load("b")
    key = certificates.load_key((closed.directory / "ca.key").read_bytes())
    generous = certificates.make_authority(key, "test", not_before=wall.now - DAY, not_after=wall.now + 999 * DAY)
    own = Identity.generate()
    long_lived = certificates.issue(generous, key, own.public_key, not_before=wall.now, not_after=wall.now + 99 * DAY)
    b.learn(long_lived)
    wall.now += 10 * DAY
    assert not b.is_member(own.public_key)
    with pytest.raises(NotAMember, match="authority out of date"):
        b.learn(long_lived)


def test_roles_are_the_certificates(closed):
    a, b = closed.load("a", roles=("seed",)), closed.load("b")
    assert b.roles_of(a.public_key) == frozenset()
    b.learn(a.certificate)
    assert b.roles_of(a.public_key) == {"seed"}
    assert a.roles == {"seed"}


def test_the_later_of_two_certificates_counts_so_that_a_role_can_be_taken_away(closed, wall):
    b = closed.load("b")
    with_role = network.load(closed.issue("a", roles=("scheduler",)), clock=wall)
    wall.now += 60
    without = network.load(closed.issue("a"), clock=wall)
    assert with_role.public_key == without.public_key
    b.learn(without.certificate)
    b.learn(with_role.certificate)  # the old one, shown again
    assert b.roles_of(without.public_key) == frozenset()


def test_a_flood_of_members_is_bounded_and_drops_the_longest_unused(closed, monkeypatch):
    monkeypatch.setattr(network, "MAX_MEMBERS", 3)
    a, b, c, d, e = (closed.load(name) for name in "abcde")
    for member in (b, c, d):
        a.learn(member.certificate)
    a.verify("proof", b.sign("proof", BODY), wire.ProofBody)
    a.learn(e.certificate)
    assert a.status().members == 3
    assert [a.is_member(member.public_key) for member in (b, c, d, e)] == [True, False, True, True]


# --- what is loaded ----------------------------------------------------------------------------------------------------


def test_a_certificate_out_of_date_stops_the_start(closed, wall):
    directory = closed.issue("a", days=1)
    wall.now += DAY
    with pytest.raises(NotAMember, match=r"not a member: .* out of date .* swarm network issue") as caught:
        network.load(directory, clock=wall)
    assert caught.value.exit_code == 7


def test_a_revoked_node_does_not_start(closed, wall):
    directory = closed.issue("a")
    (directory / "ca.crl").write_bytes(closed.revoke(str(directory / "node.crt")))
    with pytest.raises(NotAMember, match="is revoked"):
        network.load(directory, clock=wall)


def test_a_certificate_of_another_network_stops_the_start(tmp_path, wall):
    first, second = ClosedNetwork(tmp_path / "1", wall), ClosedNetwork(tmp_path / "2", wall)
    directory = first.issue("a")
    shutil.copy(second.directory / "ca.crt", directory / "ca.crt")
    with pytest.raises(NotAMember, match="not from this network's authority"):
        network.load(directory, clock=wall)


def test_a_certificate_for_another_key_stops_the_start(closed, wall):
    a, b = closed.issue("a"), closed.issue("b")
    shutil.copy(b / "node.crt", a / "node.crt")
    with pytest.raises(ConfigError, match="another key"):
        network.load(a, clock=wall)


@pytest.mark.parametrize(
    ("missing", "what"),
    [("ca.crt", "no ca.crt"), ("node.crt", "no node.crt"), ("node.key", "no key"), ("group.secret", "no group.secret")],
)
def test_a_missing_file_is_named(closed, wall, missing, what):
    directory = closed.issue("a")
    (directory / missing).unlink()
    with pytest.raises(ConfigError, match=what) as caught:
        network.load(directory, clock=wall)
    assert caught.value.exit_code == 2
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("damaged", ["ca.crt", "node.crt", "node.key", "group.secret", "ca.crl"])
def test_a_damaged_file_is_named(closed, wall, damaged):
    directory = closed.issue("a")
    (directory / damaged).touch(mode=0o600)
    (directory / damaged).write_bytes(b"-----BEGIN NOTHING-----\n")
    with pytest.raises(ConfigError, match=damaged.replace(".", r"\.")) as caught:
        network.load(directory, clock=wall)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["node.key", "group.secret"])
def test_a_secret_others_can_read_stops_the_start(closed, wall, name):
    directory = closed.issue("a")
    (directory / name).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        network.load(directory, clock=wall)


def test_the_names_cert_manager_uses_will_do(closed, wall):
    directory = closed.issue("a")
    (directory / "node.crt").rename(directory / "tls.crt")
    (directory / "node.key").rename(directory / "tls.key")
    assert network.load(directory, clock=wall).roles == frozenset()


def test_a_key_kept_elsewhere_will_do(closed, wall, tmp_path):
    own, request = network_admin.request(tmp_path / "node")
    answer = tmp_path / "answer"
    network_admin.issue(closed.directory, answer, days=1, now=wall(), request=request.read_bytes())
    assert not (answer / "node.key").exists()
    assert network.load(answer, identity=own, clock=wall).node_id == own.node_id
    with pytest.raises(ConfigError, match="another key"):
        network.load(answer, identity=Identity.generate(), clock=wall)


# --- a network secret: every node issues itself -------------------------------------------------------------------------


def secret_directory(closed: ClosedNetwork) -> Path:
    return closed.directory  # ca.crt, ca.key and group.secret: what one Kubernetes Secret holds


def test_with_a_network_secret_nodes_issue_themselves_and_trust_each_other(closed, wall):
    a = network.load(secret_directory(closed), identity=Identity.generate(), roles=("seed",), clock=wall)
    b = network.load(secret_directory(closed), identity=Identity.generate(), clock=wall)
    issued = closed.load("c")
    for member in (a, issued):
        b.learn(member.certificate)
        member.learn(b.certificate)
    assert b.roles_of(a.public_key) == {"seed"}
    member = certificates.load_authority((closed.directory / "ca.crt").read_bytes()).read_member(a.certificate)
    assert (member.not_before, member.not_after) == (wall.now - DAY, wall.now + DAY)


def test_a_certificate_of_our_own_making_is_renewed_in_time(closed, wall):
    a = network.load(secret_directory(closed), identity=Identity.generate(), clock=wall)
    b = closed.load("b")
    first = a.certificate
    wall.now += DAY / 2 - 1
    a.poll()
    assert a.certificate == first
    for _ in range(10):
        wall.now += DAY / 2
        a.poll()
        b.learn(a.certificate)
    assert a.status().problems == ()


def test_a_network_secret_needs_the_nodes_own_key(closed, wall):
    with pytest.raises(ConfigError, match="no key of its own"):
        network.load(secret_directory(closed), clock=wall)


def test_an_authority_key_others_can_read_stops_the_start(closed, wall):
    (closed.directory / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        network.load(secret_directory(closed), identity=Identity.generate(), clock=wall)


def test_a_network_secret_with_another_authoritys_key_is_refused(closed, wall):
    (closed.directory / "ca.key").write_bytes(certificates.render_key(Identity.generate()))
    with pytest.raises(NotAMember, match="not from this network's authority"):
        network.load(secret_directory(closed), identity=Identity.generate(), clock=wall)


# --- changes while it runs ------------------------------------------------------------------------------------------------


def test_a_member_revoked_while_connected_is_dropped(closed):
    a, b, c = acquainted(closed, "a", "b", "c")
    told: list[tuple[bool, bool]] = []
    b.on_change(lambda: told.append((b.is_member(a.public_key), b.is_member(c.public_key))))
    b.poll()
    assert told == []
    (closed.issue("b") / "ca.crl").write_bytes(closed.revoke(a.node_id.hex()))
    b.poll()
    assert told == [(False, True)]
    with pytest.raises(NotAMember, match="is revoked"):
        b.learn(a.certificate)
    with pytest.raises(NotAMember):
        b.verify("proof", a.sign("proof", BODY), wire.ProofBody)


def test_a_member_that_goes_out_of_date_while_connected_is_dropped(closed, wall):
    a, b = network.load(closed.issue("a", days=1), clock=wall), closed.load("b")
    b.learn(a.certificate)
    told: list[bool] = []
    b.on_change(lambda: told.append(b.is_member(a.public_key)))
    wall.now += DAY - 1
    b.poll()
    assert told == []
    wall.now += 1
    b.poll()
    b.poll()
    assert told == [False]
    assert b.status().members == 0


def test_a_certificate_that_was_good_before_is_refused_from_the_second_it_is_out_of_date(closed, wall):
    a, b = network.load(closed.issue("a", days=1), clock=wall), closed.load("b")
    b.learn(a.certificate)
    wall.now += DAY
    with pytest.raises(NotAMember, match="out of date since"):
        b.learn(a.certificate)


def test_a_certificate_that_comes_again_is_not_read_again(closed, monkeypatch):
    a, b = closed.load("a"), closed.load("b")
    assert b.learn(a.certificate) == a.public_key
    monkeypatch.setattr(certificates.Authority, "read_member", lambda *_: pytest.fail("read again"))
    assert b.learn(bytes(bytearray(a.certificate))) == a.public_key
    with pytest.raises(pytest.fail.Exception, match="read again"):
        b.learn(a.certificate[:-1] + bytes([a.certificate[-1] ^ 1]))


def test_the_certificates_of_members_crowded_out_are_forgotten_too(closed, monkeypatch):
    monkeypatch.setattr(network, "MAX_MEMBERS", 2)
    a, b, c, d = (closed.load(name) for name in "abcd")
    for member in (a, b, a, c):
        d.learn(member.certificate)
    assert [d.is_member(member.public_key) for member in (a, b, c)] == [True, False, True]
    read: list[bytes] = []
    really = certificates.Authority.read_member

    def read_member(authority: certificates.Authority, der: bytes) -> certificates.Member:
        read.append(der)
        return really(authority, der)

    monkeypatch.setattr(certificates.Authority, "read_member", read_member)
    for member in (a, b):
        d.learn(member.certificate)
    assert read == [b.certificate]


def test_a_node_that_is_itself_revoked_says_so_once_and_goes_on(closed):
    a = closed.load("a")
    (closed.issue("a") / "ca.crl").write_bytes(closed.revoke(a.node_id.hex()))
    with capture_logs() as logs:
        a.poll()
        a.poll()
    problems = [entry["problem"] for entry in logs if entry["event"] == "network membership"]
    assert len(problems) == 1
    assert "is revoked" in problems[0]
    assert "is revoked" in a.status().problems[0]


def test_a_renewed_certificate_is_taken_up(closed, wall):
    a, b = acquainted(closed, "a", "b")
    wall.now += 300 * DAY
    closed.issue("a")
    a.poll()
    assert a.status().not_after == wall.now + 365 * DAY
    b.learn(a.certificate)


def test_a_renewed_authority_of_the_same_key_is_taken_up(closed, wall):
    a, b = acquainted(closed, "a", "b")
    key = certificates.load_key((closed.directory / "ca.key").read_bytes())
    renewed = certificates.make_authority(key, "test", not_before=wall.now, not_after=wall.now + 9999 * DAY)
    (closed.issue("b") / "ca.crt").write_bytes(certificates.render_certificate(renewed.certificate))
    wall.now += 5000 * DAY
    b.poll()
    late = certificates.issue(renewed, key, a.public_key, not_before=wall.now, not_after=wall.now + DAY)
    assert b.learn(late) == a.public_key


def test_another_networks_authority_changes_nothing(closed, tmp_path, wall):
    a, b = acquainted(closed, "a", "b")
    other = ClosedNetwork(tmp_path / "other", wall)
    shutil.copy(other.directory / "ca.crt", closed.issue("b") / "ca.crt")
    b.poll()
    assert b.network_id == a.network_id
    assert b.is_member(a.public_key)
    assert "another network" in b.status().problems[0]


def test_a_new_key_is_not_taken_up_without_a_restart(closed):
    a = closed.load("a")
    for name in ("node.crt", "node.key"):
        shutil.copy(closed.issue("b") / name, closed.issue("a") / name)
    before = a.certificate
    a.poll()
    assert a.certificate == before
    assert "restart the daemon" in a.status().problems[0]


def test_a_changed_group_secret_is_taken_up(closed):
    a = closed.load("a")
    old = a.datagram_mac(b"ping")
    network_admin.rotate_secret(closed.directory)
    network_admin.rotate_secret(closed.directory)
    closed.issue("a")
    a.poll()
    assert a.datagram_mac(b"ping")[0] == 2
    assert a.check_datagram_mac(*old, b"ping")
    assert a.status().epochs == (2, 1)


@pytest.mark.parametrize("name", ["ca.crt", "node.crt", "node.key", "group.secret", "ca.crl"])
def test_a_broken_new_file_changes_nothing_and_warns_once(closed, name):
    a, b = acquainted(closed, "a", "b")
    directory = closed.issue("b")
    (directory / "ca.crl").write_bytes(closed.revoke())
    b.poll()
    good = (directory / name).read_bytes()
    (directory / name).write_bytes(good[: len(good) // 2])
    with capture_logs() as logs:
        for _ in range(3):
            b.poll()
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert name in logs[0]["reason"]
    assert b.is_member(a.public_key)
    assert b.verify("proof", a.sign("proof", BODY), wire.ProofBody) == BODY
    assert b.check_datagram_mac(*a.datagram_mac(b"ping"), b"ping")
    assert name in b.status().problems[0]
    (directory / name).write_bytes(good)
    b.poll()
    assert b.status().problems == ()


def test_a_broken_certificate_does_not_keep_a_revocation_from_taking_effect(closed):
    a, b = acquainted(closed, "a", "b")
    directory = closed.issue("b")
    (directory / "node.crt").write_bytes(b"")
    (directory / "ca.crl").write_bytes(closed.revoke(a.node_id.hex()))
    b.poll()
    assert not b.is_member(a.public_key)


def test_a_forged_revocation_list_revokes_nobody(closed, tmp_path, wall):
    a, b = acquainted(closed, "a", "b")
    other = ClosedNetwork(tmp_path / "other", wall)
    (closed.issue("b") / "ca.crl").write_bytes(other.revoke())
    b.poll()
    assert b.is_member(a.public_key)
    assert "not from this network's authority" in b.status().problems[0]


def test_a_revocation_list_taken_away_still_counts(closed):
    a, b = acquainted(closed, "a", "b")
    directory = closed.issue("b")
    (directory / "ca.crl").write_bytes(closed.revoke(a.node_id.hex()))
    b.poll()
    (directory / "ca.crl").unlink()
    b.poll()
    assert not b.is_member(a.public_key)
    with pytest.raises(NotAMember):
        b.learn(a.certificate)
    assert "revocation list is gone" in b.status().problems[0]


def test_a_revocation_list_out_of_date_still_counts_and_is_warned_about(closed, wall):
    a, b = acquainted(closed, "a", "b")
    (closed.issue("b") / "ca.crl").write_bytes(closed.revoke(a.node_id.hex(), days=1))
    b.poll()
    wall.now += 2 * DAY
    with capture_logs() as logs:
        b.poll()
        b.poll()
    assert not b.is_member(a.public_key)
    assert [entry["event"] for entry in logs] == ["network membership"]
    assert "revocation list was to be renewed" in logs[0]["problem"]


def test_a_certificate_near_its_end_is_warned_about(closed, wall):
    a = closed.load("a")
    assert a.status().problems == ()
    wall.now += 320 * DAY
    assert "ends on" in a.status().problems[0]


def test_a_kubernetes_secret_that_is_swapped_is_taken_up(closed, tmp_path, wall):
    """The files are links to `..data/<name>`, and `..data` is a link that is swapped in one step."""
    mount = tmp_path / "mount"
    mount.mkdir()
    shutil.copytree(closed.issue("a"), mount / "..1")
    (mount / "..data").symlink_to("..1")
    for name in ("ca.crt", "node.crt", "node.key", "group.secret", "ca.crl"):
        (mount / name).symlink_to(f"..data/{name}")
    a, b = network.load(mount, clock=wall), closed.load("b")
    a.learn(b.certificate)
    shutil.copytree(closed.issue("a"), mount / "..2")
    (mount / "..2" / "ca.crl").write_bytes(closed.revoke(b.node_id.hex()))
    (mount / "..new").symlink_to("..2")
    os.rename(mount / "..new", mount / "..data")
    a.poll()
    assert not a.is_member(b.public_key)


def test_run_polls_until_cancelled(closed):
    a, b = acquainted(closed, "a", "b")

    async def main() -> None:
        changed = trio.Event()
        b.on_change(changed.set)
        async with trio.open_nursery() as nursery:
            await nursery.start(b.run)
            (closed.issue("b") / "ca.crl").write_bytes(closed.revoke(a.node_id.hex()))
            started = trio.current_time()
            await changed.wait()
            assert trio.current_time() - started <= network.POLL_SECONDS
            nursery.cancel_scope.cancel()
        assert not b.is_member(a.public_key)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# --- open networks --------------------------------------------------------------------------------------------------------


def test_whoever_knows_the_name_is_in_an_open_network():
    a, b = (open_network("lab", Identity.generate()) for _ in range(2))
    assert a.is_open
    assert a.network_id == b.network_id
    b.learn(a.certificate)
    assert b.verify("proof", a.sign("proof", BODY), wire.ProofBody) == BODY
    assert b.check_datagram_mac(*a.datagram_mac(b"ping"), b"ping")
    assert a.task_key(bytes(32)) == b.task_key(bytes(32))


def test_open_networks_of_two_names_do_not_mix():
    a, b = open_network("lab", Identity.generate()), open_network("lab2", Identity.generate())
    with pytest.raises(NotAMember):
        b.learn(a.certificate)
    assert not b.check_datagram_mac(*a.datagram_mac(b"ping"), b"ping")
    assert a.task_key(bytes(32)) != b.task_key(bytes(32))


def test_an_open_network_is_the_same_in_every_version():
    """Golden: a change here would split networks whose nodes have different versions."""
    a = open_network("swarm", Identity(bytes(range(32))))
    assert a.network_id.hex() == OPEN_NETWORK_ID
    assert a.task_key(bytes(32)).hex() == OPEN_TASK_KEY
    assert a.datagram_mac(b"ping")[1].hex() == OPEN_MAC


def test_an_open_network_is_not_the_closed_network_of_that_name(tmp_path):
    network_admin.create(tmp_path / "authority", "swarm open network lab", days=10, now=0)
    assert (
        network_admin.describe(tmp_path / "authority").authority.network_id
        != open_network("lab", Identity.generate()).network_id
    )


@pytest.mark.parametrize("now", [1_577_836_800.0, 1_900_000_000.0, 4_000_000_000.0])
def test_a_wrong_clock_keeps_nobody_out_of_an_open_network(now):
    a, b = (open_network("lab", Identity.generate(), clock=Wall(now)) for _ in range(2))
    b.learn(a.certificate)
    assert a.status().problems == ()


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "ä", "a/b", "a\n"])
def test_a_bad_name_for_an_open_network_is_refused(name):
    with pytest.raises(ConfigError, match="not a network name"):
        open_network(name, Identity.generate())


def test_an_open_nodes_certificate_follows_from_its_key():
    own = Identity(bytes(range(32)))
    assert open_network("lab", own).certificate == open_network("lab", own).certificate


def test_nothing_printed_holds_a_secret(closed):
    a = closed.load("a")
    secret = (closed.issue("a") / "group.secret").read_text().split()[-1]
    for text in (repr(a), str(a.status()), repr(vars(a))):
        assert a.identity.seed.hex() not in text
        assert secret not in text
