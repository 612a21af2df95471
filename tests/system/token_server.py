"""The token server of a registry with Bearer authentication, as a program of its own.

It grants pulling to whoever is in ``--users``, and to nobody else; every request goes to its log as a line of JSON.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

ISSUER: Final = "swarm tests"
SERVICE: Final = "swarm registry"


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class Signer:
    """Signs tokens (ES256) with the key that belongs to a certificate the registry trusts."""

    def __init__(self, key: Path, certificate: Path) -> None:
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        der = x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        self._header = _base64(json.dumps(header).encode())

    def token(self, claims: dict[str, Any]) -> str:
        signed = f"{self._header}.{_base64(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    signer: Signer
    users: dict[str, str]
    seconds: int
    log: Path

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(parse_qs(urlsplit(self.path).query), self._basic())

    def do_POST(self) -> None:
        """OAuth2's form, which containerd tries first."""
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode())
        self._answer(form, (form.get("username", [""])[0], form.get("password", [""])[0]))

    def _basic(self) -> tuple[str, str]:
        scheme, _, encoded = self.headers.get("Authorization", "").partition(" ")
        try:
            user, _, password = base64.b64decode(encoded).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return "", ""
        return (user, password) if scheme.lower() == "basic" else ("", "")

    def _answer(self, asked: dict[str, list[str]], who: tuple[str, str]) -> None:
        granted = bool(who[0]) and self.users.get(who[0]) == who[1]
        scopes = " ".join(asked.get("scope", [])).split()
        line = {"method": self.command, "from": self.client_address[0], "user": who[0], "granted": granted, "scopes": scopes}
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        if not granted:
            self._reply(401, {"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]})
            return
        token = self.signer.token(self._claims(who[0], scopes))
        self._reply(200, {"token": token, "access_token": token, "expires_in": self.seconds})

    def _claims(self, user: str, scopes: list[str]) -> dict[str, Any]:
        access = []
        for kind, name, actions in (scope.split(":", 2) for scope in scopes if scope.count(":") == 2):
            access.append({"type": kind, "name": name, "actions": [it for it in actions.split(",") if it == "pull"]})
        now = int(time.time())
        # A second of leeway: the registry compares with a clock that it reads later.
        times = {"iat": now, "nbf": now - 1, "exp": now + self.seconds}
        return {"iss": ISSUER, "aud": SERVICE, "sub": user, "jti": os.urandom(8).hex(), "access": access, **times}

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        encoded = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="tokens"')
        self.end_headers()
        self.wfile.write(encoded)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.system.token_server")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--users", type=json.loads, required=True, help="a JSON object of names and passwords")
    parser.add_argument("--seconds", type=int, default=300, help="how long a token is good")
    parser.add_argument("--log", type=Path, required=True)
    given = parser.parse_args()
    Handler.signer = Signer(given.key, given.certificate)
    Handler.users, Handler.seconds, Handler.log = given.users, given.seconds, given.log
    server = ThreadingHTTPServer((given.address, given.port), Handler)
    print(f"listening on {given.address}:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
