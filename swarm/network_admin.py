"""What whoever runs a network does with its directory: make it, issue members, revoke them, change the secret.

The directory with the authority's key (`ca.key`) belongs on a machine that is not a node.  Keys are never overwritten;
everything else is replaced as a whole, so that a node that watches its directory never reads half a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm import certificates, group_secret, network_files, private_files
from swarm.certificates import Authority, Member, Revoked
from swarm.errors import ConfigError, NotAMember
from swarm.identity import Identity
from swarm.network_files import NetworkFiles

DAY: Final = 24 * 3600.0
REQUEST: Final = "node.csr"
ISSUED: Final = "issued"
"""Sub-directory with a copy of each certificate issued: what `revoke` knows a node's serial numbers from."""

MAX_REQUEST_BYTES: Final = 64 * 1024

_NODE_ID: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was made, and where the node's directory is."""

    member: Member
    directory: Path


@dataclass(frozen=True, slots=True)
class Description:
    """What a network directory holds.

    Attributes:
        secret: Epochs, the one in use first.
        holds_authority_key: Whether members can be issued from here.
        own: This node's certificate, if there is one.
        own_problem: What is wrong with it.
        issued: What was issued from here, newest last.
    """

    authority: Authority
    holds_authority_key: bool
    secret: tuple[int, ...]
    revoked: Revoked | None
    own: Member | None
    own_problem: str
    issued: tuple[Member, ...]


def create(directory: Path, name: str, *, days: float, now: float) -> Authority:
    """Make an authority and a group secret in a directory that has none.

    Raises:
        ConfigError: There is a network in it already, or it cannot be written.
    """
    if not re.fullmatch(r"[ -~]{1,64}", name):
        raise ConfigError(f"not a network name: {name[:80]!r}; use 1 to 64 printable ASCII characters")
    _make_directory(directory)
    for existing in (network_files.AUTHORITY_KEY, network_files.AUTHORITY, network_files.GROUP):
        if os.path.lexists(directory / existing):
            raise ConfigError(f"{directory} already holds a network ({existing}); give another directory")
    key = Identity.generate()
    authority = certificates.make_authority(
        key, name, not_before=now - certificates.BACKDATED_SECONDS, not_after=now + days * DAY
    )
    _create(directory / network_files.AUTHORITY_KEY, certificates.render_key(key))
    _create(directory / network_files.GROUP, group_secret.render(group_secret.generate()))
    _create(directory / network_files.AUTHORITY, certificates.render_certificate(authority.certificate), 0o644)
    return authority


def issue(
    directory: Path, out: Path, *, roles: Collection[str] = (), days: float, now: float, request: bytes | None = None
) -> Issued:
    """Make a node's directory: its key, its certificate, and copies of what all members have.

    A key that is there already is kept and gets a new certificate.  With `request`, a signing request in PEM, the key
    stays where the request was made and `out` gets everything else.

    Raises:
        ConfigError: No authority key here, another network's directory there, or a bad role or request.
    """
    files = NetworkFiles(directory)
    authority, authority_key = _authority(files)
    if out.resolve() == directory.resolve():
        raise ConfigError(f"{out} holds the authority's key; give each node a directory of its own")
    _make_directory(out)
    _check_same_network(out, authority)
    public_key = certificates.read_request(request) if request is not None else node_key(out).public_key
    certificate = certificates.issue(
        authority,
        authority_key,
        public_key,
        not_before=now - certificates.BACKDATED_SECONDS,
        not_after=now + days * DAY,
        roles=roles,
    )
    member = _check(authority, certificate, files)
    _record(directory, member)
    pem = certificates.render_certificate(certificate)
    private_files.replace(out / network_files.AUTHORITY, certificates.render_certificate(authority.certificate), 0o644)
    private_files.replace(out / network_files.GROUP, group_secret.render(files.secret()))
    if files.revoked(authority) is not None:
        revoked = private_files.read_public(directory / network_files.REVOKED, max_bytes=network_files.MAX_REVOKED_BYTES)
        private_files.replace(out / network_files.REVOKED, revoked, 0o644)
    private_files.replace(out / network_files.CERTIFICATES[0], pem, 0o644)
    return Issued(member, out)


def node_key(directory: Path) -> Identity:
    """The node's key in this directory, made if there is none.

    Raises:
        ConfigError: It cannot be read or written.
    """
    _make_directory(directory)
    files = NetworkFiles(directory)
    key = files.key()
    if key is None:
        key = Identity.generate()
        _create(directory / network_files.KEYS[0], certificates.render_key(key))
    return key


def request(directory: Path) -> tuple[Identity, Path]:
    """Make a node's key (if there is none) and a signing request for it; return the key and the request's path."""
    key = node_key(directory)
    path = directory / REQUEST
    private_files.replace(path, certificates.make_request(key), 0o644)
    return key, path


def revoke(directory: Path, members: Sequence[str], *, days: float, now: float) -> tuple[Revoked, list[int]]:
    """Add members to the revocation list, and renew it; return the list and the serial numbers that are new in it.

    Args:
        members: Node ids, or paths of certificates.  Whatever else was issued to the node from here is revoked too.
        days: Until the list should be renewed, even if nobody else is revoked.

    Raises:
        ConfigError: A node without a certificate from here, or no such file.
        NotAMember: A certificate of another network.
    """
    files = NetworkFiles(directory)
    with private_files.locked(directory):
        authority, authority_key = _authority(files)
        serials = {serial for member in members for serial in _serials(directory, authority, member)}
        old = files.revoked(authority) or Revoked()
        pem = certificates.make_revocation_list(
            authority, authority_key, serials | old.serials, now=now, next_update=now + days * DAY, number=old.number + 1
        )
        private_files.replace(directory / network_files.REVOKED, pem, 0o644)
    return authority.read_revoked(pem), sorted(serials - old.serials)


def rotate_secret(directory: Path) -> tuple[tuple[int, ...], bool]:
    """Take the next of the two steps of a change of the group secret.

    Returns:
        The epochs, the one in use first; and whether a new secret is in use now (`False`: it waits to be handed out).
    """
    files = NetworkFiles(directory)
    with private_files.locked(directory):
        epochs, activated = group_secret.rotate(files.secret())
        private_files.replace(directory / network_files.GROUP, group_secret.render(epochs))
    return tuple(epoch.number for epoch in epochs), activated


def describe(directory: Path) -> Description:
    """Everything public about a network directory, an authority's or a node's.

    Raises:
        ConfigError: It is none, or a file in it is damaged.
    """
    files = NetworkFiles(directory)
    authority = files.authority()
    own, problem = _describe_own(files, authority)
    return Description(
        authority,
        os.path.exists(directory / network_files.AUTHORITY_KEY),
        tuple(epoch.number for epoch in files.secret()),
        files.revoked(authority),
        own,
        problem,
        tuple(sorted(_issued(directory, authority), key=lambda member: member.not_before)),
    )


def _describe_own(files: NetworkFiles, authority: Authority) -> tuple[Member | None, str]:
    issued = files.certificate()
    if issued is None:
        return None, ""
    name, certificate = issued
    try:
        member = authority.read_member(certificate)
    except NotAMember as error:
        return None, f"{name}: {error}"
    key = files.key()
    if key is not None and key.public_key != member.public_key:
        return member, f"{name} is for another key than the one beside it"
    return member, ""


def _authority(files: NetworkFiles) -> tuple[Authority, Identity]:
    authority = files.authority()
    key = files.authority_key()
    if key is None:
        raise ConfigError(f"{files.directory} has no {network_files.AUTHORITY_KEY}; do this where the network was created")
    return authority, key


def _check(authority: Authority, certificate: bytes, files: NetworkFiles) -> Member:
    try:
        return authority.read_member(certificate)
    except NotAMember as error:
        raise ConfigError(f"{files.directory}: ca.key is not the key of ca.crt") from error


def _check_same_network(out: Path, authority: Authority) -> None:
    if not os.path.exists(out / network_files.AUTHORITY):
        return
    there = NetworkFiles(out).authority()
    if there.network_id != authority.network_id:
        raise ConfigError(f"{out} belongs to another network ({there.name!r}); give another directory")


def _record(directory: Path, member: Member) -> None:
    _make_directory(directory / ISSUED)
    pem = certificates.render_certificate(member.certificate)
    private_files.replace(directory / ISSUED / f"{member.node_id.hex()}-{member.serial:x}.crt", pem, 0o644)


def _issued(directory: Path, authority: Authority, pattern: str = "*.crt") -> Iterator[Member]:
    for path in sorted((directory / ISSUED).glob(pattern)):
        yield _read_certificate(path, authority)


def _read_certificate(path: Path, authority: Authority) -> Member:
    try:
        data = private_files.read_public(path, max_bytes=network_files.MAX_FILE_BYTES)
        return authority.read_member(certificates.load_certificate(data))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is neither a node id (40 hexadecimal digits) nor a certificate file") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except NotAMember as error:
        raise NotAMember(f"{path}: {error}") from error


def _serials(directory: Path, authority: Authority, member: str) -> set[int]:
    """Of every certificate the node may still have: one of several would let it come back with another."""
    named = None if _NODE_ID.fullmatch(member) else _read_certificate(Path(member), authority)
    node_id = member if named is None else named.node_id.hex()
    serials = {issued.serial for issued in _issued(directory, authority, f"{node_id}-*.crt")}
    if named is not None:
        serials.add(named.serial)
    if not serials:
        raise ConfigError(f"no certificate was issued to {member} from {directory}; give the file of its certificate")
    return serials


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the directory {path}: {error.strerror}") from error


def _create(path: Path, data: bytes, mode: int = 0o600) -> None:
    try:
        private_files.create(path, data, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path} is there already and is not overwritten") from error
