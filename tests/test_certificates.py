"""What makes a certificate a member's: each way of not being one is tried."""

import contextlib
import dataclasses
import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import certificates
from swarm.certificates import Authority
from swarm.errors import ConfigError, NotAMember
from swarm.identity import Identity

NOW = 1_800_000_000.0
DAY = 24 * 3600.0
KEY = Identity(bytes(range(32)))
AUTHORITY_KEY = Identity(bytes(range(1, 33)))
OTHER_KEY = Identity(bytes(range(2, 34)))
AUTHORITY = certificates.make_authority(AUTHORITY_KEY, "test", not_before=NOW - DAY, not_after=NOW + 3650 * DAY)
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
GOOD = certificates.issue(AUTHORITY, AUTHORITY_KEY, KEY.public_key, not_before=NOW - DAY, not_after=NOW + DAY)


def issue(**changes) -> bytes:
    options = {"not_before": NOW - DAY, "not_after": NOW + DAY} | changes
    return certificates.issue(AUTHORITY, AUTHORITY_KEY, options.pop("public_key", KEY.public_key), **options)


def private(key: Identity) -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.from_private_bytes(key.seed)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def uris(*values: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(value) for value in values])


def own_uri() -> str:
    return f"swarm://node/{KEY.node_id.hex()}"


def built(
    *extensions: tuple[x509.ExtensionType, bool], public_key=None, signer=None, issuer: x509.Name | None = None, digest=None
):
    """A certificate from parts; by default as bare as a member's may be."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(name("anything"))
        .issuer_name(issuer or AUTHORITY.parsed.subject)
        .public_key(public_key or private(KEY).public_key())
        .serial_number(7)
        .not_valid_before(datetime.datetime.fromtimestamp(NOW - DAY, datetime.UTC))
        .not_valid_after(datetime.datetime.fromtimestamp(NOW + DAY, datetime.UTC))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer or private(AUTHORITY_KEY), digest)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def resigned(tbs: bytes) -> bytes:
    """A certificate with this body and the authority's good signature over it."""
    algorithm = bytes.fromhex("300506032b6570")
    inner = tbs + algorithm + bytes.fromhex("034100") + private(AUTHORITY_KEY).sign(tbs)
    return b"\x30\x82" + len(inner).to_bytes(2, "big") + inner


def refused(certificate: bytes, match: str, authority: Authority = AUTHORITY) -> None:
    with pytest.raises(NotAMember, match=match) as caught:
        authority.read_member(certificate)
    assert "\n" not in str(caught.value)


# --- members -------------------------------------------------------------------------------------------------------


def test_an_issued_certificate_says_who_what_and_how_long():
    member = AUTHORITY.read_member(issue(roles=("seed", "scheduler")))
    assert member.public_key == KEY.public_key
    assert member.node_id == KEY.node_id
    assert member.roles == {"seed", "scheduler"}
    assert (member.not_before, member.not_after) == (NOW - DAY, NOW + DAY)
    assert len(member.certificate) < 700


def test_a_bare_certificate_from_another_pki_will_do():
    assert AUTHORITY.read_member(der(built((uris("spiffe://elsewhere/x", own_uri()), False)))).node_id == KEY.node_id


def test_an_issuer_that_cannot_know_the_key_may_say_member():
    member = AUTHORITY.read_member(der(built((uris("swarm://member", "swarm://role/seed"), False))))
    assert (member.node_id, sorted(member.roles)) == (KEY.node_id, ["seed"])


def test_a_certificate_of_another_authority_is_refused():
    other = certificates.make_authority(OTHER_KEY, "test", not_before=NOW - DAY, not_after=NOW + DAY)
    forged = certificates.issue(other, OTHER_KEY, KEY.public_key, not_before=NOW - DAY, not_after=NOW + DAY)
    refused(forged, "not from this network's authority")


def test_a_certificate_signed_by_a_member_is_refused():
    own = issue()
    subject = x509.load_der_x509_certificate(own).subject
    refused(der(built((uris(own_uri()), False), signer=private(KEY), issuer=subject)), "not from this network's authority")


def test_a_certificate_signed_by_itself_is_refused():
    refused(der(built((uris(own_uri()), False), signer=private(KEY))), "not from this network's authority")


def test_the_right_signature_under_another_issuers_name_is_refused():
    refused(der(built((uris(own_uri()), False), issuer=name("another"))), "not from this network's authority")


def test_the_authoritys_own_certificate_is_not_a_members():
    refused(AUTHORITY.certificate, "an authority's")


def test_a_certificate_that_could_sign_others_is_refused():
    refused(der(built((uris(own_uri()), False), (x509.BasicConstraints(True, None), True))), "an authority's")


@pytest.mark.parametrize(
    ("key", "what"), [(RSA_KEY, "RSA"), (EC_KEY, "ECDSA"), (ed448.Ed448PrivateKey.generate(), "another kind")]
)
def test_a_key_that_is_not_ed25519_is_refused(key, what):
    refused(der(built((uris("swarm://member"), False), public_key=key.public_key())), what)


def test_a_certificate_for_a_key_under_which_anybody_can_sign_is_refused():
    refused(issue(public_key=b"\1" + bytes(31)), "anybody can sign")
    refused(issue(public_key=bytes(32)), "anybody can sign")


def test_an_id_that_is_not_the_keys_is_refused():
    theirs = f"swarm://node/{OTHER_KEY.node_id.hex()}"
    refused(der(built((uris(theirs), False))), "its key is that of")
    refused(der(built((uris(own_uri(), theirs), False))), "its key is that of")
    refused(der(built((uris("swarm://member", theirs), False))), "its key is that of")


@pytest.mark.parametrize(
    "uri",
    [
        "swarm://node/",
        "swarm://node/" + KEY.node_id.hex()[:-1],
        "swarm://node/" + KEY.node_id.hex().upper(),
        "swarm://node/" + KEY.node_id.hex() + "/x",
        "http://node/" + KEY.node_id.hex(),
        "x-swarm://member",
        "swarm://member/x",
    ],
)
def test_a_certificate_that_names_no_node_is_refused(uri):
    refused(der(built((uris(uri), False))), "no URI swarm://node/")


def test_a_certificate_for_something_else_of_the_same_company_is_refused():
    refused(der(built()), "no URI swarm://node/")
    refused(der(built((x509.SubjectAlternativeName([x509.DNSName("web.example")]), False))), "no URI swarm://node/")


@pytest.mark.parametrize("role", ["Seed", "a b", "-seed", "", "x" * 33, "seed/scheduler"])
def test_what_is_not_a_role_gives_none(role):
    text = f"swarm://role/{role}".replace(" ", "%20")
    assert AUTHORITY.read_member(der(built((uris(own_uri(), text), False)))).roles == frozenset()


def test_more_roles_than_are_read_are_refused():
    refused(der(built((uris(own_uri(), *(f"swarm://role/r{i}" for i in range(9))), False))), "9 roles")


def test_a_certificate_for_one_direction_only_is_refused():
    for usage in (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CODE_SIGNING):
        refused(der(built((uris(own_uri()), False), (x509.ExtendedKeyUsage([usage]), False))), "client auth and server auth")


def test_a_key_that_may_not_sign_is_refused():
    usage = x509.KeyUsage(False, False, True, False, False, False, False, False, False)
    refused(der(built((uris(own_uri()), False), (usage, True))), "digital signature")


def test_a_critical_extension_we_do_not_know_is_refused():
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\5\0")
    refused(der(built((uris(own_uri()), False), (unknown, True))), r"1\.3\.6\.1\.4\.1\.99999\.1")
    AUTHORITY.read_member(der(built((uris(own_uri()), False), (unknown, False))))


def test_a_certificate_longer_than_travels_is_refused_unread():
    refused(bytes(certificates.MAX_CERTIFICATE_BYTES + 1), "4097 bytes")


def test_a_serial_number_that_is_not_positive_is_refused_and_prints_nothing(recwarn: pytest.WarningsRecorder):
    tbs = built((uris(own_uri()), False)).tbs_certificate_bytes
    assert tbs.count(b"\2\1\7") == 1
    for serial in (b"\2\1\0", b"\2\1\xf9"):
        refused(resigned(tbs.replace(b"\2\1\7", serial)), "positive serial")
    assert not recwarn.list


def test_an_odd_name_is_no_reason_to_print_a_warning(recwarn: pytest.WarningsRecorder):
    tbs = built(
        (uris(own_uri()), False), issuer=x509.Name([x509.NameAttribute(NameOID.COUNTRY_NAME, "DE")])
    ).tbs_certificate_bytes
    refused(
        resigned(
            tbs.replace(b"\x30\x0d\x31\x0b\x30\x09\6\3\x55\4\6\x13\2DE", b"\x30\x0d\x31\x0b\x30\x09\6\3\x55\4\6\x0c\2\xc3\xa9")
        ),
        "authority",
    )
    assert not recwarn.list


def test_a_certificate_of_an_unknown_version_is_refused():
    assert GOOD.count(b"\xa0\3\2\1\2") == 1
    refused(GOOD.replace(b"\xa0\3\2\1\2", b"\xa0\3\2\1\x20"), "malformed")


def test_something_after_the_certificate_is_refused():
    refused(issue() + b"\0", "malformed")


@given(data=st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_garbage_is_refused_cleanly(data):
    with pytest.raises(NotAMember):
        AUTHORITY.read_member(data)


@given(position=st.integers(0, 10_000), value=st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_never_changes_what_a_certificate_says(position, value):
    # The count of unused bits of the signature is outside of what is signed, and means nothing; all else must be refused.
    data = bytearray(GOOD)
    data[position % len(data)] ^= value
    with contextlib.suppress(NotAMember):
        member = AUTHORITY.read_member(bytes(data))
        assert dataclasses.replace(member, certificate=GOOD) == AUTHORITY.read_member(GOOD)
        assert position % len(data) == len(data) - 65


@given(position=st.integers(0, 10_000), value=st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_that_the_authority_signed_raises_nothing_else(position, value):
    # A careless authority signs what it is given: the parser sees a malformed body under a good signature.
    tbs = bytearray(x509.load_der_x509_certificate(GOOD).tbs_certificate_bytes)
    tbs[position % len(tbs)] ^= value
    data = resigned(bytes(tbs))
    with contextlib.suppress(NotAMember):
        AUTHORITY.read_member(data)


# --- authorities -----------------------------------------------------------------------------------------------------


def authority_from(key, digest, *extensions: tuple[x509.ExtensionType, bool]) -> Authority:
    extensions = extensions or ((x509.BasicConstraints(True, None), True),)
    return Authority(built(*extensions, public_key=key.public_key(), signer=key, issuer=name("anything"), digest=digest))


@pytest.mark.parametrize(("key", "digest"), [(RSA_KEY, hashes.SHA256()), (EC_KEY, hashes.SHA384()), (private(OTHER_KEY), None)])
def test_a_companys_authority_of_any_usual_kind_can_have_members(key, digest):
    authority = authority_from(key, digest)
    good = built((uris(own_uri()), False), signer=key, issuer=authority.parsed.subject, digest=digest)
    assert authority.read_member(der(good)).node_id == KEY.node_id
    forged = built((uris(own_uri()), False), signer=private(KEY), issuer=authority.parsed.subject)
    refused(der(forged), "not from this network's authority", authority)


def test_the_network_id_is_the_hash_of_the_authoritys_key():
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        private(AUTHORITY_KEY)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    assert AUTHORITY.network_id == digest.finalize()


def test_a_renewed_authority_of_the_same_key_is_the_same_network():
    renewed = certificates.make_authority(AUTHORITY_KEY, "test", not_before=NOW, not_after=NOW + 9999 * DAY)
    assert renewed.network_id == AUTHORITY.network_id
    assert renewed.certificate != AUTHORITY.certificate
    assert renewed.read_member(issue()).node_id == KEY.node_id


def test_a_short_rsa_authority_is_refused():
    with pytest.raises(ConfigError, match="1024 bits"):
        authority_from(rsa.generate_private_key(65537, 1024), hashes.SHA256())  # noqa: S505 - what is refused


def test_an_authority_with_another_kind_of_key_is_refused():
    with pytest.raises(ConfigError, match="another kind"):
        authority_from(ed448.Ed448PrivateKey.generate(), None)


def test_a_members_certificate_in_the_place_of_the_authoritys_is_refused():
    with pytest.raises(ConfigError, match="no CA:TRUE"):
        Authority(x509.load_der_x509_certificate(issue()))
    with pytest.raises(ConfigError, match="no CA:TRUE"):
        Authority(built((uris(own_uri()), False)))


def test_an_authority_whose_key_may_not_sign_certificates_is_refused():
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    with pytest.raises(ConfigError, match="does not allow"):
        authority_from(private(OTHER_KEY), None, (x509.BasicConstraints(True, None), True), (usage, True))


def test_an_authority_limited_in_a_way_we_do_not_check_is_refused():
    limits = x509.NameConstraints([x509.DNSName("example.com")], None)
    with pytest.raises(ConfigError, match="critical extension"):
        authority_from(private(OTHER_KEY), None, (x509.BasicConstraints(True, None), True), (limits, True))


def test_an_authority_under_whose_key_anybody_can_sign_is_refused():
    weak = ed25519.Ed25519PublicKey.from_public_bytes(b"\1" + bytes(31))
    with pytest.raises(ConfigError, match="anybody can sign"):
        Authority(built((x509.BasicConstraints(True, None), True), public_key=weak))


def test_an_authority_file_holds_one_certificate():
    pem = certificates.render_certificate(AUTHORITY.certificate)
    assert certificates.load_authority(b"comment\n" + pem).network_id == AUTHORITY.network_id
    for text, match in ((pem + pem, "2 certificates"), (b"", "malformed"), (b"\xff\0", "malformed"), (pem[:-60], "malformed")):
        with pytest.raises(ConfigError, match=match):
            certificates.load_authority(text)


def test_a_sha1_signature_of_the_authority_is_refused():
    # No library of today signs with SHA-1, so the algorithm is looked at on a certificate that only claims it.
    authority = authority_from(RSA_KEY, hashes.SHA256())
    good = der(built((uris(own_uri()), False), signer=RSA_KEY, issuer=authority.parsed.subject, digest=hashes.SHA256()))
    sha256, sha1 = bytes.fromhex("2a864886f70d01010b"), bytes.fromhex("2a864886f70d010105")
    assert good.count(sha256) == 2
    with pytest.raises(NotAMember) as caught:
        authority.read_member(good.replace(sha256, sha1))
    assert "sha1" in str(caught.value.__cause__)


# --- keys and requests ------------------------------------------------------------------------------------------------


def test_a_key_file_is_read_as_it_was_written():
    assert certificates.load_key(certificates.render_key(KEY)).seed == KEY.seed


@pytest.mark.parametrize(("key", "what"), [(RSA_KEY, "RSA"), (EC_KEY, "ECDSA")])
def test_a_node_key_of_another_kind_is_refused(key, what):
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with pytest.raises(ConfigError, match=f"{what} key"):
        certificates.load_key(pem)


def test_an_encrypted_key_is_refused_with_what_to_do():
    pem = private(KEY).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    with pytest.raises(ConfigError, match="passphrase"):
        certificates.load_key(pem)


@given(data=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_garbage_for_a_key_is_a_clean_error(data):
    with pytest.raises(ConfigError):
        certificates.load_key(data)


def test_a_request_gives_the_key_and_nothing_else():
    assert certificates.read_request(certificates.make_request(KEY)) == KEY.public_key


def test_a_request_for_somebody_elses_key_is_refused():
    request = certificates.make_request(KEY)
    raw = x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER)
    stolen = x509.load_der_x509_csr(raw.replace(KEY.public_key, OTHER_KEY.public_key))
    with pytest.raises(ConfigError, match="not signed"):
        certificates.read_request(stolen.public_bytes(serialization.Encoding.PEM))


def test_a_request_for_a_key_under_which_anybody_can_sign_is_refused():
    raw = x509.load_pem_x509_csr(certificates.make_request(KEY)).public_bytes(serialization.Encoding.DER)
    weak = x509.load_der_x509_csr(raw.replace(KEY.public_key, b"\1" + bytes(31))[:-64] + b"\1" + bytes(63))
    assert weak.is_signature_valid  # OpenSSL is content, which is the attack
    with pytest.raises(ConfigError, match="not signed"):
        certificates.read_request(weak.public_bytes(serialization.Encoding.PEM))


def test_a_request_of_another_kind_is_refused():
    request = x509.CertificateSigningRequestBuilder().subject_name(name("x")).sign(RSA_KEY, hashes.SHA256())
    with pytest.raises(ConfigError, match="RSA"):
        certificates.read_request(request.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(ConfigError, match="malformed"):
        certificates.read_request(b"-----BEGIN NOTHING-----")


# --- issuing ----------------------------------------------------------------------------------------------------------


def test_a_certificate_does_not_outlive_its_authority():
    member = AUTHORITY.read_member(issue(not_before=0, not_after=NOW + 99_999 * DAY))
    assert (member.not_before, member.not_after) == (AUTHORITY.not_before, AUTHORITY.not_after)


def test_nothing_is_issued_by_an_authority_out_of_date():
    with pytest.raises(ConfigError, match="out of date"):
        issue(not_before=AUTHORITY.not_after, not_after=AUTHORITY.not_after + DAY)


@pytest.mark.parametrize("role", ["Seed", "", "a b", "seed\nscheduler", "é"])
def test_a_bad_role_is_not_issued(role):
    with pytest.raises(ConfigError, match="not a role"):
        issue(roles=(role,))


def test_too_many_roles_are_not_issued():
    with pytest.raises(ConfigError, match="9 roles"):
        issue(roles=tuple(f"r{i}" for i in range(9)))


def test_an_authority_without_key_identifier_can_issue():
    authority = authority_from(private(AUTHORITY_KEY), None)
    made = certificates.issue(authority, AUTHORITY_KEY, KEY.public_key, not_before=NOW - DAY, not_after=NOW + DAY)
    assert authority.read_member(made).node_id == KEY.node_id


# --- revocation ---------------------------------------------------------------------------------------------------------


def revocation_list(serials=(7,), key=AUTHORITY_KEY, authority=AUTHORITY) -> bytes:
    return certificates.make_revocation_list(authority, key, serials, now=NOW, next_update=NOW + DAY, number=3)


def test_a_revocation_list_is_read_as_it_was_written():
    pem = revocation_list((7, 2**150))
    raw = x509.load_pem_x509_crl(pem).public_bytes(serialization.Encoding.DER)
    for data in (pem, raw):
        revoked = AUTHORITY.read_revoked(data)
        assert revoked.serials == {7, 2**150}
        assert (revoked.number, revoked.issued, revoked.next_update) == (3, NOW, NOW + DAY)


def test_an_empty_revocation_list_is_one():
    assert AUTHORITY.read_revoked(revocation_list(())).serials == frozenset()


def test_a_revocation_list_signed_by_somebody_else_is_refused():
    with pytest.raises(ConfigError, match="not from this network's authority"):
        AUTHORITY.read_revoked(revocation_list(key=OTHER_KEY))


def test_a_revocation_list_of_another_network_is_refused():
    other = certificates.make_authority(AUTHORITY_KEY, "another", not_before=NOW - DAY, not_after=NOW + DAY)
    with pytest.raises(ConfigError, match="not from this network's authority"):
        AUTHORITY.read_revoked(revocation_list(authority=other))


def test_a_delta_does_not_pass_for_a_whole_list():
    builder = x509.CertificateRevocationListBuilder().issuer_name(AUTHORITY.parsed.subject)
    builder = builder.last_update(datetime.datetime.fromtimestamp(NOW, datetime.UTC))
    builder = builder.next_update(datetime.datetime.fromtimestamp(NOW + DAY, datetime.UTC))
    delta = builder.add_extension(x509.DeltaCRLIndicator(3), critical=True).sign(private(AUTHORITY_KEY), None)
    with pytest.raises(ConfigError, match="only part of one"):
        AUTHORITY.read_revoked(delta.public_bytes(serialization.Encoding.PEM))


@given(position=st.integers(0, 10_000), value=st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_a_changed_byte_never_changes_what_a_revocation_list_says(position, value):
    good = x509.load_pem_x509_crl(revocation_list()).public_bytes(serialization.Encoding.DER)
    data = bytearray(good)
    data[position % len(data)] ^= value
    with contextlib.suppress(ConfigError):
        assert AUTHORITY.read_revoked(bytes(data)) == AUTHORITY.read_revoked(good)
        assert position % len(data) == len(data) - 65
