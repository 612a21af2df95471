"""A real docker-registry as the origin: open, or behind Basic or Bearer authentication.

Its access log says who read what: *copies* of a blob = bytes of it that the registry wrote / its length, as with
`tests.system.origin`.  Images are put into its directory as a push would leave them, which takes no time and also makes
what no push could: a digest whose bytes are others.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.system.hosts import Hosts, make_directory
from tests.system.images import Descriptor, Image, Images
from tests.system.token_server import ISSUER, SERVICE

PORT: Final = 5000
TOKEN_PORT: Final = 5001
ROOT: Final = Path(__file__).parent.parent.parent

Access = Literal["open", "basic", "bearer"]

USERS: Final = {"alice": "secret", "bob": "hunter2"}
# bcrypt at its cheapest, of the passwords above.
_HTPASSWD: Final = """\
alice:$2b$04$XnIbJn3oXkU1D7o7mHbl4.jP4yF.AXbQX1Ur0fSEH65iixKva3hM.
bob:$2b$04$MCO.StcNqTmYu7HRyMy.cugFa9185VfgJilvlfga/KcbRXNDcxNkq
"""

_LINE: Final = re.compile(
    r'(?P<sender>\S+) - \S* \[[^]]*\] "(?P<method>\S+) (?P<path>\S+) [^"]*" (?P<status>\d+) (?P<sent>\d+) '
)


class RegistryFailed(Exception):
    """The registry or its token server did not start; the message is the end of its log."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the access log; `sent` counts bytes of the body."""

    sender: str
    method: str
    path: str
    status: int
    sent: int
    agent: str


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What somebody asked of the token server."""

    method: str
    sender: str
    user: str
    granted: bool
    scopes: tuple[str, ...]


class Registry:
    """docker-registry in host 0 of `hosts`, or on loopback without hosts; use it with `with`.

    Args:
        access: Who may pull: everybody, or `USERS` by Basic or by Bearer tokens.
        parent: Where images and store lie; in memory by default, so that hosts measure links, not one disk.
        port: In a host; on loopback any free one.
        token_seconds: How long a token is good.

    Attributes:
        name: ``address:port``, its name in references to images.
        base: ``http://`` and the name.
        images: Makes images that `push` takes without copying them.
    """

    def __init__(
        self,
        hosts: Hosts | None = None,
        *,
        access: Access = "open",
        parent: Path = Path("/dev/shm"),
        port: int = PORT,
        token_seconds: int = 300,
    ) -> None:
        self.access: Access = access
        self._hosts = hosts
        self._parent = parent
        self._address = "127.0.0.1" if hosts is None else hosts.address(0)
        self._port = 0 if hosts is None else port
        self._token_port = 0 if hosts is None else port + TOKEN_PORT - PORT
        self._token_seconds = token_seconds
        self._processes: list[subprocess.Popen[bytes]] = []
        self._seen = 0  # bytes of the access log before the last `forget`
        self._root = Path()

    # --- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Registry:
        self._root = make_directory("registry", self._parent)
        self.images = Images(self._root / "images")
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Serve, again if it was stopped; at the same port."""
        realm = self._start_token_server() if self.access == "bearer" else ""
        config = self._root / "registry.json"  # JSON is YAML
        config.write_text(json.dumps(self._config(realm)))
        log = self._root / "registry.log"
        self._port = self._spawn(["docker-registry", "serve", str(config)], log, self._root / "access.log")
        self._processes.reverse()

    @property
    def name(self) -> str:
        return f"[{self._address}]:{self._port}" if ":" in self._address else f"{self._address}:{self._port}"

    @property
    def base(self) -> str:
        return f"http://{self.name}"

    @property
    def token_host(self) -> str:
        """``address:port`` of the token server; empty without one."""
        return f"{self.name.rpartition(':')[0]}:{self._token_port}" if self.access == "bearer" else ""

    @property
    def pid(self) -> int:
        return self._processes[0].pid

    def stop(self) -> None:
        """Nobody can read it any more; store and log stay."""
        while self._processes:
            process = self._processes.pop()
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(10)

    def pause(self) -> None:
        """It accepts connections and answers nothing, until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._root, ignore_errors=True)

    def _config(self, realm: str) -> dict[str, object]:
        config: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "info"},  # which tells when it listens
            "storage": {"filesystem": {"rootdirectory": str(self._root / "store")}, "delete": {"enabled": True}},
            "http": {"addr": self.name, "secret": "not one"},
        }
        if self.access == "basic":
            passwords = self._root / "htpasswd"
            passwords.write_text(_HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "swarm tests", "path": str(passwords)}}
        elif self.access == "bearer":
            bundle = str(self._root / "token.crt")
            config["auth"] = {"token": {"realm": realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": bundle}}
        return config

    def _start_token_server(self) -> str:
        """Returns the realm."""
        key, certificate, log = (self._root / name for name in ("token.key", "token.crt", "tokens.log"))
        if not key.exists():
            _make_certificate(key, certificate)
        argv = [sys.executable, "-m", "tests.system.token_server", "--address", self._address]
        argv += ["--port", str(self._token_port), "--key", str(key), "--certificate", str(certificate)]
        argv += ["--users", json.dumps(USERS), "--seconds", str(self._token_seconds), "--log", str(log)]
        said = self._root / "token_server.log"
        self._token_port = self._spawn(argv, said, said)
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"http://{host}:{self._token_port}/token"

    def _spawn(self, argv: Sequence[str], log: Path, output: Path) -> int:
        """Start a program that says ``listening on ADDRESS:PORT`` in its log; returns the port."""
        command = list(argv) if self._hosts is None else self._hosts.command(0, argv)
        with log.open("ab") as errors, output.open("ab") as out:
            before = errors.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, cwd=ROOT)
        self._processes.append(process)
        deadline = time.monotonic() + 15
        while True:
            said = log.read_bytes()[before:].decode(errors="replace")
            listening = re.search(r"listening on \S*:(\d+)", said)
            if listening:
                return int(listening[1])
            if process.poll() is not None or time.monotonic() > deadline:
                raise RegistryFailed(said[-2000:])
            time.sleep(0.01)

    # --- content --------------------------------------------------------------------------------------------------

    def push(self, image: Image, repository: str, tag: str | None = None) -> str:
        """Put an image of `self.images` there; returns its reference, by tag if it has one, else by digest."""
        for blob in image.blobs:
            self._put(blob)
            self._link(repository, f"_layers/{_parts(blob.digest)}", blob.digest)
        for manifest in image.manifests:
            self._put(manifest)
            self._link(repository, f"_manifests/revisions/{_parts(manifest.digest)}", manifest.digest)
        if tag is None:
            return f"{self.name}/{repository}@{image.digest}"
        self._link(repository, f"_manifests/tags/{tag}/current", image.digest)
        self._link(repository, f"_manifests/tags/{tag}/index/{_parts(image.digest)}", image.digest)
        return f"{self.name}/{repository}:{tag}"

    def data(self, digest: str) -> Path:
        """Where the registry keeps the bytes of a digest; a hard link of `images.path`: replace it, do not write to it."""
        algorithm, _, encoded = digest.partition(":")
        return self._root / "store/docker/registry/v2/blobs" / algorithm / encoded[:2] / encoded / "data"

    def lie(self, digest: str, content: bytes) -> None:
        """Serve other bytes under this digest from now on."""
        path = self.data(digest)
        path.unlink()
        path.write_bytes(content)

    def forget_blob(self, digest: str) -> None:
        """Lose the bytes of this digest: manifests go on naming it."""
        self.data(digest).unlink()

    def _put(self, blob: Descriptor) -> None:
        path = self.data(blob.digest)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(self.images.path(blob.digest))

    def _link(self, repository: str, where: str, digest: str) -> None:
        path = self._root / "store/docker/registry/v2/repositories" / repository / where / "link"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(digest)

    # --- counting -------------------------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        """The requests that ended since the last `forget`, in that order."""
        with (self._root / "access.log").open("rb") as log:
            log.seek(self._seen)
            return [_parse(line.decode()) for line in log if line.endswith(b"\n")]

    def forget(self) -> None:
        """Count from here."""
        self._seen = (self._root / "access.log").stat().st_size

    def reads(self, digest: str) -> list[Request]:
        """The requests that carried bytes of this digest."""
        return [it for it in self.requests() if it.method == "GET" and it.path.partition("?")[0].endswith(digest) and it.sent]

    def copies_of(self, blob: Descriptor) -> float:
        return sum(it.sent for it in self.reads(blob.digest) if it.status in (200, 206)) / blob.size

    def copies(self, image: Image) -> float:
        """Copies of the image's blobs, by bytes."""
        return sum(self.copies_of(it) * it.size for it in image.blobs) / sum(it.size for it in image.blobs)

    def token_requests(self) -> list[TokenRequest]:
        """All that were asked of the token server, refused ones too."""
        log = self._root / "tokens.log"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [TokenRequest(it["method"], it["from"], it["user"], it["granted"], tuple(it["scopes"])) for it in lines]


def _parts(digest: str) -> str:
    return digest.replace(":", "/")


def _parse(line: str) -> Request:
    match = _LINE.match(line)
    assert match is not None, line
    agent = line.rstrip().rsplit('"', 2)[1]
    return Request(match["sender"], match["method"], match["path"], int(match["status"]), int(match["sent"]), agent)


def _make_certificate(key_path: Path, certificate_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
    certificate = builder.sign(key, hashes.SHA256())
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
