"""Mutual TLS among members, against real strangers: OpenSSL on both ends, in memory but for one test over TCP.

OpenSSL reads the real clock, so certificates here are dated around it.
"""

import datetime
import os
import ssl
import time
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import NameOID

from swarm import certificates, network, network_admin, tls
from swarm.certificates import Authority
from swarm.errors import ConfigError, NotAMember
from swarm.identity import Identity
from swarm.network import Network, open_network
from tests.closed_network import DAY, ClosedNetwork

Ends = tuple[ssl.SSLObject, ssl.SSLObject]


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, session: ssl.SSLSession | None = None) -> Ends:
    """Both ends, after each has read a byte of the other; raises what the end that refuses raises.

    With TLS 1.3 a client's handshake ends before its certificate is judged: only reading shows that it was accepted.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, session=session)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for steps in ((near.do_handshake, far.do_handshake), (lambda: near.write(b"c"), lambda: far.write(b"s"))):
        waiting = list(steps)
        for _ in range(10):
            waiting = [step for step in waiting if not done(step)]
        assert not waiting
    assert (near.read(1), far.read(1)) == (b"s", b"c")
    return near, far


def done(step) -> bool:
    try:
        step()
    except ssl.SSLWantReadError:
        return False
    return True


def meet(client: Network, server: Network) -> Ends:
    return handshake(client.client_context(), server.server_context())


def peer(end: ssl.SSLObject) -> bytes:
    certificate = end.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def context_of(authority: Authority, certificate: bytes, key: Identity, *, server: bool) -> ssl.SSLContext:
    """What somebody with this certificate and key would use who does not run our checks on itself."""
    context = tls.make_context(authority, server=server)
    tls.load_own(context, certificate, key)
    return context


def refuses(member: Network, certificate: bytes, key: Identity, match: str) -> None:
    """The member refuses this stranger, whoever dials."""
    authority = certificates.load_authority(certificates.render_certificate(member._authority.certificate))
    with pytest.raises(ssl.SSLError, match=match):
        handshake(context_of(authority, certificate, key, server=False), member.server_context())
    with pytest.raises(ssl.SSLError, match=match):
        handshake(member.client_context(), context_of(authority, certificate, key, server=True))


@pytest.fixture
def closed(tmp_path: Path) -> ClosedNetwork:
    return ClosedNetwork(tmp_path)


def test_members_meet_and_know_each_other(closed):
    a, b = closed.load("a"), closed.load("b")
    near, far = meet(a, b)
    assert near.version() == "TLSv1.3"
    assert a.learn(peer(near)) == b.public_key
    assert b.learn(peer(far)) == a.public_key


def test_members_of_an_open_network_meet():
    a, b = (open_network("lab", Identity.generate()) for _ in range(2))
    near, _ = meet(a, b)
    assert a.learn(peer(near)) == b.public_key


def test_members_meet_over_tcp(closed):
    a, b = closed.load("a"), closed.load("b")

    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        host, port = listeners[0].socket.getsockname()

        async def dial() -> None:
            stream = trio.SSLStream(await trio.open_tcp_stream(host, port), a.client_context())
            async with stream:
                await stream.send_all(b"c")
                assert await stream.receive_some(1) == b"s"
                assert a.learn(stream.getpeercert(binary_form=True)) == b.public_key

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery, listeners[0]:
                nursery.start_soon(dial)
                accepted = trio.SSLStream(await listeners[0].accept(), b.server_context(), server_side=True)
                async with accepted:
                    assert await accepted.receive_some(1) == b"c"
                    assert b.learn(accepted.getpeercert(binary_form=True)) == a.public_key
                    await accepted.send_all(b"s")

    trio.run(main)


def test_a_member_of_another_network_is_refused(closed, tmp_path):
    stranger = ClosedNetwork(tmp_path / "other").load("x")
    refuses(closed.load("a"), stranger.certificate, stranger.identity, "CERTIFICATE_VERIFY_FAILED")


def test_a_client_without_a_certificate_is_refused(closed):
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(nobody, closed.load("a").server_context())


def test_an_older_tls_is_refused(closed):
    a, b = closed.load("a"), closed.load("b")
    old = context_of(a._authority, a.certificate, a.identity, server=False)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        handshake(old, b.server_context())


@pytest.mark.parametrize(("start", "end"), [(-100 * DAY, -DAY), (DAY, 100 * DAY)])
def test_a_member_out_of_date_is_refused(closed, start, end):
    key, now = Identity.generate(), time.time()
    authority_key = certificates.load_key((closed.directory / "ca.key").read_bytes())
    older = certificates.make_authority(authority_key, "test", not_before=now - 200 * DAY, not_after=now + 200 * DAY)
    certificate = certificates.issue(older, authority_key, key.public_key, not_before=now + start, not_after=now + end)
    refuses(closed.load("a"), certificate, key, "CERTIFICATE_VERIFY_FAILED")


def test_a_certificate_that_a_member_issued_is_refused(closed):
    a, key = closed.load("a"), Identity.generate()
    member = x509.load_der_x509_certificate(closed.load("m").certificate)
    forged = (
        x509.CertificateBuilder()
        .subject_name(member.subject)
        .issuer_name(member.subject)
        .public_key(ed25519.Ed25519PublicKey.from_public_bytes(key.public_key))
        .serial_number(1)
        .not_valid_before(datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1))
        .not_valid_after(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1))
        .sign(ed25519.Ed25519PrivateKey.from_private_bytes(closed.load("m").identity.seed), None)
    )
    refuses(a, forged.public_bytes(serialization.Encoding.DER), key, "CERTIFICATE_VERIFY_FAILED")


def test_a_stolen_certificate_is_worth_nothing_without_its_key(closed):
    a = closed.load("a")
    with pytest.raises(ConfigError, match="does not take"):
        context_of(a._authority, a.certificate, Identity.generate(), server=False)


def test_a_revoked_member_gets_through_tls_and_is_refused_by_learn(closed):
    """Why whoever uses the contexts must call `learn` before anything else."""
    a, b = closed.load("a"), closed.load("b")
    (closed.issue("b") / "ca.crl").write_bytes(closed.revoke(a.node_id.hex()))
    b.poll()
    _, far = meet(a, b)
    with pytest.raises(NotAMember, match="is revoked"):
        b.learn(peer(far))


def test_an_rsa_key_with_a_certificate_of_our_authority_is_refused_by_learn(closed, tmp_path):
    b = closed.load("b")
    key = rsa.generate_private_key(65537, 2048)
    signer = certificates.load_key((closed.directory / "ca.key").read_bytes())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rsa")]))
        .issuer_name(b._authority.parsed.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1))
        .not_valid_after(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier("swarm://member")]), False)
        .sign(ed25519.Ed25519PrivateKey.from_private_bytes(signer.seed), None)
    )
    both = tmp_path / "rsa.pem"
    both.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = tls.make_context(b._authority, server=False)
    context.load_cert_chain(both)
    _, far = handshake(context, b.server_context())
    with pytest.raises(NotAMember, match="RSA"):
        b.learn(peer(far))


def test_a_companys_intermediate_can_be_the_authority(tmp_path):
    """`ca.crt` is trusted as it stands: its issuer is neither asked for nor able to make members."""
    now = time.time()
    root_key, key = Identity.generate(), Identity.generate()
    root = certificates.make_authority(root_key, "root", not_before=now - DAY, not_after=now + DAY)
    intermediate = Authority(
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "intermediate")]))
        .issuer_name(root.parsed.subject)
        .public_key(ed25519.Ed25519PublicKey.from_public_bytes(key.public_key))
        .serial_number(2)
        .not_valid_before(datetime.datetime.fromtimestamp(int(now - DAY), datetime.UTC))
        .not_valid_after(datetime.datetime.fromtimestamp(int(now + DAY), datetime.UTC))
        .add_extension(x509.BasicConstraints(True, 0), True)
        .sign(ed25519.Ed25519PrivateKey.from_private_bytes(root_key.seed), None)
    )
    directory = tmp_path / "authority"
    directory.mkdir()
    (directory / "ca.crt").write_bytes(certificates.render_certificate(intermediate.certificate))
    (directory / "group.secret").write_text("1 " + "0123456789abcdef" * 4)
    (directory / "group.secret").chmod(0o600)
    (directory / "ca.key").touch(0o600)
    (directory / "ca.key").write_bytes(certificates.render_key(key))
    a, b = (network.load(directory, identity=Identity.generate()) for _ in range(2))
    near, _ = meet(a, b)
    assert a.learn(peer(near)) == b.public_key
    above = Identity.generate()
    of_root = certificates.issue(root, root_key, above.public_key, not_before=now - DAY, not_after=now + DAY)
    refuses(a, of_root, above, "CERTIFICATE_VERIFY_FAILED")


def test_a_renewed_certificate_is_presented_by_the_contexts_there_are(closed):
    a, b = closed.load("a"), closed.load("b")
    client, server = a.client_context(), b.server_context()
    before = b.certificate
    closed.wall.now += 60
    closed.issue("b")
    b.poll()
    near, _ = handshake(client, server)
    assert peer(near) == b.certificate != before
    assert b.server_context() is server


def test_a_renewed_authority_is_trusted_by_the_contexts_there_are(closed):
    a, b = closed.load("a"), closed.load("b")
    server = b.server_context()
    key = certificates.load_key((closed.directory / "ca.key").read_bytes())
    now = time.time()
    # Under another name, so that what the old certificate allowed does not help.
    renewed = certificates.make_authority(key, "renewed", not_before=now - DAY, not_after=now + 9999 * DAY)
    certificate = certificates.issue(renewed, key, a.public_key, not_before=now - DAY, not_after=now + DAY)
    context = context_of(b._authority, certificate, a.identity, server=False)
    with pytest.raises(ssl.SSLError):
        handshake(context, server)
    (closed.issue("b") / "ca.crt").write_bytes(certificates.render_certificate(renewed.certificate))
    b.poll()
    _, far = handshake(context, server)
    assert b.learn(peer(far)) == a.public_key


def test_no_session_is_resumed_so_that_a_certificate_is_shown_each_time(closed):
    a, b = closed.load("a"), closed.load("b")
    near, _ = meet(a, b)
    assert near.session is None or not near.session.has_ticket
    again, _ = handshake(a.client_context(), b.server_context())
    assert not again.session_reused


def test_making_contexts_leaves_no_key_and_no_descriptor_behind(closed, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    a = closed.load("a")
    before = sorted(os.listdir("/proc/self/fd"))
    a.server_context()
    a.client_context()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "none").exists()


def test_a_node_issued_by_request_meets_the_others(closed, tmp_path):
    own, request = network_admin.request(tmp_path / "node")
    network_admin.issue(closed.directory, tmp_path / "node", days=1, now=time.time(), request=request.read_bytes())
    a, b = network.load(tmp_path / "node"), closed.load("b")
    near, far = meet(a, b)
    assert b.learn(peer(far)) == own.public_key
    assert a.learn(peer(near)) == b.public_key
