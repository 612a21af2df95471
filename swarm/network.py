"""The closed network this node belongs to: who is a member, what members sign, and TLS among them.

Participants: an *authority* that signs members' certificates, the members, and outsiders, who may send us anything.
Three ways in: a certificate issued to this node; a *network secret* (the authority's key itself, from which each node
issues its own short-lived certificate); and an *open* network, whose authority is derived from a name, for development.

Goals: one place that decides membership, for TLS and for signatures alike; everything on disk can be changed while the
daemon runs; a broken new file changes nothing.  Non-goals: keeping members from reading what members share.

Dates are wall time.  Nothing here blocks but the reading of a dozen small files when they changed.
"""

from __future__ import annotations

import hashlib
import math
import re
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import structlog
import trio

from swarm import certificates, network_files, tls, wire
from swarm.certificates import Authority, Member, Revoked
from swarm.errors import ConfigError, NotAMember, SwarmError
from swarm.group_secret import Epoch, GroupSecret
from swarm.identity import Identity, node_id_of
from swarm.identity import verify as verify_signature
from swarm.network_files import NetworkFiles, Print

POLL_SECONDS: Final = 5.0
"""How long a changed file or an expired member may go unnoticed.  A poll is ten `stat` calls, 40 us."""

MAX_MEMBERS: Final = 65_536
"""Certificates remembered, about 1 KiB each.  Only the authority can make more, or a member that holds its key."""

SELF_ISSUED_SECONDS: Final = 24 * 3600.0
"""Life of a certificate a node issues itself: with no revocation, it is what ends a membership when the key is changed."""

RENEW_AT: Final = 0.5
"""A certificate of our own making is replaced after this part of its life: clocks may then differ by half of it."""

WARN_AT: Final = 5 / 6
"""An issued certificate is warned about after this part of its life."""

Body = TypeVar("Body", bound=msgspec.Struct)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NetworkStatus:
    """What `swarm status`, `swarm doctor` and the metrics show.

    Attributes:
        not_after: End of our own certificate, wall time.
        epochs: Of the group secret, the one in use first.
        revoked: Serial numbers in the revocation list; `None` without a list.
        members: Certificates known at present.
        problems: Sentences for a person, the last state of each file that could not be used, and what is out of date.
    """

    network_id: bytes
    name: str
    is_open: bool
    node_id: bytes
    roles: frozenset[str]
    not_after: float
    epochs: tuple[int, ...]
    revoked: int | None
    members: int
    problems: tuple[str, ...]


class Network:
    """`edges.Membership` as it really is, and the TLS contexts of its members.

    Made by `load` or `open_network`; works at once, and keeps up with time and files while `run` runs.
    """

    def __init__(
        self,
        own: Identity,
        authority: Authority,
        certificate: bytes,
        secret: GroupSecret,
        *,
        is_open: bool = False,
        revoked: Revoked | None = None,
        source: _Source | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Check our own membership.

        Raises:
            NotAMember: `certificate` does not prove it.
        """
        self.identity = own
        self.is_open = is_open
        self._authority = authority
        self._secret = secret
        self._revoked = revoked
        self._source = source
        self._clock = clock
        self._members: OrderedDict[bytes, Member] = OrderedDict()
        self._by_certificate: dict[bytes, Member] = {}
        self._next_expiry = math.inf
        self._callbacks: list[Callable[[], None]] = []
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._failing: dict[str, str] = {}
        self._warned: set[str] = set()
        self._own = self._check_own(certificate)

    # --- who we are

    @property
    def network_id(self) -> bytes:
        """32 bytes: SHA-256 of the authority's public key."""
        return self._authority.network_id

    @property
    def node_id(self) -> bytes:
        return self.identity.node_id

    @property
    def public_key(self) -> bytes:
        return self.identity.public_key

    @property
    def certificate(self) -> bytes:
        """Our own certificate, DER; another one after a renewal."""
        return self._own.certificate

    @property
    def roles(self) -> frozenset[str]:
        """Our own."""
        return self._own.roles

    @property
    def name(self) -> str:
        """What the authority calls itself, for people."""
        return self._authority.name

    # --- who the others are

    def learn(self, certificate_untrusted: bytes) -> bytes:
        """Check a DER certificate; remember it; return its public key.

        Raises:
            NotAMember: What is wrong with it.
        """
        # Every peer sends the same few with its pieces, and reading one takes 0.3 ms: what was checked once is looked up.
        member = self._by_certificate.get(certificate_untrusted) or self._authority.read_member(certificate_untrusted)
        self._refuse_invalid(member)
        known = self._members.get(member.public_key)
        # Of two certificates for one key the later one counts: a renewal may have taken a role away.
        if known is None or (known.not_before, known.not_after) <= (member.not_before, member.not_after):
            self._remember(member)
        return member.public_key

    def certificate_of(self, public_key: bytes) -> bytes | None:
        """DER of a known, still valid member."""
        member = self._valid(public_key)
        return member.certificate if member is not None else None

    def is_member(self, public_key: bytes) -> bool:
        """Whether this key's certificate is known, in date and not revoked."""
        return self._valid(public_key) is not None

    def roles_of(self, public_key: bytes) -> frozenset[str]:
        """Roles in this member's certificate; none if it is not a known, valid member."""
        member = self._valid(public_key)
        return member.roles if member is not None else frozenset()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back, synchronously and in the trio thread, when members may have gone or files have changed.

        Whoever holds a connection then asks `is_member` about its peer.
        """
        self._callbacks.append(callback)

    def _valid(self, public_key: bytes) -> Member | None:
        member = self._own if public_key == self.identity.public_key else self._members.get(public_key)
        if member is None or self._why_invalid(member) is not None:
            return None
        return member

    def _why_invalid(self, member: Member) -> str | None:
        now = self._clock()
        if now >= member.not_after:
            return f"is out of date since {_date(member.not_after)}"
        if now < member.not_before:
            return f"is not valid before {_date(member.not_before)} (is this machine's clock behind?)"
        if now >= self._authority.not_after:
            return f"is from an authority out of date since {_date(self._authority.not_after)}"
        if self._revoked is not None and member.serial in self._revoked.serials:
            return "is revoked"
        return None

    def _refuse_invalid(self, member: Member) -> None:
        reason = self._why_invalid(member)
        if reason is not None:
            raise NotAMember(f"the certificate of {member.node_id.hex()} {reason}")

    def _remember(self, member: Member) -> None:
        self._forget(member.public_key)
        self._members[member.public_key] = member
        self._by_certificate[member.certificate] = member
        self._next_expiry = min(self._next_expiry, member.not_after)
        if len(self._members) > MAX_MEMBERS:
            self._forget(next(iter(self._members)))

    def _forget(self, public_key: bytes) -> None:
        member = self._members.pop(public_key, None)
        if member is not None:
            del self._by_certificate[member.certificate]

    def _forget_invalid(self) -> None:
        gone = [key for key, member in self._members.items() if self._why_invalid(member) is not None]
        for key in gone:
            self._forget(key)
        self._next_expiry = min((member.not_after for member in self._members.values()), default=math.inf)

    # --- signatures

    def sign(self, kind: str, body: msgspec.Struct) -> wire.Signed:
        """Sign a message body for one purpose."""
        return self.identity.sign(kind, self.network_id, wire.encode(body))

    def verify(self, kind: str, signed_untrusted: wire.Signed, body: type[Body]) -> Body:
        """Check that a known member signed it, and decode the body.

        Raises:
            NotAMember: The signer's certificate is not known, no longer valid, or revoked; see `learn`.
            IntegrityError: Bad signature.
            RemoteProtocolError: The body is malformed.
        """
        key = signed_untrusted.key
        member = self._valid(key)
        if member is None:  # before the signature: what a stranger signs is not worth 50 us
            raise NotAMember(f"{node_id_of(key).hex()} is not a member that is known and valid")
        if member is not self._own:
            self._members.move_to_end(key)
        verify_signature(kind, self.network_id, signed_untrusted)
        return wire.decode(signed_untrusted.body, body)

    def task_key(self, task_id: bytes) -> bytes:
        """20-byte DHT key of a task: keyed with the network id, so an outsider cannot link it to a digest."""
        return hashlib.blake2b(task_id, digest_size=20, key=self.network_id).digest()

    def datagram_mac(self, data: bytes) -> tuple[int, bytes]:
        """Epoch (one byte) and 16-byte MAC under the group secret in use."""
        return self._secret.mac(data)

    def check_datagram_mac(self, epoch: int, mac: bytes, data: bytes) -> bool:
        """Whether a current or previous group secret made this MAC (constant time)."""
        return self._secret.check(epoch, mac, data)

    # --- TLS

    def server_context(self) -> ssl.SSLContext:
        """Mutual TLS 1.3 for accepted connections; the same object each time, renewed in place.

        OpenSSL checks chain and dates.  Whoever uses it must pass the peer's certificate (DER) to `learn` before
        anything else is read or sent: that is where key type, node id and revocation are checked.
        """
        return self._context(server=True)

    def client_context(self) -> ssl.SSLContext:
        """As `server_context`, for connections we make.  Host names are not checked: a node is its key."""
        return self._context(server=False)

    def _context(self, *, server: bool) -> ssl.SSLContext:
        context = self._contexts.get(server)
        if context is None:
            context = tls.make_context(self._authority, server=server)
            tls.load_own(context, self._own.certificate, self.identity)
            self._contexts[server] = context
        return context

    # --- keeping up with time and files

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reload what changes on disk, renew what we issue ourselves, drop who is out of date; until cancelled."""
        self._warn_about_time()
        task_status.started()
        while True:
            await trio.sleep(POLL_SECONDS)
            self.poll()

    def poll(self) -> None:
        """One look at files and clock, what `run` does every `POLL_SECONDS`; SIGHUP may call it too."""
        changed = self._source is not None and self._reload(self._source)
        if changed or self._clock() >= self._next_expiry:
            self._forget_invalid()
            changed = True
        self._warn_about_time()
        if changed:
            for callback in self._callbacks:
                callback()

    def _reload(self, source: _Source) -> bool:
        """Each part on its own: a broken certificate must not keep a revocation from taking effect."""
        results = [
            self._try("authority", lambda: self._reload_authority(source)),
            self._try("revocation list", lambda: self._reload_revoked(source)),
            self._try("certificate", lambda: self._reload_own(source)),
            self._try("group secret", lambda: self._reload_secret(source)),
        ]
        return any(results)

    def _try(self, part: str, reload: Callable[[], bool]) -> bool:
        try:
            changed = reload()
        except SwarmError as error:
            if self._failing.get(part) != str(error):
                self._failing[part] = str(error)
                _log.warning("network file not used, the old one stays", part=part, reason=str(error))
            return False
        self._failing.pop(part, None)
        if changed:
            _log.info("network file reloaded", part=part)
        return changed

    def _reload_authority(self, source: _Source) -> bool:
        if not source.changed("authority", retry="authority" in self._failing):
            return False
        authority = source.files.authority()
        if authority.network_id != self.network_id:
            raise ConfigError(f"{source.files.directory} is another network's now; restart the daemon to join that one")
        if authority.certificate == self._authority.certificate:
            return False
        self._authority = authority
        for context in self._contexts.values():
            context.load_verify_locations(cadata=authority.certificate)
        return True

    def _reload_revoked(self, source: _Source) -> bool:
        if not source.changed("revoked", retry="revocation list" in self._failing):
            return False
        revoked = source.files.revoked(self._authority)
        if revoked is None and self._revoked is not None:
            raise ConfigError("the revocation list is gone; to revoke nobody any more, put an empty list in its place")
        if revoked == self._revoked:
            return False
        self._revoked = revoked
        return True

    def _reload_own(self, source: _Source) -> bool:
        changed = source.changed("own", retry="certificate" in self._failing)
        if not changed and not source.renewal_due(self._own, self._clock()):
            return False
        own, certificate = source.own(self._authority, self.identity, self._clock())
        if own.public_key != self.identity.public_key:
            raise ConfigError(f"the node key in {source.files.directory} changed; restart the daemon to take its identity")
        if certificate == self._own.certificate:
            return False
        self._own = self._check_own(certificate)
        for context in self._contexts.values():
            tls.load_own(context, certificate, self.identity)
        return True

    def _reload_secret(self, source: _Source) -> bool:
        if not source.changed("secret", retry="group secret" in self._failing):
            return False
        epochs = source.files.secret()
        if epochs == self._secret.epochs:
            return False
        self._secret = GroupSecret(epochs, self.network_id)
        return True

    def _check_own(self, certificate: bytes) -> Member:
        try:
            member = self._authority.read_member(certificate)
            self._refuse_invalid(member)
        except NotAMember as error:
            raise NotAMember(f"this node is not a member: {error}; issue it a certificate with: swarm network issue") from error
        if member.public_key != self.identity.public_key:
            raise ConfigError("the node's certificate is for another key than the node's key")
        return member

    # --- what a person should know

    def _time_problems(self) -> list[str]:
        problems = []
        reason = self._why_invalid(self._own)
        own = self._own
        if reason is not None:
            problems.append(f"this node's certificate {reason}; other members refuse it: issue a new one")
        elif not self.is_open and self._clock() >= own.not_before + WARN_AT * (own.not_after - own.not_before):
            problems.append(f"this node's certificate ends on {_date(own.not_after)}; issue a new one")
        update = self._revoked.next_update if self._revoked is not None else None
        if update is not None and self._clock() >= update:
            problems.append(
                f"the revocation list was to be renewed by {_date(update)}; it still counts, later ones are missing"
            )
        return problems

    def _warn_about_time(self) -> None:
        problems = set(self._time_problems())
        for problem in problems - self._warned:
            _log.warning("network membership", problem=problem)
        self._warned = problems

    def status(self) -> NetworkStatus:
        return NetworkStatus(
            network_id=self.network_id,
            name=self.name,
            is_open=self.is_open,
            node_id=self.node_id,
            roles=self.roles,
            not_after=self._own.not_after,
            epochs=tuple(epoch.number for epoch in self._secret.epochs),
            revoked=len(self._revoked.serials) if self._revoked is not None else None,
            members=len(self._members),
            problems=(*self._failing.values(), *self._time_problems()),
        )

    def __repr__(self) -> str:
        return f"Network({self.network_id.hex()[:16]}, node={self.node_id.hex()})"


# --- from a directory ------------------------------------------------------------------------------------------------

_PARTS: Final = {
    "authority": (network_files.AUTHORITY,),
    "own": (*network_files.CERTIFICATES, *network_files.KEYS, network_files.AUTHORITY_KEY),
    "secret": (network_files.GROUP,),
    "revoked": (network_files.REVOKED,),
}


class _Source:
    """The directory a network comes from, and what its files looked like when they were last read."""

    def __init__(self, files: NetworkFiles, roles: Collection[str]) -> None:
        self.files = files
        self._roles = frozenset(roles)
        # Before anything is read: what changes in between is then seen as a change by the first poll.
        self._seen: dict[str, Print] = {part: files.fingerprint(*names) for part, names in _PARTS.items()}
        self._issues_itself = False

    def changed(self, part: str, *, retry: bool) -> bool:
        """Whether the files of this part look new, which is asked once for each change; always with `retry`."""
        now = self.files.fingerprint(*_PARTS[part])
        changed = now != self._seen[part]
        self._seen[part] = now
        return changed or retry

    def renewal_due(self, own: Member, now: float) -> bool:
        return self._issues_itself and now >= own.not_after - (1 - RENEW_AT) * SELF_ISSUED_SECONDS

    def own(self, authority: Authority, fallback: Identity | None, now: float) -> tuple[Identity, bytes]:
        """The node's key and certificate: the issued one, else one we issue ourselves with the authority's key.

        Raises:
            ConfigError: Something is missing.
        """
        key = self.files.key() or fallback
        issued = self.files.certificate()
        self._issues_itself = issued is None
        if issued is not None:
            name, certificate = issued
            if key is None:
                raise ConfigError(f"{self.files.directory} has {name} and no key; copy its node.key there, or issue anew")
            return key, certificate
        authority_key = self.files.authority_key()
        if authority_key is None:
            raise ConfigError(
                f"{self.files.directory} has no node.crt; issue one: swarm network issue DIR --out {self.files.directory}"
            )
        if key is None:
            raise ConfigError(f"{self.files.directory} has no node.key, and the node has no key of its own")
        start = now - certificates.BACKDATED_SECONDS
        certificate = certificates.issue(
            authority, authority_key, key.public_key, not_before=start, not_after=now + SELF_ISSUED_SECONDS, roles=self._roles
        )
        return key, certificate


def load(
    directory: Path,
    *,
    identity: Identity | None = None,
    roles: Collection[str] = (),
    clock: Callable[[], float] = time.time,
) -> Network:
    """The network of a directory (see `network_files`); start its `run` to follow changes.

    Args:
        identity: The node's own key, used where the directory holds none: with a network secret, which all nodes share.
        roles: Roles the node gives itself with a network secret; an issued certificate has its own.
        clock: Wall time in seconds.

    Raises:
        ConfigError: A file is missing, malformed or open to others.
        NotAMember: The certificate is not from this authority, out of date or revoked.
    """
    source = _Source(NetworkFiles(directory), roles)
    files = source.files
    authority = files.authority()
    own, certificate = source.own(authority, identity, clock())
    secret = GroupSecret(files.secret(), authority.network_id)
    return Network(own, authority, certificate, secret, revoked=files.revoked(authority), source=source, clock=clock)


# --- open ----------------------------------------------------------------------------------------------------------

_OPEN_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_FROM: Final = 1_577_836_800.0  # 2020-01-01
_OPEN_UNTIL: Final = 4_733_510_400.0  # 2120-01-01: nothing is protected, so nothing is gained by an end


def open_network(
    name: str, identity: Identity, *, roles: Collection[str] = (), clock: Callable[[], float] = time.time
) -> Network:
    """A network whose authority and secret follow from its name, so that anybody who knows the name is a member.

    The same code as a closed one and no protection: for development, tests and networks that are closed by other means.
    Everything in it is a function of the name and the key, so a wrong clock cannot keep a node out.

    Raises:
        ConfigError: Not 1 to 64 letters, digits, dots, hyphens and underscores.
    """
    if not _OPEN_NAME.fullmatch(name):
        raise ConfigError(f"not a network name: {name[:80]!r}; use 1 to 64 letters, digits, '.', '-' or '_'")
    authority_key = Identity(_derive(name, b"authority"))
    authority = certificates.make_authority(
        authority_key, f"swarm open network {name}", not_before=_OPEN_FROM, not_after=_OPEN_UNTIL, serial=1
    )
    serial = int.from_bytes(identity.node_id[:19], "big") | 1
    certificate = certificates.issue(
        authority,
        authority_key,
        identity.public_key,
        not_before=_OPEN_FROM,
        not_after=_OPEN_UNTIL,
        roles=roles,
        serial=serial,
    )
    secret = GroupSecret((Epoch(0, _derive(name, b"group secret")),), authority.network_id)
    return Network(identity, authority, certificate, secret, is_open=True, clock=clock)


def _derive(name: str, purpose: bytes) -> bytes:
    return hashlib.blake2b(name.encode("ascii"), digest_size=32, key=purpose, person=b"swarm/1/open").digest()


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
