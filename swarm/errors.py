"""Every deliberate exception, on one screen, by whose fault it is.

The command line turns these into one line and an exit code; nothing else derives from `SwarmError`.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Root of every deliberate exception; the message is for a person and says what to do.

    Attributes:
        exit_code: What `swarm` exits with when this reaches the command line.
        kind: Stable name used in `--json` output and on the control socket.
    """

    exit_code = 1

    @property
    def kind(self) -> str:
        return type(self).__name__


class LocalProtocolError(SwarmError):
    """We broke our own protocol: a bug of ours, never a peer's doing."""


class RemoteProtocolError(SwarmError):
    """A peer sent something the protocol does not allow; drop the peer, keep the rest."""


class PeerError(SwarmError):
    """A peer could not be reached, refused us, or went away; another one may do."""


class NotAMember(PeerError):
    """A certificate does not prove membership: wrong authority, out of date, revoked, or not Ed25519."""

    exit_code = 7


class IntegrityError(SwarmError):
    """Bytes do not match what was signed for them; remember who sent them."""


class DigestMismatch(IntegrityError):
    """The whole content does not have the digest that was asked for."""

    exit_code = 3


class OriginError(SwarmError):
    """The origin answered with something we cannot use."""


class NotFoundAtOrigin(OriginError):
    """404 or 410."""

    exit_code = 4


class OriginRefused(OriginError):
    """401 or 403: credentials are missing, wrong or not enough."""

    exit_code = 7


class OriginUnreachable(OriginError):
    """No connection, time-out, or 5xx/429 after every retry."""

    exit_code = 8


class ContentChanged(OriginError):
    """The validator or length changed between two reads of one task."""


class NotPermitted(SwarmError):
    """A policy of ours forbids it: egress, ownership, private content."""

    exit_code = 7


class StoreError(SwarmError):
    """The local disk or its data base."""


class NoSpace(StoreError):
    """The disk is full, or the quota cannot be met without evicting what is in use or pinned."""

    exit_code = 5


class StoreBusy(StoreError):
    """Another daemon uses this data directory."""


class StoreTooNew(StoreError):
    """A newer swarm wrote this data directory."""


class TargetError(SwarmError):
    """The output file cannot be written where it was asked for; the message says why."""


class TargetExists(TargetError):
    """There is something under the name of the output file already."""


class ConfigError(SwarmError):
    """A setting or an argument is wrong; the message names it and says what to change."""

    exit_code = 2


class DaemonUnreachable(SwarmError):
    """No daemon (or scheduler) answers where one was expected."""

    exit_code = 6


class Interrupted(SwarmError):
    """Ctrl-C or SIGTERM; what was verified is kept and a repeated command resumes."""

    exit_code = 130
