"""Settings: a TOML file, the environment and flags become one frozen `Settings`; every check of a value lives here.

Flags win over the environment, which wins over the file, which wins over the defaults.  Each setting is declared once,
below, with its default, unit, bounds and a sentence for people; `docs/reference/configuration.md` is written from these
declarations and a test keeps it so.  Plain dataclasses and the standard library only: the `swarm fetch` command reads
its data directory from here and must start at once.
"""

# ruff: noqa: RUF009 - `setting()` stands for `dataclasses.field()`, and an Endpoint is frozen

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from swarm.errors import ConfigError
from swarm.places import default_data_dir, default_file
from swarm.quantities import (
    MIB,
    Endpoint,
    in_unit,
    parse_duration,
    parse_endpoint,
    parse_fraction,
    parse_rate,
    parse_size,
    shown,
)

DEFAULT_PORT: Final = 7400
ENVIRONMENT_PREFIX: Final = "SWARM_"
RESERVED_VARIABLES: Final = frozenset({"SWARM_CONFIG", "SWARM_DEBUG"})
"""Read by the command line, not settings."""

MAX_FILE_BYTES: Final = 1 * MIB
"""A configuration is kilobytes; a mistaken path (a disk image, /dev/zero) must not fill memory."""

_SERVICE_LINK: Final = re.compile(
    r"SWARM(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes puts into every container for a Service whose name begins with `swarm`: not meant for us."""

_REGISTRY: Final = re.compile(
    r"(\*\.)?([a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*|\[[0-9a-f:.]{2,45}\])(:[1-9][0-9]{0,4})?"
)
_ENDPOINT: Final = re.compile(r"https?://([A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9a-f:.]+\])(:[0-9]{1,5})?/?")
_CONGESTION_CONTROL: Final = re.compile(r"[a-z0-9_]{0,15}")
_HUB: Final = re.compile(r"https?://(?!\*)" + _REGISTRY.pattern + r"(/[A-Za-z0-9][A-Za-z0-9._~-]*)*/?")
_PROGRAM: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

T = TypeVar("T")
Pairs = tuple[tuple[str, str], ...]
"""A table of texts."""


# --- what a setting is --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known about a setting besides its type and default.

    Attributes:
        text: One or two sentences for the reference.
        unit: How text is read: `duration size rate listen endpoint fraction table`, or empty for what the type says.
        at_least, at_most: Inclusive bounds of a number, in the base unit.
        choices: The words allowed; empty for any.
    """

    text: str
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()


def setting(
    default: T,
    text: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
) -> T:
    """A dataclass field with its documentation beside it (typed as its default, as `dataclasses.field` is)."""
    value: T = field(default=default, metadata={"swarm": Meta(text, unit, at_least, at_most, choices)})
    return value


# --- the settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """The closed group this node belongs to, and where it listens."""

    directory: Path | None = setting(
        None, "Directory of a closed network: `ca.crt`, `node.crt`, `node.key`, `group.secret`. Made by `swarm network`."
    )
    open: str | None = setting(
        None,
        "Name of an open network: anyone who knows the name can join, and private content is never shared in it. "
        "Without `directory` and `open` the node runs the open network `default` on loopback only.",
    )
    listen: Endpoint | None = setting(
        None,
        "Where the DHT (UDP) and peer control (TCP) listen; pieces use the next port. Default: `[::]:7400` (IPv4 too) in a "
        "closed network, else `127.0.0.1:7400`. Port 0 takes free ports.",
        unit="listen",
    )
    advertise: tuple[str, ...] = setting(
        (), "Addresses to announce instead of the ones other nodes see us from; needed behind address translation."
    )
    join: tuple[Endpoint, ...] = setting(
        (),
        "Nodes to contact first. A name stands for all its addresses and is looked up again and again, so a headless "
        "service is enough.",
        unit="endpoint",
    )


@dataclass(frozen=True, slots=True)
class PeersSettings:
    """Bytes exchanged with other nodes."""

    upload_rate: int = setting(0, "What this node gives in all, per second. 0: no limit.", unit="rate", at_least=0)
    task_upload_rate: int = setting(0, "What this node gives of one task, per second. 0: no limit.", unit="rate", at_least=0)
    download_rate: int = setting(0, "What this node takes from peers, per second. 0: no limit.", unit="rate", at_least=0)
    encrypt: bool = setting(
        False,
        "Send pieces over TLS always. Otherwise they travel in clear, protected against change by signed proofs, except "
        "content that needed credentials.",
    )
    congestion_control: str = setting(
        "cubic",
        "TCP congestion control of the pieces we send, one of `net.ipv4.tcp_available_congestion_control`; empty for the "
        "system's. Under `bbr` some nodes fall behind where links are slower than the nodes; where they are faster, it costs "
        "less processor time than `cubic`.",
    )
    give_up: float = setting(
        15.0,
        "A download that cannot read its origin fails when nothing has come from other nodes for so long.",
        unit="duration",
        at_least=1,
        at_most=86400,
    )


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """What is kept on disk, and for how long."""

    quota: int = setting(
        0,
        "Most that content may take. 0: no quota, only `min_free` and the watermarks bound it.",
        unit="size",
        at_least=0,
    )
    high_watermark: float = setting(
        0.90,
        "Share of the quota (or of the disk) at which the least recently used content is evicted.",
        unit="fraction",
        at_least=0.05,
        at_most=1,
    )
    low_watermark: float = setting(
        0.80, "Share at which eviction stops again; below `high_watermark`.", unit="fraction", at_least=0.01, at_most=1
    )
    scrub_rate: int = setting(
        8 * MIB,
        "Speed at which content at rest is read and checked again, each once a week. 0: never.",
        unit="rate",
        at_least=0,
    )
    min_free: int = setting(512 * MIB, "Room always left free on the disk for others.", unit="size", at_least=0)


@dataclass(frozen=True, slots=True)
class OriginSettings:
    """How origins (web servers, registries, buckets) are read."""

    connect_timeout: float = setting(
        10.0, "Longest wait for a connection, one address.", unit="duration", at_least=0.1, at_most=300
    )
    header_timeout: float = setting(15.0, "Longest wait for the head of an answer.", unit="duration", at_least=0.1, at_most=600)
    stall_timeout: float = setting(
        10.0, "An answer from which no byte came for so long is given up.", unit="duration", at_least=0.1, at_most=600
    )
    retry_seconds: float = setting(
        30.0,
        "How long a failing origin is tried again (no connection, 429, 5xx; `Retry-After` is honoured) before the fetch fails.",
        unit="duration",
        at_least=0,
        at_most=3600,
    )
    retries: int = setting(4, "Most attempts after the first, within `retry_seconds`.", at_least=0, at_most=100)
    connections_per_host: int = setting(16, "Most connections to one host at a time.", at_least=1, at_most=1024)
    redirect_memory: float = setting(
        60.0,
        "How long the end of a redirect chain is used again without walking the chain.",
        unit="duration",
        at_least=0,
        at_most=3600,
    )
    proxy: str = setting("", "URL of an outgoing HTTP proxy. The environment's `http_proxy` is not used.")
    proxy_except: tuple[str, ...] = setting((), "Hosts reached without the proxy: `host` or `*.domain`.")
    ca: Pairs = setting(
        (),
        'PEM file of a private authority, by host (`"registry.internal" = "/etc/ssl/internal.pem"`).',
        unit="table",
    )
    validators: Pairs = setting(
        (),
        "Which validator tells versions apart, by URL prefix: `etag`, `last-modified` or `none`; for backends whose ETags "
        "differ.",
        unit="table",
    )


@dataclass(frozen=True, slots=True)
class EgressSettings:
    """What an outgoing request may reach."""

    allow: tuple[str, ...] = setting(
        (),
        "Networks (`10.1.0.0/16`), addresses, hosts or `*.domain` that may be reached although the rules refuse them. A host "
        "opens private and loopback addresses; link-local and metadata addresses only an entry that names them.",
    )
    ports: tuple[int, ...] = setting(
        (),
        "Ports below 1024, beside 80 and 443, that jobs and clients of the mirror or proxy may reach.",
        at_least=1,
        at_most=65535,
    )


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """One registry, by its name in images (`"registry.example:5000"`, `"docker.io"`) or `"*.domain"`; it counts as listed."""

    endpoint: str = setting(
        "", "Where it answers, if not at `https://` and its name: `http://10.0.0.5:5000`. Plain HTTP must be said here."
    )
    rights: str = setting(
        "",
        "Who may read what this registry has; empty: as `mirror.rights` says.",
        choices=("", "auto", "public", "verify", "never"),
    )
    repositories: Pairs = setting(
        (), 'The same by repository: `{ "team/secret" = "never", "team/*" = "verify" }`; the longest fit decides.', unit="table"
    )
    username: str = setting("", "User of this node's own credentials; with `password_file`.")
    password_file: Path | None = setting(None, "File (mode 0600) with the password or token that belongs to `username`.")
    credential_helper: str = setting(
        "", "Program that knows this node's own credentials: `ecr-login` runs `docker-credential-ecr-login`."
    )
    token_hosts: tuple[str, ...] = setting(
        (), "Other hosts (`auth.example.com`, `10.0.0.5:5001`) where the registry's tokens come from and credentials may go."
    )
    pass_credentials: bool = setting(
        True, "Pass what a client authenticates with on to this registry, and the registry's challenge on to clients."
    )


Registries = tuple[tuple[str, RegistrySettings], ...]
"""Tables of registries by name."""


@dataclass(frozen=True, slots=True)
class MirrorSettings:
    """The registry face: container runtimes pull through the swarm."""

    listen: Endpoint | None = setting(
        None,
        "Where it listens; `off` for nowhere. Whoever reaches it may read what the registries let this node read: keep it on "
        "loopback unless that is meant. Port 0 takes a free port.",
        unit="listen",
    )
    hosts: tuple[str, ...] = setting(
        (), "Host names, beside addresses and `localhost`, under which it may be asked; any other Host header is refused."
    )
    clients: int = setting(2048, "Most connections at one time; what comes beyond is answered 503.", at_least=1, at_most=65536)
    answer_timeout: float = setting(
        8.0,
        "An answer that has not begun by then is given up with 504, so that the client asks the registry itself.",
        unit="duration",
        at_least=0.5,
        at_most=300,
    )
    body_timeout: float = setting(
        30.0,
        "A blob of which no further byte came for so long is cut. The swarm takes seconds to notice that a holder is gone.",
        unit="duration",
        at_least=0.5,
        at_most=3600,
    )
    tag_cache: float = setting(
        10.0,
        "How long the digest of a tag is used again without asking the registry.",
        unit="duration",
        at_least=0,
        at_most=86400,
    )
    tag_stale: float = setting(
        86400.0,
        "How long after that a tag still stands for its last digest while the registry does not answer. 0: not at all.",
        unit="duration",
        at_least=0,
        at_most=365 * 86400,
    )
    stream: str = setting(
        "proof",
        "When bytes of a blob that is still arriving go out: `proof` once a member vouches for a piece (the last piece when "
        "the digest of the whole matched), `digest` not before that.",
        choices=("proof", "digest"),
    )
    registries: tuple[str, ...] = setting(
        ("*",),
        "Registries the mirror reads: names as in image references, `*.domain`, or `*` for any with a public address. Private "
        "addresses and private images take an entry of their own.",
    )
    registry: Registries = setting(
        (), 'What differs by registry, a table each: `[mirror.registry."registry.example:5000"]`, see below.', unit="registries"
    )
    huggingface: str = setting(
        "https://huggingface.co",
        "Where the Hugging Face hub answers that `/hf` stands for; empty for none. Another one than this may have a private "
        "address; where it redirects to (storage) is public, or listed in `egress.allow`.",
    )
    docker_config: Path | None = setting(
        None,
        "A Docker `config.json` with this node's own credentials (`auths`, `credHelpers`, `credsStore`). Whoever reaches the "
        "mirror may then read what they open.",
    )
    rights: str = setting(
        "auto",
        "Who may read what: `public` asks nobody, `verify` asks the registry with the client's own credentials before a byte "
        "leaves, `never` does so too and keeps the content on this node, `auto` is `verify` where the registry asks for "
        "credentials.",
        choices=("auto", "public", "verify", "never"),
    )
    rights_cache: float = setting(
        120.0,
        "How long a yes of the registry is remembered; a no is, for ten seconds.",
        unit="duration",
        at_least=0,
        at_most=300,
    )
    rights_stale: float = setting(
        0.0,
        "How long after that a yes still counts while the registry does not answer. 0: what may be private is refused.",
        unit="duration",
        at_least=0,
        at_most=86400,
    )
    registry_timeout: float = setting(
        5.0,
        "Longest wait for what a registry says (manifests, rights, tokens), retries included.",
        unit="duration",
        at_least=0.1,
        at_most=60,
    )


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The node's own HTTP face: metrics, health, read-only views."""

    listen: Endpoint | None = setting(
        Endpoint("127.0.0.1", 7403), "Where it listens; `off` for nowhere. Port 0 takes a free port.", unit="listen"
    )
    hosts: tuple[str, ...] = setting(
        (),
        "Host names, beside addresses and `localhost`, under which it may be asked; any other Host header is refused, so that "
        "a web page cannot reach it through a name it controls.",
    )


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is written to standard error."""

    level: str = setting("info", "Least severity written.", choices=("debug", "info", "warning", "error"))
    format: str = setting("auto", "`auto`: text on a terminal, JSON lines otherwise.", choices=("auto", "json", "text"))


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a node can be told."""

    data_dir: Path | None = setting(
        None,
        "Where content, keys and the control socket live. Default: `/var/lib/swarm` for root, else `$XDG_STATE_HOME/swarm` "
        "(`~/.local/state/swarm`).",
    )
    seed: bool = setting(False, "Announce complete content as a seed: a node that means to keep serving.")
    drain: float = setting(
        30.0, "Longest time SIGTERM leaves to running transfers before they are cut.", unit="duration", at_least=0, at_most=3600
    )
    network: NetworkSettings = field(default_factory=NetworkSettings)
    peers: PeersSettings = field(default_factory=PeersSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    origin: OriginSettings = field(default_factory=OriginSettings)
    egress: EgressSettings = field(default_factory=EgressSettings)
    mirror: MirrorSettings = field(default_factory=MirrorSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def directory(self) -> Path:
        """The data directory, with its default filled in."""
        return self.data_dir if self.data_dir is not None else default_data_dir(os.environ)


# --- where values come from ---------------------------------------------------------------------------------------


def load(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """Read and check everything.

    Args:
        file: A TOML file that must exist; `None` reads the default file if there is one.
        environment: Default `os.environ`.
        flags: Dotted names (`"network.listen"`) to values as given on the command line; `None` values are ignored.

    Raises:
        ConfigError: Names where the value came from, the setting, the value, and what to do.
    """
    environment = os.environ if environment is None else environment
    if file is None and environment.get("SWARM_CONFIG"):
        file = Path(environment["SWARM_CONFIG"])
    values: dict[str, tuple[object, str]] = {}
    if file is not None or default_file(environment).exists():
        values.update(_from_file(file if file is not None else default_file(environment)))
    values.update(_from_environment(environment))
    values.update({name: (value, flag_name(name)) for name, value in (flags or {}).items() if value is not None})
    settings = _build(Settings, "", values)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Rules between settings.

    Raises:
        ConfigError: What contradicts what.
    """
    network = settings.network
    if network.directory is not None and network.open is not None:
        raise ConfigError(
            "network.directory and network.open exclude each other: give --network DIR or --open-network, not both"
        )
    if network.directory is None and network.open is None and network.listen is not None and not network.listen.is_loopback:
        raise ConfigError(
            f"refusing to listen on {network.listen} without a network: anyone who reaches it could join; give --network DIR "
            "(see `swarm network create`), or say --open-network if that is what you want, or listen on 127.0.0.1"
        )
    for name in settings.mirror.registries:
        if name != "*":
            _registry_name(name, "mirror.registries")
    hub = settings.mirror.huggingface
    if hub and not _HUB.fullmatch(hub):
        raise ConfigError(f"mirror.huggingface = {shown(hub)}: expected http://host:port or https://host:port, or nothing")
    if not _CONGESTION_CONTROL.fullmatch(settings.peers.congestion_control):
        raise ConfigError(
            f"peers.congestion_control = {shown(settings.peers.congestion_control)}: expected one of "
            "`sysctl net.ipv4.tcp_available_congestion_control`, or nothing for the system's"
        )
    if settings.store.low_watermark > settings.store.high_watermark:
        raise ConfigError(
            f"store.low_watermark ({settings.store.low_watermark}) is above store.high_watermark "
            f"({settings.store.high_watermark}): eviction could never stop; lower it"
        )


def _from_file(path: Path) -> dict[str, tuple[object, str]]:
    import tomllib  # only where there is a file to read: its import is a tenth of a small command's time

    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"the configuration {path} is larger than {MAX_FILE_BYTES // MIB} MiB; is it the right file?")
    try:
        table = tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not valid TOML: {error}") from error
    return {name: (value, str(path)) for name, value in _flatten(table, path)}


def data_dir_in(path: Path) -> Path | None:
    """What a configuration file says of `data_dir`, read without the rest.

    Raises:
        ConfigError: It cannot be read, or this is no path.
    """
    value, where = _from_file(path).get("data_dir", (None, ""))
    return None if value is None else Path(str(_read(value, Path, Meta(""), f"{where}: data_dir")))


def _flatten(table: dict[str, Any], path: Path) -> Iterator[tuple[str, object]]:
    known = {name: (kind, meta) for name, kind, meta, _ in declared()}
    sections = {name.split(".")[0] for name in known if "." in name}
    for key, value in table.items():
        if key in sections:
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {key} is a section; write [{key}] and its settings below it")
            for inner, inner_value in value.items():
                name = f"{key}.{inner}"
                if name not in known:
                    raise ConfigError(f"{path}: unknown setting {name}{_nearest(name, known)}")
                yield name, inner_value
        elif key in known:
            yield key, value
        else:
            raise ConfigError(f"{path}: unknown setting {key}{_nearest(key, [*known, *sections])}")


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    by_variable = {variable_name(name): name for name, *_ in declared()}
    found: dict[str, tuple[object, str]] = {}
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in RESERVED_VARIABLES or _SERVICE_LINK.fullmatch(variable):
            continue
        name = by_variable.get(variable)
        if name is None:
            raise ConfigError(
                f"environment: unknown setting {variable}{_nearest(variable, by_variable)}; unset it or correct it"
            )
        found[name] = (value, f"environment variable {variable}")
    return found


def _nearest(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    import difflib  # only when something is wrong

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if not close:  # `upload-rat` at the top level still finds `peers.upload_rate`
        last = {candidate.rpartition(".")[2]: candidate for candidate in known}
        close = [last[match] for match in difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else "; docs/reference/configuration.md lists all settings"


# --- turning text and TOML values into settings ---------------------------------------------------------------------


def declared() -> list[tuple[str, Any, Meta, object]]:
    """Every setting: dotted name, type, metadata, default.  In the order of the file."""
    found = []
    for prefix, cls in [("", Settings), *_sections()]:
        hints = get_type_hints(cls)
        for item in fields(cls):
            if "swarm" in item.metadata:
                found.append((prefix + item.name, hints[item.name], item.metadata["swarm"], item.default))
    return found


def _sections() -> list[tuple[str, type[Any]]]:
    hints = get_type_hints(Settings)
    return [(f"{item.name}.", hints[item.name]) for item in fields(Settings) if item.default_factory is not MISSING]


def section_text(name: str) -> str:
    """First line of a section's docstring."""
    return (get_type_hints(Settings)[name].__doc__ or "").strip().splitlines()[0]


def variable_name(name: str) -> str:
    """`network.listen` is `SWARM_NETWORK_LISTEN`."""
    return ENVIRONMENT_PREFIX + name.replace(".", "_").upper()


_FLAGS: Final = {
    "network.directory": "--network",
    "network.open": "--open-network",
    "network.listen": "--listen",
    "network.advertise": "--advertise",
    "network.join": "--join",
    "mirror.listen": "--mirror",
    "http.listen": "--http",
    "data_dir": "--data-dir",
    "seed": "--seed",
    "log.level": "--log-level",
    "log.format": "--log-format",
}


def flag_name(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('.', '-').replace('_', '-')}")


def has_flag(name: str) -> bool:
    return name in _FLAGS


def _build(cls: type[T], prefix: str, values: Mapping[str, tuple[object, str]]) -> T:
    hints = get_type_hints(cls)
    arguments: dict[str, object] = {}
    for item in fields(cls):  # type: ignore[arg-type]  # every section is a dataclass
        if item.default_factory is not MISSING:
            arguments[item.name] = _build(hints[item.name], f"{item.name}.", values)
        elif prefix + item.name in values:
            value, where = values[prefix + item.name]
            arguments[item.name] = _read(value, hints[item.name], item.metadata["swarm"], f"{where}: {prefix}{item.name}")
    return cls(**arguments)


def _read(value: object, kind: Any, meta: Meta, what: str) -> object:
    """One value, from TOML (typed) or from text; `what` begins the error message."""
    if get_origin(kind) in (Union, UnionType):
        if meta.unit == "listen" and value in ("off", "none", ""):
            return None
        kind = next(arm for arm in get_args(kind) if arm is not type(None))
    if meta.unit == "table":
        return _pairs(value, what)
    if meta.unit == "registries":
        return _registries(value, what)
    if get_origin(kind) is tuple:
        items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ConfigError(f'{what} = {shown(value)}: expected a list; write ["...", "..."]')
        return tuple(_read(item, get_args(kind)[0], meta, what) for item in items)
    reader = _READERS.get(meta.unit) or _READERS[kind.__name__]
    result = reader(value, what)
    if meta.choices and result not in meta.choices:
        raise ConfigError(f"{what} = {shown(value)}: must be one of {', '.join(meta.choices)}")
    if isinstance(result, (int, float)) and not isinstance(result, bool):
        _bounded(float(result), meta, value, what)
    return result


def _bounded(result: float, meta: Meta, value: object, what: str) -> None:
    if meta.at_least is not None and result < meta.at_least:
        raise ConfigError(f"{what} = {shown(value)}: must be at least {in_unit(meta.at_least, meta.unit)}")
    if meta.at_most is not None and result > meta.at_most:
        raise ConfigError(f"{what} = {shown(value)}: must be at most {in_unit(meta.at_most, meta.unit)}")


def _pairs(value: object, what: str) -> Pairs:
    """A TOML table of texts, or `key=value,key=value`."""
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(separator for _, separator, _ in parts):
            raise ConfigError(f"{what} = {shown(value)}: expected name=value pairs separated by commas")
        return tuple((key.strip(), text.strip()) for key, _, text in parts)
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ConfigError(f'{what} = {shown(value)}: expected a table of texts, {{ "name" = "value" }}')
    return tuple(value.items())


def _registries(value: object, what: str) -> Registries:
    """A TOML table of tables, or one as text."""
    if isinstance(value, str):
        import tomllib

        try:
            value = tomllib.loads(f"it = {value}" if value.strip() else "it = {}")["it"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f'{what}: expected a TOML table, {{ "registry.example" = {{ rights = "verify" }} }}') from error
    if not isinstance(value, dict):
        raise ConfigError(f'{what}: expected tables; write [mirror.registry."registry.example:5000"] and its settings below it')
    return tuple((_registry_name(name, what), _registry(name, table, f"{what}.{name}")) for name, table in value.items())


def _registry_name(name: str, what: str) -> str:
    if len(name) > 253 or not _REGISTRY.fullmatch(name.lower()):
        raise ConfigError(f"{what}: {shown(name)} names no registry; write host, host:port or *.domain, without http://")
    return name.lower()


def _registry(name: str, table: object, what: str) -> RegistrySettings:
    known = {item.name for item in fields(RegistrySettings)}
    if not isinstance(table, dict):
        raise ConfigError(f"{what}: expected a table of settings")
    for key in table:
        if key not in known:
            raise ConfigError(f"{what}: unknown setting {key}{_nearest(key, sorted(known))}")
    found = _build(RegistrySettings, "", {key: (value, what) for key, value in table.items()})
    if found.endpoint and not _ENDPOINT.fullmatch(found.endpoint):
        raise ConfigError(
            f"{what}: endpoint = {shown(found.endpoint)}: expected http://host:port or https://host:port, no path"
        )
    if name.startswith("*.") and (found.endpoint or found.username or found.credential_helper):
        raise ConfigError(f"{what}: endpoint and credentials belong to one registry; give it a table of its own")
    if bool(found.username) != (found.password_file is not None):
        raise ConfigError(f"{what}: username and password_file go together")
    if found.credential_helper and (found.username or not _PROGRAM.fullmatch(found.credential_helper)):
        raise ConfigError(f"{what}: credential_helper is the end of a program's name (ecr-login), and excludes username")
    for pattern, rights in found.repositories:
        if rights not in ("auto", "public", "verify", "never"):
            raise ConfigError(
                f"{what}: repositories: {shown(pattern)} = {shown(rights)}: must be auto, public, verify or never"
            )
    for host in found.token_hosts:
        _registry_name(host, f"{what}: token_hosts")
    return found


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"{what} = {shown(value)}: expected text in quotes")
    return value


def _path(value: object, what: str) -> Path:
    if isinstance(value, Path):
        return value
    text = _text(value, what)
    if not text:
        raise ConfigError(f"{what} is empty: expected a path")
    return Path(text).expanduser()


def _boolean(value: object, what: str) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise ConfigError(f"{what} = {shown(value)}: expected true or false")
    return words[value.lower()]


def _integer(value: object, what: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        return int(value)
    raise ConfigError(f"{what} = {shown(value)}: expected a whole number")


_READERS: Final[dict[str, Callable[[object, str], object]]] = {
    "duration": parse_duration,
    "size": parse_size,
    "rate": parse_rate,
    "fraction": parse_fraction,
    "listen": lambda value, what: parse_endpoint(value, what, default_port=DEFAULT_PORT, allow_zero=True),
    "endpoint": lambda value, what: parse_endpoint(value, what, default_port=DEFAULT_PORT),
    "str": _text,
    "Path": _path,
    "bool": _boolean,
    "int": _integer,
}


# --- the reference ------------------------------------------------------------------------------------------------


def reference() -> str:
    """`docs/reference/configuration.md`, from the declarations above."""
    lines = [_REFERENCE_HEAD]
    current = None
    for name, kind, meta, default in declared():
        section = name.rpartition(".")[0]
        if section != current:
            current = section
            lines += ["", f"## `[{section}]`" if section else "## Top of the file", ""]
            lines += [section_text(section), ""] if section else []
            lines += ["| setting | default | value | what it does |", "|---|---|---|---|"]
        flag = f" Flag: `{flag_name(name)}`." if has_flag(name) else ""
        key = name.rpartition(".")[2]
        lines.append(
            f"| `{key}` | {_default_text(default, meta)} | {_kind_text(kind, meta)} "
            f"| {meta.text}{flag} `{variable_name(name)}` |"
        )
    return "\n".join([*lines, *_registry_lines()]) + "\n"


def _registry_lines() -> list[str]:
    hints = get_type_hints(RegistrySettings)
    title, *rest = (RegistrySettings.__doc__ or "").strip().splitlines()
    text = " ".join([title, *(line.strip() for line in rest if line.strip())])
    lines = [
        "",
        '## `[mirror.registry."..."]`',
        "",
        text,
        "",
        "| setting | default | value | what it does |",
        "|---|---|---|---|",
    ]
    for item in fields(RegistrySettings):
        meta = item.metadata["swarm"]
        kind = _kind_text(hints[item.name], replace(meta, choices=tuple(choice for choice in meta.choices if choice)))
        lines.append(f"| `{item.name}` | {_default_text(item.default, meta)} | {kind} | {meta.text} |")
    return lines


_REFERENCE_HEAD: Final = """\
# Configuration

Written from `swarm/config.py` by `python -m swarm.config`; a test fails when the two differ.

A setting can stand in a TOML file (`--config FILE`, `SWARM_CONFIG`, else `/etc/swarm/swarm.toml` for root and
`$XDG_CONFIG_HOME/swarm/swarm.toml` for others, where it exists), in an environment variable, or, for some, in a flag.
Flags win over the environment, the environment over the file, the file over the default.

Durations are numbers of seconds or text (`"500ms"`, `"30s"`, `"5m"`, `"2h"`, `"1d"`); sizes are bytes or text (`"512MiB"`
counts in 1024, `"512MB"` in 1000); rates are sizes per second (`"50MiB/s"`) or bits as networks count them
(`"100Mbit/s"`). In a variable, lists are separated by commas. An unknown setting is an error that names the nearest one."""


def _default_text(default: object, meta: Meta) -> str:
    if default is None:
        return "see right"
    if isinstance(default, tuple):
        return ", ".join(f"`{item}`" for item in default) or "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (int, float)):
        return f"`{in_unit(default, meta.unit)}`"
    return f"`{default}`" if str(default) else "none"


def _kind_text(kind: Any, meta: Meta) -> str:
    if meta.unit == "table":
        return "table of texts"
    if meta.unit == "registries":
        return "tables"
    words = {"listen": "host:port", "endpoint": "host:port", "fraction": "share", "": ""}
    word = words.get(meta.unit, meta.unit) or (
        " or ".join(f"`{choice}`" for choice in meta.choices) if meta.choices else _type_word(kind)
    )
    return f"list of {word}" if get_origin(kind) is tuple else word


def _type_word(kind: Any) -> str:
    inner = next((arm for arm in get_args(kind) if arm not in (type(None), Ellipsis)), kind)
    return {"str": "text", "Path": "path", "bool": "true or false", "int": "number", "float": "number"}[inner.__name__]


if __name__ == "__main__":
    print(reference(), end="")
