"""Credentials: a client's, as it sent them, and this node's own, from files, a Docker `config.json` or a helper program.

Goals: a secret goes to the registry (or its token server) it was given for, and is in no log, message, file or cache key.
Non-goals: storing credentials; `docker login` and its like do that.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
import trio

from swarm.config import MirrorSettings, RegistrySettings
from swarm.errors import ConfigError, OriginRefused
from swarm.mirror.edges import MirrorError
from swarm.mirror.flights import Flights
from swarm.mirror.listed import Listed
from swarm.mirror.paths import DOCKER_HUB, ClientCredentials, Name
from swarm.private_files import read_private

MAX_HEADER_CHARACTERS: Final = 12 * 1024
"""Tokens with many claims have a few kilobytes; the origin layer sends at most 16 KiB of headers."""

MAX_CONFIG_BYTES: Final = 1024 * 1024
MAX_PASSWORD_BYTES: Final = 16 * 1024

HELPER_SECONDS: Final = 6.0
"""Longest run of a helper: some start an interpreter and ask a cloud, and clients of the mirror wait for 8 s."""

HELPER_OUTPUT_BYTES: Final = 64 * 1024
HELPER_CACHE_SECONDS: Final = 300.0
"""Helpers for clouds call their cloud; what they give is good for hours."""

FRESH_SECONDS: Final = 2.0
"""What a helper said less than this ago is not asked for again because a registry refused it."""

PROCESS_KEY: Final = os.urandom(32)
"""Keys the tags of credentials: nothing derived from one outlives the process, or can be compared with another node's."""

_TOKEN68: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_HUB_KEYS: Final = frozenset({"index.docker.io", "docker.io", "registry-1.docker.io", "auth.docker.io"})

log = structlog.get_logger(__name__)


# --- kinds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Basic:
    """User and password, as the value of an `Authorization` header."""

    header: str = field(repr=False)

    @classmethod
    def of(cls, user: str, password: str) -> Basic:
        return cls("Basic " + b64encode(f"{user}:{password}".encode()).decode("ascii"))


@dataclass(frozen=True, slots=True)
class Bearer:
    """A token for the registry itself, as the value of an `Authorization` header; there is no other where it is refused."""

    header: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Refresh:
    """An identity token: opens the token server only."""

    token: str = field(repr=False)


Credential = Basic | Bearer | Refresh


def tag_of(credential: Credential | None) -> bytes:
    """16 bytes that tell credentials apart in a cache without saying anything about them; empty for none."""
    if credential is None:
        return b""
    secret = credential.token if isinstance(credential, Refresh) else credential.header
    kind = type(credential).__name__.encode("ascii")
    return blake2b(secret.encode("utf-8"), key=PROCESS_KEY, digest_size=16, person=kind.ljust(16, b"\0")).digest()


def of_client(client: ClientCredentials | None) -> Basic | Bearer | None:
    """What a client sent, if it can be passed on; `None` for nothing, or an empty user and password (podman sends that).

    Raises:
        MirrorError: 401: not Basic and not Bearer, or malformed.
    """
    if client is None:
        return None
    scheme, _, rest = client.header.partition(" ")
    if len(client.header) <= MAX_HEADER_CHARACTERS and _TOKEN68.fullmatch(rest.strip()):
        if scheme.lower() == "bearer":
            return Bearer(f"Bearer {rest.strip()}")
        if scheme.lower() == "basic" and (found := _decoded(rest.strip())) is not None:
            return None if found == ("", "") else Basic(f"Basic {rest.strip()}")
    raise MirrorError(401, "UNAUTHORIZED", "the Authorization header is neither Basic nor Bearer, or malformed")


def _decoded(text: str) -> tuple[str, str] | None:
    """User and password of the Basic form."""
    try:
        user, colon, password = b64decode(text, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (user, password) if colon else None


# --- this node's own ----------------------------------------------------------------------------------------------


RunHelper = Callable[[str, str], Awaitable[Basic | Refresh | None]]
"""(helper, server) -> what it knows.  Raises `OriginRefused`."""


@dataclass(frozen=True, slots=True)
class _DockerConfig:
    """What `config.json` says; keys are `host[:port][/namespace]`."""

    stored: dict[str, Credential] = field(repr=False)
    helpers: dict[str, str]
    store: str


_EMPTY: Final = _DockerConfig({}, {}, "")


class OwnCredentials:
    """This node's own credentials, by registry.  Files are read again when they change.

    Raises:
        ConfigError: A file cannot be read, or is not what it should be.
    """

    def __init__(self, settings: MirrorSettings, *, run_helper: RunHelper | None = None) -> None:
        self._listed = Listed.read(settings)
        self._path = settings.docker_config
        self._run: RunHelper = run_helper or ask_helper
        self._flights: Flights[tuple[str, str], Credential | None] = Flights()
        self._helped: dict[tuple[str, str], tuple[Credential | None, float]] = {}
        self._read: tuple[object, _DockerConfig] = (None, _EMPTY)
        self._problem = ""
        self._load()
        for table in self._listed.tables.values():
            if table.password_file is not None:
                _password(table)

    def has(self, registry: str) -> bool:
        """Whether anything is set for this registry; a credential store for all (`credsStore`) does not count."""
        table = self._listed.settings(registry)
        if table.username or table.credential_helper:
            return True
        config = self._docker_config()
        return registry in config.helpers or any(key.partition("/")[0] == registry for key in config.stored)

    def might_have(self, registry: str) -> bool:
        """Whether a credential may be found for it."""
        return self.has(registry) or bool(self._docker_config().store and self._listed.is_trusted(registry))

    async def find(self, name: Name) -> Credential | None:
        """The credential for this repository.

        Raises:
            OriginRefused: There should be one, and it cannot be read or asked for.
        """
        try:
            return await self._find(name)
        except ConfigError as error:
            raise OriginRefused(f"the credentials for {name.registry} cannot be read: {error}") from error

    async def _find(self, name: Name) -> Credential | None:
        table = self._listed.settings(name.registry)
        if table.username:
            return Basic.of(table.username, _password(table))
        if table.credential_helper:
            return await self._help(table.credential_helper, name.registry)
        config = self._docker_config()
        if name.registry in config.helpers:
            return await self._help(config.helpers[name.registry], name.registry)
        key = str(name)
        while key:
            if key in config.stored:
                return config.stored[key]
            key = key.rpartition("/")[0]
        return await self._help(config.store, name.registry) if config.store and self.might_have(name.registry) else None

    def forget(self, registry: str) -> bool:
        """A registry refused what a helper said.  Whether asking the helper again may bring something else."""
        now, stale = trio.current_time(), False
        for key, (_, until) in list(self._helped.items()):
            if key[1] == registry and until - HELPER_CACHE_SECONDS < now - FRESH_SECONDS:
                del self._helped[key]
                stale = True
        return stale

    async def _help(self, helper: str, registry: str) -> Credential | None:
        key = (helper, registry)
        known = self._helped.get(key)
        if known is not None and trio.current_time() < known[1]:
            return known[0]

        async def ask() -> Credential | None:
            # Whoever asked may give up before a slow helper is done; the next one is to find what it said.
            with trio.CancelScope(shield=True):
                found = await self._run(helper, _server_of(registry))
            self._helped[key] = (found, trio.current_time() + HELPER_CACHE_SECONDS)
            while len(self._helped) > 256:
                self._helped.pop(next(iter(self._helped)))
            return found

        return await self._flights.share(key, ask)

    def _docker_config(self) -> _DockerConfig:
        """What the file says now; nothing where it went away, since that may be how somebody took the credentials back."""
        try:
            self._problem, found = "", self._load()
            return found
        except ConfigError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log.warning("this node's registry credentials cannot be read", error=self._problem)
            return _EMPTY

    def _load(self) -> _DockerConfig:
        if self._path is None:
            return _EMPTY
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise ConfigError(f"mirror.docker_config: cannot read {self._path}: {error.strerror}") from error
        version = (status.st_mtime_ns, status.st_ino, status.st_size)
        if self._read[0] != version:
            self._read = (version, read_docker_config(self._path))
        return self._read[1]


def read_docker_config(path: Path) -> _DockerConfig:
    """`auths`, `credHelpers` and `credsStore` of a Docker (or podman) credential file.

    Raises:
        ConfigError: Unreadable, open to others, or not such a file.  Never quotes what is in it.
    """
    try:
        raw = read_private(path, max_bytes=MAX_CONFIG_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(f"mirror.docker_config: there is no file {path}") from error
    wrong = ConfigError(f"mirror.docker_config: {path} is not a Docker config.json")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise wrong from None  # its message would quote the secret
    if not isinstance(found, dict):
        raise wrong
    auths, helpers, store = found.get("auths", {}), found.get("credHelpers", {}), found.get("credsStore", "")
    if not isinstance(auths, dict) or not isinstance(helpers, dict) or not isinstance(store, str):
        raise wrong
    for helper in (*helpers.values(), *([store] if store else [])):
        if not isinstance(helper, str) or not _HELPER.fullmatch(helper):
            raise ConfigError(f"mirror.docker_config: {path} names a credential helper that cannot be a program's name")
    stored = {_key(key): credential for key, entry in auths.items() if (credential := _stored(entry)) is not None}
    return _DockerConfig(stored, {_key(key): helper for key, helper in helpers.items()}, store)


def _stored(entry: object) -> Credential | None:
    """An entry of `auths`; an empty one says that a helper knows."""
    if not isinstance(entry, dict):
        return None

    def text(name: str) -> str:
        value = entry.get(name)
        return value if isinstance(value, str) else ""

    if text("identitytoken"):
        return Refresh(text("identitytoken"))
    if _TOKEN68.fullmatch(text("registrytoken")):
        return Bearer(f"Bearer {text('registrytoken')}")
    decoded = _decoded(text("auth").strip())
    user, password = decoded if decoded is not None else (text("username"), text("password"))
    # Docker writes a trailing zero byte into some entries.
    return Basic.of(user, password.rstrip("\0")) if user or password else None


def _key(text: str) -> str:
    """`https://index.docker.io/v1/` -> `docker.io`, `registry.example/team` -> itself."""
    parts = urlsplit(text if "://" in text else f"//{text}")
    host = parts.netloc.rpartition("@")[2].lower()
    path = re.sub(r"^/v[12](/|$)", "/", parts.path).strip("/")
    if host in _HUB_KEYS:
        host = DOCKER_HUB
    return f"{host}/{path}" if path else host


def _server_of(registry: str) -> str:
    """What Docker asks a helper about: the host, but for its own hub."""
    return "https://index.docker.io/v1/" if registry == DOCKER_HUB else registry


def _password(table: RegistrySettings) -> str:
    path = table.password_file
    if path is None:
        raise ConfigError("username without password_file")
    try:
        raw = read_private(path, max_bytes=MAX_PASSWORD_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(f"password_file: there is no file {path}") from error
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise ConfigError(f"password_file: {path} is not text") from None


# --- helper programs ----------------------------------------------------------------------------------------------


async def ask_helper(helper: str, server: str) -> Basic | Refresh | None:
    """Run `docker-credential-<helper> get`, without a shell, and read what it knows of this server.

    Raises:
        OriginRefused: It is not there, fails, takes too long, or says something else.  Never what it said.
    """
    program = f"docker-credential-{helper}"
    path = shutil.which(program) if _HELPER.fullmatch(helper) else None
    if path is None:
        raise OriginRefused(f"{program} is not installed, or not in this daemon's PATH")
    output, code = await _run(path, server.encode("utf-8"), program)
    if code != 0:
        if b"credentials not found" in output:
            return None
        raise OriginRefused(f"{program} failed (exit code {code}); run it by hand: echo {server} | {program} get")
    try:
        found: Any = json.loads(output)
        user, secret = found["Username"], found["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise OriginRefused(f"{program} answered with something else than credentials") from None
    if not isinstance(user, str) or not isinstance(secret, str):
        raise OriginRefused(f"{program} answered with something else than credentials")
    if not user and not secret:
        return None
    return Refresh(secret) if user == "<token>" else Basic.of(user, secret)


async def _run(path: str, question: bytes, program: str) -> tuple[bytes, int]:
    try:
        process = await trio.lowlevel.open_process(
            [path, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # may hold what must not be in a log
            start_new_session=True,
        )
    except OSError as error:
        raise OriginRefused(f"{program} cannot be started: {error.strerror}") from error
    output = bytearray()
    try:
        with trio.fail_after(HELPER_SECONDS):
            async with process.stdin as stdin:  # type: ignore[union-attr]  # both are pipes
                with contextlib.suppress(trio.BrokenResourceError):  # it does not want to know; what it says counts
                    await stdin.send_all(question)
            async with process.stdout as stdout:  # type: ignore[union-attr]
                while data := await stdout.receive_some(HELPER_OUTPUT_BYTES):
                    output += data
                    if len(output) > HELPER_OUTPUT_BYTES:
                        raise OriginRefused(f"{program} says more than {HELPER_OUTPUT_BYTES} bytes")
            return bytes(output), await process.wait()
    except trio.TooSlowError as error:
        raise OriginRefused(f"{program} did not answer within {HELPER_SECONDS:g} s") from error
    finally:
        await _end(process)


async def _end(process: trio.Process) -> None:
    """A helper that hangs is ended together with what it started."""
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                await trio.aclose_forcefully(pipe)
