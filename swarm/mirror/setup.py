"""What `swarm mirror configure` writes into the settings of container runtimes, and how it is taken out again.

Text in, text out: `cli/mirror.py` reads and writes the files.  Goals: the runtime asks the mirror first and its registry
when the mirror fails; no byte of anybody else's settings changes; what we do not understand is refused, not guessed at.
Each edit is checked by parsing its result: it must say what the file said before, and the mirror, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from swarm.errors import ConfigError
from swarm.mirror.edges import MirrorError
from swarm.mirror.paths import DOCKER_HUB, in_path, parse_registry

EVERY_REGISTRY: Final = "_default"
"""The directory that containerd falls back to."""

HOSTS_FILE: Final = "hosts.toml"

_BEGIN: Final = "# >>> swarm mirror configure; taken out again by: swarm mirror unconfigure"
_END: Final = "# <<< swarm mirror configure"
_HUB_HOST: Final = "registry-1.docker.io"  # whom clients really ask when they say docker.io
_HOST_TABLE: Final = re.compile(r"^[ \t]*\[[ \t]*(?:host|\"host\"|'host')[ \t]*[.\]]", re.MULTILINE)
_BLOCK: Final = re.compile(rf"^{re.escape(_BEGIN)}\n.*?^{re.escape(_END)}\n", re.MULTILINE | re.DOTALL)
_JSON_SPACE: Final = re.compile(r"[ \t\n\r]*")


class Runtime(Enum):
    """Whose settings."""

    CONTAINERD = "containerd"
    PODMAN = "podman"
    DOCKER = "docker"


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry as references to images name it.

    Attributes:
        name: ``host`` or ``host:port``.
        plain: It speaks HTTP, not HTTPS.
    """

    name: str
    plain: bool = False

    @classmethod
    def parse(cls, text: str) -> Registry:
        """From ``host``, ``host:port``, or either behind ``https://`` or ``http://``.

        Raises:
            ConfigError: It is none of these.
        """
        scheme, found, rest = text.partition("://")
        if not found:
            scheme, rest = "https", text
        if scheme not in ("http", "https"):
            raise ConfigError(f"{text!r} is not a registry: write it as in references to images, with http:// if it has no TLS")
        try:
            return cls(parse_registry(rest), scheme == "http")
        except MirrorError as error:
            raise ConfigError(f"{text!r} is not a registry: write it as in references to images, without a path") from error

    @property
    def server(self) -> str:
        """Where clients find it without a mirror."""
        return f"{'http' if self.plain else 'https'}://{_HUB_HOST if self.name == DOCKER_HUB else self.name}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the settings shall say.

    Attributes:
        mirror: ``http://host:port`` of the mirror, without a slash at the end.
        registries: Those it is asked for.  Empty: all, for containerd; Docker Hub, for podman.
    """

    mirror: str
    registries: tuple[Registry, ...] = ()

    @classmethod
    def parse(cls, mirror: str, registries: Sequence[str]) -> Wanted:
        """
        Raises:
            ConfigError: The mirror is no URL of a host and port, or a registry is none.
        """
        scheme, _, where = mirror.partition("://")
        where = where.removesuffix("/").lower()
        try:
            parse_registry(where)
        except MirrorError as error:
            raise ConfigError(f"{mirror!r} is not where a mirror can be: write http://HOST:PORT") from error
        if scheme not in ("http", "https"):
            raise ConfigError(f"{mirror!r} is not where a mirror can be: write http://HOST:PORT")
        return cls(f"{scheme}://{where}", tuple(dict.fromkeys(map(Registry.parse, registries))))


@dataclass(frozen=True, slots=True)
class Written:
    """What is remembered of a file we wrote.

    Attributes:
        existed: Whether it was there before; then its bytes are kept beside it.
        sha256: Of what we wrote, to tell whether somebody edited it since.
    """

    existed: bool
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """What `unconfigure` needs to know; paths are under the directory that was configured.

    Attributes:
        directories: Those we made, ``""`` being that directory itself.
    """

    mirror: str
    files: Mapping[str, Written]
    directories: frozenset[str] = frozenset()

    def encode(self) -> bytes:
        files = {path: {"existed": it.existed, "sha256": it.sha256} for path, it in sorted(self.files.items())}
        said = {"version": 1, "mirror": self.mirror, "files": files, "directories": sorted(self.directories)}
        return json.dumps(said, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, encoded: bytes) -> Record:
        """
        Raises:
            ConfigError: It is not what `encode` made.
        """
        try:
            found = json.loads(encoded)
            if found["version"] != 1:
                raise ConfigError("it was written by a later version of swarm")
            files = {str(path): Written(bool(it["existed"]), str(it["sha256"])) for path, it in dict(found["files"]).items()}
            mirror, directories = str(found["mirror"]), frozenset(map(str, found["directories"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError("it is not a record of swarm mirror configure") from error
        for path in (*files, *directories):
            # Whoever could write it could make `unconfigure` write elsewhere.
            if path.startswith("/") or ".." in path.split("/"):
                raise ConfigError(f"it names {path!r}, which is not under the directory")
        return cls(mirror, files, directories)


@dataclass(frozen=True, slots=True)
class Change:
    """A file that is to change.

    Attributes:
        before: What it holds now; `None`: there is none.
        after: What it shall hold; `None`: it goes.
    """

    path: str
    before: bytes | None
    after: bytes | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do.

    Attributes:
        changes: Only of files whose bytes differ afterwards.
        originals: Of every file we are in afterwards, what it holds without us.
        record: To be kept afterwards; `None`: nothing of us is left.
        directories: Those that we made and need no more, to be removed if they are empty.
        notes: What a person should know.
    """

    changes: tuple[Change, ...]
    originals: Mapping[str, bytes | None]
    record: Record | None
    directories: frozenset[str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The settings as they are.

    Attributes:
        files: Bytes of the files that may be concerned, by path.
        record: Of an earlier `configure`.
        originals: What it kept.
        directories: Those that exist, ``""`` being the one that is configured.
        certificates: Directories of containerd's that hold certificates.
    """

    files: Mapping[str, bytes]
    record: Record | None = None
    originals: Mapping[str, bytes] = field(default_factory=dict)
    directories: frozenset[str] = frozenset()
    certificates: frozenset[str] = frozenset()


# --- plans ----------------------------------------------------------------------------------------------------------


def plan_configure(runtime: Runtime, path: str, wanted: Wanted, found: Found) -> Plan:
    """Make the settings say exactly what is wanted, whatever an earlier `configure` wrote.

    Args:
        path: The file's name; for containerd, whose files have fixed names, unused.

    Raises:
        ConfigError: A file cannot be understood, or has settings that ours would break; nothing should be changed.
    """
    bases, notes = _without_us(runtime, found)
    match runtime:
        case Runtime.CONTAINERD:
            after, more = _containerd(wanted, bases, found.certificates)
            notes += more
        case Runtime.PODMAN:
            after = {path: registries_conf(bases.get(path), wanted, path)}
        case Runtime.DOCKER:
            if any(registry.name != DOCKER_HUB for registry in wanted.registries):
                raise ConfigError("Docker mirrors Docker Hub only: leave out --registry")
            after = {path: daemon_json(bases.get(path), wanted.mirror, path)}
    ours = {path: text for path, text in after.items() if text is not None and text != bases.get(path)}
    notes += [f"{path} names the mirror already" for path in sorted(set(after) - set(ours))]
    files = {path: Written(bases.get(path) is not None, _sha256(text)) for path, text in ours.items()}
    made = _made(found)
    needed = {directory for path in ours for directory in ("", path.rpartition("/")[0])}
    directories = frozenset(needed & made | needed - found.directories)
    record = Record(wanted.mirror, files, directories) if files else None
    originals = {path: bases.get(path) for path in ours}
    return Plan(_changes(found, {**bases, **after}), originals, record, made - directories, tuple(notes))


def plan_unconfigure(runtime: Runtime, found: Found) -> Plan:
    """Put everything back; of a file that was edited since, take out our part only.

    Raises:
        ConfigError: A file was edited such that our part cannot be told from the rest.
    """
    bases, notes = _without_us(runtime, found)
    return Plan(_changes(found, bases), {}, None, _made(found), tuple(notes))


def _made(found: Found) -> frozenset[str]:
    """Directories that an earlier `configure` made."""
    return found.record.directories if found.record is not None else frozenset()


def _without_us(runtime: Runtime, found: Found) -> tuple[dict[str, bytes | None], list[str]]:
    """Every file as it would be without us, and what to say about those that were edited."""
    bases: dict[str, bytes | None] = dict(found.files)
    notes: list[str] = []
    if found.record is None:
        return bases, notes
    for path, written in found.record.files.items():
        now = found.files.get(path)
        if written.existed and path not in found.originals:
            raise ConfigError(f"the bytes that {path} had before are gone; take the mirror out by hand")
        original = found.originals[path] if written.existed else None
        if now is None:
            notes.append(f"{path} was removed by somebody else and stays so")
        elif _sha256(now) == written.sha256:
            bases[path] = original
        elif now != original:
            bases[path] = _taken_out(runtime, path, now, found.record.mirror, may_go=not written.existed)
            notes.append(f"{path} was edited since; only the mirror is taken out of it")
    return bases, notes


def _taken_out(runtime: Runtime, path: str, edited: bytes, mirror: str, *, may_go: bool) -> bytes | None:
    text = _decode(edited, path)
    rest = _json_without(text, mirror, path) if runtime is Runtime.DOCKER else _toml_without(text, path)
    return None if may_go and not rest.strip() else rest.encode()


def _changes(found: Found, after: Mapping[str, bytes | None]) -> tuple[Change, ...]:
    names = sorted({*found.files, *after})
    changed = [path for path in names if found.files.get(path) != after.get(path)]
    return tuple(Change(path, found.files.get(path), after.get(path)) for path in changed)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8; it is left alone") from error


# --- containerd -----------------------------------------------------------------------------------------------------


def _containerd(
    wanted: Wanted, bases: Mapping[str, bytes | None], certificates: frozenset[str]
) -> tuple[dict[str, bytes | None], list[str]]:
    """Every `hosts.toml` to be written, and notes."""
    present = {path.partition("/")[0]: text for path, text in bases.items() if text is not None}
    after: dict[str, bytes | None] = {}
    for registry in wanted.registries or (None,):
        directory = EVERY_REGISTRY if registry is None else _directory(registry, present)
        if directory not in present and directory in certificates:
            # It would no longer look at them once there is a hosts.toml.
            raise ConfigError(
                f"{directory} holds certificates and no {HOSTS_FILE}: write one that names them (ca = ..., client = ...) first"
            )
        path = f"{directory}/{HOSTS_FILE}"
        after[path] = hosts_toml(present.get(directory), registry, wanted.mirror, path)
    notes = (
        [] if wanted.registries else [_not_reached(directory) for directory in sorted(present) if directory != EVERY_REGISTRY]
    )
    return after, notes


def _directory(registry: Registry, present: Mapping[str, bytes]) -> str:
    """containerd prefers ``host_port_``, for file systems without colons in names."""
    host, colon, port = registry.name.rpartition(":")
    without_colon = f"{host}_{port}_"
    return without_colon if colon and without_colon in present else registry.name


def _not_reached(directory: str) -> str:
    return f"{directory} has settings of its own, so {EVERY_REGISTRY} is not for it: name it with --registry"


def hosts_toml(before: bytes | None, registry: Registry | None, mirror: str, path: str = HOSTS_FILE) -> bytes:
    """The mirror as the first host; what was there stays, behind it.

    Args:
        before: `None`: a new file, with the registry itself as the server to fall back to.
        registry: `None` for `EVERY_REGISTRY`, where containerd falls back to whichever registry was asked.

    Raises:
        ConfigError: The file is not understood.
    """
    table = f'[host."{mirror}"]\n  capabilities = ["pull", "resolve"]\n'
    if before is None:
        server = "" if registry is None else f'server = "{registry.server}"\n\n'
        return _block(server + table).encode()
    text = _decode(before, path)
    said = _toml(text, path)
    hosts = said.get("host", {})
    if not isinstance(hosts, dict):
        raise ConfigError(f"{path}: host is not a table; it is left alone")
    if mirror in hosts:
        if next(iter(hosts)) != mirror:
            raise ConfigError(f"{path} names {mirror} already, behind another host; take one of them out by hand")
        return before
    first = _HOST_TABLE.search(text)
    after = _inserted(text, first.start() if first else len(text), _block(table))
    expected = {**said, "host": {mirror: {"capabilities": ["pull", "resolve"]}, **hosts}}
    found = _toml(after, path)
    if found != expected or list(found["host"]) != list(expected["host"]):
        raise ConfigError(f"{path} is written in a way that leaves no place for the mirror; add by hand:\n{table}")
    return after.encode()


# --- podman, CRI-O, skopeo ------------------------------------------------------------------------------------------


def registries_conf(before: bytes | None, wanted: Wanted, path: str = "registries.conf") -> bytes:
    """A registry with its mirror for each that is wanted.

    The name of the registry goes into the mirror's path: these clients have no other way to say it.

    Raises:
        ConfigError: The file is not understood, is of the first version, or has one of these registries already.
    """
    text = "" if before is None else _decode(before, path)
    said = _toml(text, path)
    if "registries" in said:
        raise ConfigError(f"{path} has the first version's [registries...] tables; use a file of its own in registries.conf.d")
    registries = wanted.registries or (Registry(DOCKER_HUB),)
    there = said.get("registry", [])
    if not isinstance(there, list) or not all(isinstance(it, dict) for it in there):
        raise ConfigError(f"{path}: registry is not a list of tables; it is left alone")
    taken = {str(it.get("prefix") or it.get("location")) for it in there} & {registry.name for registry in registries}
    if taken:
        raise ConfigError(f"{path} has settings for {', '.join(sorted(taken))} already; add the mirror there by hand")
    tables = [_registry_table(registry, wanted.mirror) for registry in registries]
    after = _inserted(text, len(text), _block("\n".join(tables)))
    if _toml(after, path) != {**said, "registry": [*there, *tomllib.loads("\n".join(tables))["registry"]]}:
        raise ConfigError(f"{path} is written in a way that leaves no place for the mirror; use a file of its own")
    return after.encode()


def _registry_table(registry: Registry, mirror: str) -> str:
    """Both with `insecure` where there is no TLS, which these clients would otherwise insist on."""
    scheme, _, where = mirror.partition("://")
    lines = ["[[registry]]", f'prefix = "{registry.name}"', f'location = "{registry.name}"']
    lines += ["insecure = true"] * registry.plain
    lines += ["[[registry.mirror]]", f'location = "{where}/{in_path(registry.name)}"']
    lines += ["insecure = true"] * (scheme == "http")
    return "\n".join(lines) + "\n"


# --- TOML -----------------------------------------------------------------------------------------------------------


def _toml(text: str, path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML ({error}); it is left alone") from error


def _block(content: str) -> str:
    return f"{_BEGIN}\n{content}{_END}\n"


def _inserted(text: str, at: int, block: str) -> str:
    """With the block on lines of its own."""
    between = "" if at == 0 or text[at - 1] == "\n" else "\n"
    return f"{text[:at]}{between}{block}{text[at:]}"


def _toml_without(text: str, path: str) -> str:
    rest, count = _BLOCK.subn("", text)
    if count != 1 or _BEGIN in rest or _END in rest:
        raise ConfigError(f"{path} was edited, and which part is swarm's cannot be told; take it out by hand")
    _toml(rest, path)
    return rest


# --- Docker ---------------------------------------------------------------------------------------------------------

_MIRRORS: Final = "registry-mirrors"


def daemon_json(before: bytes | None, mirror: str, path: str = "daemon.json") -> bytes:
    """The mirror as the first of Docker's mirrors of Docker Hub; every other byte stays.

    Raises:
        ConfigError: The file is not understood.
    """
    text = "" if before is None else _decode(before, path)
    entry = json.dumps(mirror)
    if not text.strip():
        return f'{{\n  "{_MIRRORS}": [{entry}]\n}}\n'.encode()
    said = _json_object(text, path)
    mirrors = _mirrors(said, path)
    if mirror in (it.rstrip("/") for it in mirrors):
        return text.encode()
    if _MIRRORS in said:
        at = _json_members(text)[_MIRRORS] + 1
        insert = f"{entry}, " if mirrors else entry
    else:
        at = text.index("{") + 1
        space = _space(text, at)
        insert = f'{space}"{_MIRRORS}": [{entry}],' if said else f'\n  "{_MIRRORS}": [{entry}]\n'
    after = text[:at] + insert + text[at:]
    if _json_object(after, path) != {**said, _MIRRORS: [mirror, *mirrors]}:
        raise ConfigError(f"{path} is written in a way that leaves no place for the mirror; add it to {_MIRRORS} by hand")
    return after.encode()


def _json_without(text: str, mirror: str, path: str) -> str:
    """Without the mirror; the list stays, perhaps empty."""
    said = _json_object(text, path)
    mirrors = _mirrors(said, path)
    if mirror not in mirrors:
        return text
    entry = re.escape(json.dumps(mirror))
    at = _json_members(text)[_MIRRORS]
    _, end = json.JSONDecoder().raw_decode(text, at)
    shorter = re.sub(rf"{entry}\s*,\s*|(,\s*)?{entry}", "", text[at:end], count=1)
    after = text[:at] + shorter + text[end:]
    if _json_object(after, path) != {**said, _MIRRORS: [it for it in mirrors if it != mirror]}:
        raise ConfigError(f"{path} was edited such that the mirror cannot be taken out; take it out by hand")
    return after


def _json_object(text: str, path: str) -> dict[str, Any]:
    try:
        said = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); it is left alone") from error
    if not isinstance(said, dict):
        raise ConfigError(f"{path} is not a JSON object; it is left alone")
    return said


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two equal keys counts, programs do not agree on."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _mirrors(said: dict[str, Any], path: str) -> list[str]:
    mirrors = said.get(_MIRRORS, [])
    if not isinstance(mirrors, list) or not all(isinstance(it, str) for it in mirrors):
        raise ConfigError(f"{path}: {_MIRRORS} is not a list of URLs; it is left alone")
    return mirrors


def _json_members(text: str) -> dict[str, int]:
    """Where the value of each member of a valid, non-empty object begins."""
    decoder, members = json.JSONDecoder(), {}
    at = _skip(text, text.index("{") + 1)
    while True:
        key, at = decoder.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # over the colon
        members[key] = at
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] != ",":
            return members
        at = _skip(text, at + 1)


def _space(text: str, at: int) -> str:
    return text[at : _skip(text, at)]


def _skip(text: str, at: int) -> int:
    """Past white space."""
    match = _JSON_SPACE.match(text, at)
    return at if match is None else match.end()


# --- what else to do ------------------------------------------------------------------------------------------------


def advice(runtime: Runtime, directory: str, containerd_config: bytes | None = None) -> str:
    """What makes the runtime take notice.

    Args:
        directory: What was configured.
        containerd_config: containerd's own configuration, where there is one.
    """
    match runtime:
        case Runtime.PODMAN:
            return "podman and skopeo read it at their next pull; CRI-O when told to: systemctl reload crio"
        case Runtime.DOCKER:
            return "Docker reads it when told to: systemctl reload docker (no container is stopped)"
        case Runtime.CONTAINERD:
            return _containerd_advice(directory, containerd_config)


def _containerd_advice(directory: str, config: bytes | None) -> str:
    registry = {} if config is None else _cri_registry(config)
    if directory.rstrip("/") in (it.rstrip("/") for it in str(registry.get("config_path", "")).split(":")):
        return "containerd reads it at the next pull, without a restart"
    old = "; take out registry.mirrors there, which goes not with it" if registry.get("mirrors") else ""
    return (
        "containerd reads it at the next pull once its configuration has config_path = "
        f'"{directory}" under [plugins."io.containerd.grpc.v1.cri".registry] (2.x: '
        f'[plugins."io.containerd.cri.v1.images".registry]){old}; if you add that, restart it: systemctl restart containerd'
    )


def _cri_registry(config: bytes) -> dict[str, Any]:
    """What containerd's configuration says of registries; empty where we cannot tell."""
    try:
        plugins = tomllib.loads(config.decode()).get("plugins", {})
        for plugin in ("io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri"):
            registry = plugins.get(plugin, {}).get("registry", {})
            if registry:
                return dict(registry)
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    return {}
