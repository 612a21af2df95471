"""X.509: what makes a certificate a member's, and making such certificates.

A member is whoever holds a certificate signed by the network's authority itself, for an Ed25519 key, with a URI
``swarm://node/<id of that key>``, or ``swarm://member`` from an issuer that cannot know the key beforehand.  Further
URIs ``swarm://role/<role>`` give roles.  Other names in it mean nothing to us: a node is its key, not its address.

There are no intermediates: a member's certificate travels alone in a message, and a chain of length one leaves the least
to get wrong.  With a larger PKI, the authority is the certificate that signs members, self-signed or not.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from swarm.errors import ConfigError, NotAMember
from swarm.identity import Identity, is_weak_key, node_id_of

MAX_CERTIFICATE_BYTES: Final = 4096
"""As on the wire; ours have about 500.  Protects the parser from what a stranger sends."""

BACKDATED_SECONDS: Final = 24 * 3600
"""A new member must be believed by nodes whose clock is behind."""

MIN_RSA_BITS: Final = 2048
MAX_ROLES: Final = 8

_SKIPPED_BY_CHECKS: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)
"""Critical extensions that are checked here, or restrict nothing we do.  Any other one must be refused (RFC 5280, 4.2)."""

_PARSE_ERRORS: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_NODE_URI: Final = re.compile(r"swarm://node/([0-9a-f]{40})")
_ROLE_URI: Final = re.compile(r"swarm://role/([a-z][a-z0-9-]{0,31})")
_MEMBER_URI: Final = "swarm://member"

AuthorityPublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class Member:
    """What a checked certificate says.  Whether it is in date and not revoked is asked again each time.

    Attributes:
        certificate: DER.
        not_before: Wall time, seconds; inclusive.
        not_after: Wall time, seconds; from then on it is out of date.
    """

    public_key: bytes
    node_id: bytes
    roles: frozenset[str]
    serial: int
    not_before: float
    not_after: float
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Revoked:
    """A certificate revocation list: serial numbers, and when its issuer promised the next one."""

    serials: frozenset[int] = frozenset()
    issued: float = 0.0
    next_update: float | None = None
    number: int = 0


class Authority:
    """The certificate that signs members.

    Attributes:
        network_id: SHA-256 of its public key (DER): a renewed certificate of the same key is the same network.
        certificate: DER.
        name: Its common name, for people.
    """

    __slots__ = ("_certificate", "certificate", "key", "name", "network_id", "not_after", "not_before")

    def __init__(self, certificate: x509.Certificate) -> None:
        """Check that it can be an authority.

        Raises:
            ConfigError: It cannot.
        """
        with _malformed(ConfigError, "the authority's certificate"):
            key = _check_authority(certificate)
            self.name = _common_name(certificate.subject)
        self._certificate = certificate
        self.key = key
        self.certificate = certificate.public_bytes(serialization.Encoding.DER)
        spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.network_id = hashlib.sha256(spki).digest()
        self.not_before = certificate.not_valid_before_utc.timestamp()
        self.not_after = certificate.not_valid_after_utc.timestamp()

    @property
    def parsed(self) -> x509.Certificate:
        return self._certificate

    def read_member(self, certificate_untrusted: bytes) -> Member:
        """Check everything about a DER certificate that time and revocation cannot change.

        Raises:
            NotAMember: What is wrong with it.
        """
        if len(certificate_untrusted) > MAX_CERTIFICATE_BYTES:
            raise NotAMember(
                f"its certificate has {len(certificate_untrusted)} bytes, at most {MAX_CERTIFICATE_BYTES} are read"
            )
        with _malformed(NotAMember, "its certificate"):
            certificate = x509.load_der_x509_certificate(certificate_untrusted)
            self._check_signature(certificate)
            return _read_member(certificate, certificate_untrusted)

    def _check_signature(self, certificate: x509.Certificate) -> None:
        try:
            _check_hash(certificate)
            certificate.verify_directly_issued_by(self._certificate)
        except (InvalidSignature, ValueError, TypeError) as error:
            issuer = _common_name(certificate.issuer)
            raise NotAMember(f"its certificate is not from this network's authority (issuer {issuer!r})") from error

    def read_revoked(self, data: bytes) -> Revoked:
        """Check a revocation list, PEM or DER.

        A list out of date still counts: to forget what was revoked because nobody came to renew the list would be
        the worst answer, to stop the network the second worst.  Whoever reads it warns.

        Raises:
            ConfigError: Malformed, of another authority, or only a part of a list.
        """
        with _malformed(ConfigError, "the revocation list"):
            is_pem = data.lstrip().startswith(b"-----BEGIN")
            revoked = x509.load_pem_x509_crl(data) if is_pem else x509.load_der_x509_crl(data)
            if not self._signed(revoked):
                raise ConfigError(
                    f"the revocation list is not from this network's authority (issuer {_common_name(revoked.issuer)!r})"
                )
            for extension in revoked.extensions:
                if extension.critical:
                    # A delta, or a list that covers some certificates only: what it leaves out may be revoked all the same.
                    raise ConfigError(f"the revocation list is only part of one ({extension.oid._name})")
            return Revoked(
                frozenset(entry.serial_number for entry in revoked),
                revoked.last_update_utc.timestamp(),
                revoked.next_update_utc.timestamp() if revoked.next_update_utc else None,
                _crl_number(revoked),
            )

    def _signed(self, revoked: x509.CertificateRevocationList) -> bool:
        _check_hash(revoked)
        return revoked.issuer == self._certificate.subject and revoked.is_signature_valid(self.key)


def load_authority(pem: bytes) -> Authority:
    """Read `ca.crt`.

    Raises:
        ConfigError: Not exactly one PEM certificate, or not an authority's.
    """
    with _malformed(ConfigError, "the authority's certificate"):
        certificates = x509.load_pem_x509_certificates(pem)
    if len(certificates) != 1:
        raise ConfigError(
            f"it holds {len(certificates)} certificates; a network has one authority: keep only the one that signs members"
        )
    return Authority(certificates[0])


def load_certificate(data: bytes) -> bytes:
    """DER of the first certificate in PEM (further ones are a chain we have no use for) or DER.

    Raises:
        ConfigError: There is none.
    """
    with _malformed(ConfigError, "the certificate"):
        if not data.lstrip().startswith(b"-----BEGIN"):
            return x509.load_der_x509_certificate(data).public_bytes(serialization.Encoding.DER)
        return x509.load_pem_x509_certificates(data)[0].public_bytes(serialization.Encoding.DER)


def load_key(pem: bytes) -> Identity:
    """An Ed25519 private key in PEM (PKCS #8), as `swarm network` and cert-manager write it.

    Raises:
        ConfigError: Of another kind, encrypted, or malformed.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise ConfigError("the key is encrypted; give it without a passphrase, in a file only the daemon can read") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        # The cause may quote what it read.
        raise ConfigError("it is not a private key in PEM (PKCS #8)") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"it is {_describe_key(key)}; a node's key and ours are Ed25519")
    return Identity(key.private_bytes_raw())


def render_key(identity: Identity) -> bytes:
    """PEM (PKCS #8, not encrypted).  For a file of mode 0600."""
    return _private_key(identity).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def render_certificate(der: bytes) -> bytes:
    """PEM."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


# --- reading ------------------------------------------------------------------------------------------------------


@contextmanager
def _malformed(error_type: type[ConfigError] | type[NotAMember], what: str) -> Iterator[None]:
    """Extensions are parsed when they are asked for, so every look at a certificate may find it malformed.

    `cryptography` warns about oddities that do not matter here; a stranger's certificate must not print anything.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except _PARSE_ERRORS as error:
        raise error_type(f"{what} is malformed: {error}") from error


def _check_authority(certificate: x509.Certificate) -> AuthorityPublicKey:
    key = certificate.public_key()
    if not isinstance(key, AuthorityPublicKey):
        raise ConfigError(f"the authority has {_describe_key(key)}; it may be Ed25519, ECDSA or RSA")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        raise ConfigError(f"the authority's RSA key has {key.key_size} bits; {MIN_RSA_BITS} are the least")
    if isinstance(key, ed25519.Ed25519PublicKey) and is_weak_key(key.public_bytes_raw()):
        raise ConfigError("the authority's key is one under which anybody can sign")
    extensions = certificate.extensions
    if not _has_extension(extensions, x509.BasicConstraints, lambda value: value.ca, default=False):
        raise ConfigError("it is not an authority's certificate (no CA:TRUE); give the one that signs members")
    if not _has_extension(extensions, x509.KeyUsage, lambda value: value.key_cert_sign, default=True):
        raise ConfigError("the authority's certificate does not allow its key to sign certificates")
    _refuse_unknown_critical(extensions, ConfigError, "the authority's certificate")
    return key


def _read_member(certificate: x509.Certificate, der: bytes) -> Member:
    key = certificate.public_key()
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise NotAMember(f"its certificate is for {_describe_key(key)}; a member's key is Ed25519")
    public_key = key.public_bytes_raw()
    if is_weak_key(public_key):
        raise NotAMember("its key is one under which anybody can sign")
    if certificate.serial_number <= 0:
        raise NotAMember("its certificate has no positive serial number")
    extensions = certificate.extensions
    _check_use(extensions)
    roles = _read_names(extensions, node_id_of(public_key))
    return Member(
        public_key,
        node_id_of(public_key),
        roles,
        certificate.serial_number,
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
        der,
    )


def _check_use(extensions: x509.Extensions) -> None:
    """Both ends of a connection present the same certificate, so it must be good for both."""
    if _has_extension(extensions, x509.BasicConstraints, lambda value: value.ca, default=False):
        raise NotAMember("its certificate is an authority's; a node needs its own")
    if not _has_extension(extensions, x509.KeyUsage, lambda value: value.digital_signature, default=True):
        raise NotAMember("its certificate does not allow its key to sign (key usage: digital signature)")
    both = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    if not _has_extension(extensions, x509.ExtendedKeyUsage, lambda value: both <= set(value), default=True):
        raise NotAMember("its certificate is not for both client auth and server auth (extended key usage)")
    _refuse_unknown_critical(extensions, NotAMember, "its certificate")


def _read_names(extensions: x509.Extensions, node_id: bytes) -> frozenset[str]:
    """Check the URIs; return the roles."""
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise NotAMember(f"its certificate has no URI swarm://node/{node_id.hex()}") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    named = [match[1] for uri in uris if (match := _NODE_URI.fullmatch(uri))]
    if any(name != node_id.hex() for name in named):
        raise NotAMember(f"its certificate is for node {named[0]}, its key is that of {node_id.hex()}")
    if not named and _MEMBER_URI not in uris:
        raise NotAMember(f"its certificate has no URI swarm://node/{node_id.hex()}")
    roles = frozenset(match[1] for uri in uris if (match := _ROLE_URI.fullmatch(uri)))
    if len(roles) > MAX_ROLES:
        raise NotAMember(f"its certificate gives {len(roles)} roles, at most {MAX_ROLES} are read")
    return roles


_Kind = TypeVar("_Kind", bound=x509.ExtensionType)


def _has_extension(extensions: x509.Extensions, kind: type[_Kind], test: Callable[[_Kind], bool], *, default: bool) -> bool:
    try:
        return test(extensions.get_extension_for_class(kind).value)
    except x509.ExtensionNotFound:
        return default


def _refuse_unknown_critical(extensions: x509.Extensions, error_type: type[ConfigError] | type[NotAMember], what: str) -> None:
    for extension in extensions:
        if extension.critical and extension.oid not in _SKIPPED_BY_CHECKS:
            raise error_type(f"{what} has a critical extension that we do not know ({extension.oid.dotted_string})")


def _check_hash(signed: x509.Certificate | x509.CertificateRevocationList) -> None:
    algorithm = signed.signature_hash_algorithm
    if algorithm is not None and not isinstance(algorithm, _HASHES):  # None: Ed25519 has its own
        raise ValueError(f"signed with {algorithm.name}")


def _crl_number(revoked: x509.CertificateRevocationList) -> int:
    try:
        return revoked.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0


def _common_name(name: x509.Name) -> str:
    attributes = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attributes[0].value)[:64] if attributes else name.rfc4514_string()[:64]


def _describe_key(key: object) -> str:
    if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey):
        return "an RSA key"
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        return "an ECDSA key"
    return f"a key of another kind ({type(key).__name__})"


# --- issuing ------------------------------------------------------------------------------------------------------


def _private_key(identity: Identity) -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.from_private_bytes(identity.seed)


def _utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def make_authority(key: Identity, name: str, *, not_before: float, not_after: float, serial: int | None = None) -> Authority:
    """A self-signed authority certificate.  Equal arguments with a `serial` give equal bytes."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public_key = _private_key(key).public_key()
    usage = _key_usage(certificate_sign=True)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number() if serial is None else serial)
        .not_valid_before(_utc(not_before))
        .not_valid_after(_utc(not_after))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .sign(_private_key(key), None)
    )
    return Authority(certificate)


def issue(
    authority: Authority,
    authority_key: Identity,
    public_key: bytes,
    *,
    not_before: float,
    not_after: float,
    roles: Collection[str] = (),
    serial: int | None = None,
) -> bytes:
    """A member's certificate, DER.

    Never outlives the authority, and is backdated by the caller.

    Raises:
        ConfigError: A role that is not lower-case letters, digits and hyphens, too many roles, or dates that leave nothing.
    """
    uris = [f"swarm://node/{node_id_of(public_key).hex()}"] + [f"swarm://role/{role}" for role in sorted(set(roles))]
    for uri, role in zip(uris[1:], sorted(set(roles)), strict=True):
        if not _ROLE_URI.fullmatch(uri):
            raise ConfigError(f"not a role: {role[:40]!r}; use lower-case letters, digits and hyphens")
    if len(uris) - 1 > MAX_ROLES:
        raise ConfigError(f"{len(uris) - 1} roles, at most {MAX_ROLES} fit")
    start = max(not_before, authority.not_before)
    end = min(not_after, authority.not_after)
    if start >= end:
        raise ConfigError("the authority's certificate is out of date; nothing can be issued with it")
    key = ed25519.Ed25519PublicKey.from_public_bytes(public_key)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id_of(public_key).hex())]))
        .issuer_name(authority.parsed.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number() if serial is None else serial)
        .not_valid_before(_utc(start))
        .not_valid_after(_utc(end))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificate_sign=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(_authority_key_identifier(authority), critical=False)
        .sign(_private_key(authority_key), None)
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def _authority_key_identifier(authority: Authority) -> x509.AuthorityKeyIdentifier:
    # What the authority calls its own key, where it says so; another way of hashing it would break the chain for OpenSSL.
    try:
        own = authority.parsed.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _key_usage(*, certificate_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificate_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificate_sign,
        crl_sign=certificate_sign,
        encipher_only=False,
        decipher_only=False,
    )


def make_revocation_list(
    authority: Authority,
    authority_key: Identity,
    serials: Collection[int],
    *,
    now: float,
    next_update: float,
    number: int,
) -> bytes:
    """A complete revocation list, PEM."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.parsed.subject)
        .last_update(_utc(now))
        .next_update(_utc(next_update))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_key_identifier(authority), critical=False)
    )
    for serial in sorted(serials):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_utc(now)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(_private_key(authority_key), None).public_bytes(serialization.Encoding.PEM)


def make_request(key: Identity) -> bytes:
    """A certificate signing request, PEM: what a node sends to whoever holds the authority, so that its key stays at home."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, key.node_id.hex())])
    uri = x509.UniformResourceIdentifier(f"swarm://node/{key.node_id.hex()}")
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    request = request.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    return request.sign(_private_key(key), None).public_bytes(serialization.Encoding.PEM)


def read_request(data: bytes) -> bytes:
    """The raw public key of a signing request whose maker has proven to hold its private half.

    Nothing else is taken over: names and roles are the authority's to give.

    Raises:
        ConfigError: Malformed, badly signed, or not Ed25519.
    """
    with _malformed(ConfigError, "the request"):
        request = x509.load_pem_x509_csr(data)
        key = request.public_key()
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise ConfigError(f"the request is for {_describe_key(key)}; a node's key is Ed25519")
        public_key = key.public_bytes_raw()
        # OpenSSL accepts a signature under a weak key from anybody, so look at the key first.
        if is_weak_key(public_key) or not request.is_signature_valid:
            raise ConfigError("the request is not signed with the key it names")
    return public_key
