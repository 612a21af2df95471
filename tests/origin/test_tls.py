"""TLS to origins: wrong certificates are refused, private authorities hold for their host only, nothing is downgraded."""

from __future__ import annotations

import datetime
import ssl
from functools import cache
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from swarm.edges import Source
from swarm.errors import ConfigError, NotPermitted, OriginUnreachable, SwarmError
from swarm.origin.origin import OriginReader, OriginSettings
from swarm.origin.tls import TlsStream
from tests.origin.web import CONTENT, Asked, Reply, Web, content_reply, take

SOURCE = Source("https://files.example/model.bin")
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@cache
def authority(name: str = "authority") -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 10 * DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return key, builder.sign(key, hashes.SHA256())


def server_context(
    directory: Path, *names: str, valid_until: datetime.datetime = NOW + DAY, signed_by: str = "authority"
) -> ssl.SSLContext:
    ca_key, ca = authority(signed_by)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_named(names[0]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 5 * DAY)
        .not_valid_after(valid_until)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    file = directory / "server.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


def authority_file(directory: Path, name: str = "authority") -> str:
    file = directory / f"{name}.pem"
    file.write_bytes(authority(name)[1].public_bytes(serialization.Encoding.PEM))
    return str(file)


def tls_site(context: ssl.SSLContext, seen: list[str | None] | None = None) -> Web:
    def note(connection: object, name: str | None, _: object) -> None:
        if seen is not None:
            seen.append(name)

    context.sni_callback = note
    web = Web()
    web.serve("files.example", content_reply, port=443)

    async def wrap(stream: trio.abc.Stream) -> trio.abc.Stream:
        return trio.SSLStream(stream, context, server_side=True, https_compatible=True)

    web.tls = wrap
    return web


def refused(web: Web, match: str, settings: OriginSettings | None = None, kind: type[SwarmError] = OriginUnreachable) -> None:
    async def act(reader: OriginReader) -> None:
        began = trio.current_time()
        with pytest.raises(kind, match=match) as caught:
            await take(reader, SOURCE)
        assert "\n" not in str(caught.value)
        assert trio.current_time() == began, "a wrong certificate is not tried again"

    web(act, settings)
    assert web.asked == []


def test_a_private_authority_holds_for_its_host(tmp_path: Path) -> None:
    async def act(reader: OriginReader) -> None:
        info = await reader.head(SOURCE)
        assert await take(reader, SOURCE, 5, 500_000, info) == CONTENT[5:500_000]

    seen: list[str | None] = []
    web = tls_site(server_context(tmp_path, "files.example"), seen)
    web(act, OriginSettings(ca=(("*.example", authority_file(tmp_path)),)))
    assert seen == ["files.example"]
    assert {asked.connection for asked in web.asked} == {1}


def test_a_private_authority_is_not_trusted_for_other_hosts(tmp_path: Path) -> None:
    settings = OriginSettings(ca=(("other.example", authority_file(tmp_path)),))
    refused(tls_site(server_context(tmp_path, "files.example")), r"certificate of files\.example.*origin\.ca", settings)


def test_a_host_with_a_private_authority_trusts_no_other(tmp_path: Path) -> None:
    settings = OriginSettings(ca=(("files.example", authority_file(tmp_path, "another")),))
    refused(tls_site(server_context(tmp_path, "files.example")), r"certificate of files\.example", settings)


def test_a_self_signed_certificate_is_refused(tmp_path: Path) -> None:
    refused(tls_site(server_context(tmp_path, "files.example")), r"certificate of files\.example is refused")


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    settings = OriginSettings(ca=(("files.example", authority_file(tmp_path)),))
    refused(tls_site(server_context(tmp_path, "files.example", valid_until=NOW - DAY)), "expired", settings)


def test_a_certificate_of_another_host_is_refused(tmp_path: Path) -> None:
    settings = OriginSettings(ca=(("files.example", authority_file(tmp_path)),))
    refused(tls_site(server_context(tmp_path, "evil.example")), "files.example", settings)


def test_a_server_that_speaks_no_tls_is_told_apart(tmp_path: Path) -> None:
    web = Web()
    web.serve("files.example", content_reply, port=443)

    async def plain(stream: trio.abc.Stream) -> trio.abc.Stream:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        return stream

    web.tls = plain
    refused(web, "is it an http:// address")


def test_a_handshake_that_never_ends_is_given_up(tmp_path: Path) -> None:
    async def act(reader: OriginReader) -> None:
        with pytest.raises(OriginUnreachable, match="TLS within"):
            await take(reader, SOURCE)
        assert trio.current_time() <= 45

    async def silent(stream: trio.abc.Stream) -> trio.abc.Stream:
        with trio.move_on_after(300):
            while await stream.receive_some():
                pass
        raise trio.BrokenResourceError

    web = Web()
    web.serve("files.example", content_reply, port=443)
    web.tls = silent
    web(act)


def test_an_unreadable_authority_file_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for file in (tmp_path / "missing.pem", tmp_path / "empty.pem"):
        settings = OriginSettings(ca=(("files.example", str(file)),))
        refused(tls_site(server_context(tmp_path, "files.example")), r"origin\.ca", settings, ConfigError)


def test_a_redirect_from_https_to_http_is_refused(tmp_path: Path) -> None:
    def down(asked: Asked) -> Reply:
        return Reply(302, {"location": "http://files.example/model.bin"})

    async def act(reader: OriginReader) -> None:
        with pytest.raises(NotPermitted, match="plain http"):
            await take(reader, SOURCE)

    web = tls_site(server_context(tmp_path, "files.example"))
    web.serve("files.example", down, port=443)
    web(act, OriginSettings(ca=(("files.example", authority_file(tmp_path)),)))
    assert len(web.dialled) == 1


def test_verification_is_never_switched_off() -> None:
    from swarm.origin.connections import public_tls

    context = public_tls()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


# --- the stream itself ---------------------------------------------------------------------------------------------


class Wire(trio.abc.Stream):
    """A connection that somebody sits on.

    Args:
        cut: Most bytes delivered at a time.
        tamper: Flip a bit of the byte at this offset of what is received.
    """

    def __init__(self, inner: trio.abc.Stream, cut: int = 1 << 20, tamper: int | None = None) -> None:
        self.inner = inner
        self.cut = cut
        self.tamper = tamper
        self.received = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = bytearray(await self.inner.receive_some(min(self.cut, max_bytes or self.cut)))
        if self.tamper is not None and self.received <= self.tamper < self.received + len(data):
            data[self.tamper - self.received] ^= 1
        self.received += len(data)
        return bytes(data)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.inner.aclose()


def talk(directory: Path, cut: int = 1 << 20, tamper: int | None = None, content: bytes = CONTENT) -> tuple[bytes, int]:
    """Send `content` through a `TlsStream` and back; what came back, and the bytes that travelled to us."""
    server = server_context(directory, "files.example")
    client = ssl.create_default_context(cafile=authority_file(directory))
    got = bytearray()
    wires: list[Wire] = []

    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        wire = Wire(ours, cut, tamper)
        wires.append(wire)

        async def echo() -> None:
            tls = trio.SSLStream(theirs, server, server_side=True)
            try:
                while data := await tls.receive_some():
                    await tls.send_all(data)
            except trio.BrokenResourceError:
                pass
            finally:
                await trio.aclose_forcefully(theirs)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(echo)
                stream = TlsStream(wire, client, "files.example")
                try:
                    await stream.handshake()
                    nursery.start_soon(stream.send_all, content)
                    while len(got) < len(content):
                        data = await stream.receive_some()
                        assert data
                        got.extend(data)
                finally:
                    await trio.aclose_forcefully(stream)

    trio.run(main)
    return bytes(got), wires[0].received


@pytest.mark.parametrize("cut", [1, 7, 16_384, 1 << 20])
def test_bytes_arrive_however_the_network_cuts_them(tmp_path: Path, cut: int) -> None:
    content = CONTENT[:20_000] if cut < 100 else CONTENT
    assert talk(tmp_path, cut, content=content)[0] == content


def test_a_byte_changed_on_the_way_is_never_delivered(tmp_path: Path) -> None:
    travelled = talk(tmp_path)[1]
    for part in range(1, 10):
        broken = pytest.RaisesExc((ssl.SSLError, trio.BrokenResourceError))
        with pytest.RaisesGroup(broken, allow_unwrapped=True, flatten_subgroups=True):
            talk(tmp_path, tamper=travelled * part // 10)


def test_a_body_cut_off_inside_tls_is_not_taken_for_whole(tmp_path: Path) -> None:
    async def act(reader: OriginReader) -> None:
        async with reader.read(SOURCE) as body:
            chunks = body.chunks()
            assert await anext(chunks) == b"x" * 100
            with pytest.raises(OriginUnreachable):
                await anext(chunks)

    async def short(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n" + b"x" * 100)

    web = tls_site(server_context(tmp_path, "files.example"))
    web.serve("files.example", short, port=443)
    web(act, OriginSettings(ca=(("files.example", authority_file(tmp_path)),)))
