"""Mutual TLS 1.3 among members: contexts that trust one authority, and the node's own certificate in them."""

from __future__ import annotations

import os
import ssl

from swarm import certificates
from swarm.certificates import Authority
from swarm.errors import ConfigError
from swarm.identity import Identity


def make_context(authority: Authority, *, server: bool) -> ssl.SSLContext:
    """A context that believes this authority's members and nobody else; `load_own` makes it one of them.

    Revocation, key type and node id are not checked in the handshake: the peer's certificate must go through
    `Network.learn` before anything else is read or sent.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # identity is the key, checked by `learn`
    context.verify_mode = ssl.CERT_REQUIRED
    # The authority may be what a company's PKI calls an intermediate: it is trusted as it stands, its issuer is not asked.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=authority.certificate)
    if server:
        context.num_tickets = 0  # a resumed session would not show its certificate again
    return context


def load_own(context: ssl.SSLContext, certificate: bytes, own: Identity) -> None:
    """Present this certificate (DER) from now on, in a new context or one in use; connections that exist keep theirs.

    Raises:
        ConfigError: The key is not the certificate's.
    """
    # `ssl` takes keys from files only; an anonymous file in memory keeps this one off every disk.
    descriptor = os.memfd_create("swarm-node-key", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(certificates.render_certificate(certificate) + certificates.render_key(own))
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    except ssl.SSLError as error:
        raise ConfigError(f"OpenSSL does not take the node's certificate and key: {error.reason}") from error
    finally:
        os.close(descriptor)
