"""`swarm mirror`: make container runtimes ask the mirror first, and undo that."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cli.options import json_option
from cli.output import emit_json, printable
from swarm import private_files
from swarm.errors import ConfigError

if TYPE_CHECKING:
    from swarm.mirror.setup import Change, Found, Plan, Runtime

DEFAULT_MIRROR: Final = "http://127.0.0.1:7402"
MAX_FILE_BYTES: Final = 1 << 20
"""Protects from reading what is no file of settings."""

_RECORD: Final = "swarm-mirror.json"
_BACKUP: Final = ".before-swarm"
_CERTIFICATES: Final = frozenset({".crt", ".cert", ".key"})


def _targets(command: Callable[..., Any]) -> Callable[..., Any]:
    path = click.Path(path_type=Path)
    for name, metavar, text in (
        ("--docker", "FILE", "Docker's daemon.json (Docker Hub only)."),
        ("--podman", "FILE", "A registries.conf, better a file of its own in registries.conf.d: podman, CRI-O, skopeo."),
        ("--containerd", "DIR", "containerd's certs.d, which its config_path names."),
    ):
        command = click.option(name, type=path, metavar=metavar, help=text)(command)
    return command


@click.group()
def mirror() -> None:
    """Make container runtimes pull through this node.

    \b
    Examples:
      swarm daemon --mirror 127.0.0.1:7402 ...
      swarm mirror configure --containerd /etc/containerd/certs.d
      swarm mirror unconfigure --containerd /etc/containerd/certs.d
    """


@mirror.command()
@_targets
@click.option("--mirror", "url", default=DEFAULT_MIRROR, show_default=True, metavar="URL", help="Where the mirror listens.")
@click.option(
    "--registry",
    "registries",
    multiple=True,
    metavar="NAME",
    help="A registry to pull through it, as in references to images; http://NAME if it has no TLS. May be repeated. "
    "[default: all for containerd, docker.io for podman]",
)
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@json_option
def configure(
    containerd: Path | None,
    podman: Path | None,
    docker: Path | None,
    url: str,
    registries: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make runtimes ask the mirror first, and their registry when the mirror fails.

    Prints what it changes.  What a file held before is kept beside it (*.before-swarm).  Saying it again changes nothing;
    saying it with other registries replaces the earlier ones.  What it does not understand it leaves alone.

    \b
    Examples:
      swarm mirror configure --containerd /etc/containerd/certs.d
      swarm mirror configure --containerd /etc/containerd/certs.d --registry http://registry.lan:5000
      swarm mirror configure --podman /etc/containers/registries.conf.d/50-swarm.conf --registry quay.io
      swarm mirror configure --docker /etc/docker/daemon.json --dry-run
    """
    from swarm.mirror.setup import Wanted, plan_configure

    wanted = Wanted.parse(url, registries)
    places = _places(containerd, podman, docker)
    _carry_out(places, lambda place, found: plan_configure(place.runtime, place.name, wanted, found), dry_run, as_json)


@mirror.command()
@_targets
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@json_option
def unconfigure(containerd: Path | None, podman: Path | None, docker: Path | None, dry_run: bool, as_json: bool) -> None:
    """Put back what `configure` changed, byte for byte.

    From a file that somebody edited since, only the mirror is taken out, and the copy of what it held before stays.

    \b
    Example:
      swarm mirror unconfigure --containerd /etc/containerd/certs.d
    """
    from swarm.mirror.setup import plan_unconfigure

    places = _places(containerd, podman, docker)
    _carry_out(places, lambda place, found: plan_unconfigure(place.runtime, found), dry_run, as_json)


@dataclass(frozen=True, slots=True)
class _Place:
    """Settings on disk.

    Attributes:
        root: The directory below which files are named.
        name: The file in it; empty for containerd, which has many.
    """

    runtime: Runtime
    root: Path
    name: str = ""

    @property
    def record(self) -> Path:
        return self.root / (f"{self.name}.{_RECORD}" if self.name else _RECORD)

    @property
    def lockable(self) -> Path:
        """A directory that exists."""
        return self.root if self.name else self.root.parent

    def backup(self, path: str) -> Path:
        return self.root / f"{path}{_BACKUP}"


def _places(containerd: Path | None, podman: Path | None, docker: Path | None) -> list[_Place]:
    from swarm.mirror.setup import Runtime

    places = []
    if containerd is not None:
        places.append(_Place(Runtime.CONTAINERD, Path(os.path.realpath(containerd))))
    for runtime, file in ((Runtime.PODMAN, podman), (Runtime.DOCKER, docker)):
        if file is not None:
            places.append(_Place(runtime, Path(os.path.realpath(file.parent)), file.name))
    if not places:
        raise ConfigError("say whose settings: --containerd DIR, --podman FILE or --docker FILE")
    for place in places:
        if not place.lockable.is_dir():
            raise ConfigError(f"there is no directory {place.lockable}; is {place.runtime.value} installed here?")
    return places


def _carry_out(places: Sequence[_Place], plan: Callable[[_Place, Found], Plan], dry_run: bool, as_json: bool) -> None:
    """Plan for all, then write for all: what is refused for one changes none."""
    with ExitStack() as locks:
        if not dry_run:
            # In one order, so that two of us cannot wait for each other.
            for directory in sorted({place.lockable for place in places}):
                locks.enter_context(private_files.locked(directory))
        try:
            planned = [(place, found, plan(place, found)) for place in places for found in [_look(place)]]
            if not dry_run:
                for place, found, it in planned:
                    _write(place, found, it)
        except OSError as error:
            raise ConfigError(f"cannot change {error.filename}: {error.strerror}") from error
    _tell([(place, it) for place, _, it in planned], dry_run, as_json)


# --- reading --------------------------------------------------------------------------------------------------------


def _look(place: _Place) -> Found:
    from swarm.mirror.setup import HOSTS_FILE, Found, Record

    files: dict[str, bytes] = {}
    directories, certificates = set(), set()
    if place.name:
        _read_into(files, place.root, place.name)
    elif place.root.is_dir():
        directories.add("")
        for directory in sorted(it for it in place.root.iterdir() if it.is_dir()):
            directories.add(directory.name)
            _read_into(files, place.root, f"{directory.name}/{HOSTS_FILE}")
            if any(it.suffix in _CERTIFICATES for it in directory.iterdir()):
                certificates.add(directory.name)
    record, originals = None, {}
    encoded = _read(place.record)
    if encoded is not None:
        try:
            record = Record.decode(encoded)
        except ConfigError as error:
            raise ConfigError(f"{place.record}: {error}; remove it, and take the mirror out by hand") from error
        kept = {path: _read(place.backup(path)) for path in record.files}
        originals = {path: content for path, content in kept.items() if content is not None}
    present = frozenset(directories | {""}) if place.name else frozenset(directories)
    return Found(files, record, originals, present, frozenset(certificates))


def _read_into(files: dict[str, bytes], root: Path, name: str) -> None:
    content = _read(root / name)
    if content is not None:
        files[name] = content


def _read(path: Path) -> bytes | None:
    """`None`: there is none."""
    if path.is_symlink():
        raise ConfigError(f"{path} is a symbolic link; name the file it leads to, or change it where it is made")
    try:
        return private_files.read_public(path, max_bytes=MAX_FILE_BYTES)
    except FileNotFoundError:
        return None


# --- writing --------------------------------------------------------------------------------------------------------


def _write(place: _Place, found: Found, plan: Plan) -> None:
    """Copies and record first, and away last: whenever we are stopped, `unconfigure` knows the way back."""
    if plan.record is not None:
        for directory in sorted(plan.record.directories):
            (place.root / directory).mkdir(mode=0o755, exist_ok=True)
        for path, original in plan.originals.items():
            if original is not None and found.originals.get(path) != original:
                private_files.replace(place.backup(path), original, _mode(place.root / path))
        if plan.record != found.record:
            private_files.replace(place.record, plan.record.encode(), 0o644)
    for change in plan.changes:
        _write_file(place.root / change.path, change)
    _remove_what_is_over(place, found, plan)


def _write_file(path: Path, change: Change) -> None:
    if change.after is None:
        path.unlink(missing_ok=True)
        return
    before = path.stat() if change.before is not None else None
    private_files.replace(path, change.after, 0o644 if before is None else before.st_mode & 0o777)
    if before is not None and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(path, before.st_uid, before.st_gid)


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _remove_what_is_over(place: _Place, found: Found, plan: Plan) -> None:
    after = {**found.files, **{change.path: change.after for change in plan.changes}}
    for path, original in found.originals.items():
        # A copy stays where an edited file keeps others from being what it was.
        if path not in plan.originals and after.get(path) == original:
            place.backup(path).unlink(missing_ok=True)
    if plan.record is None:
        place.record.unlink(missing_ok=True)
    for directory in sorted(plan.directories, reverse=True):
        made = place.root / directory
        if made.is_dir() and not any(made.iterdir()):
            made.rmdir()


# --- telling --------------------------------------------------------------------------------------------------------


def _tell(planned: Sequence[tuple[_Place, Plan]], dry_run: bool, as_json: bool) -> None:
    notes = [note for place, plan in planned for note in _notes(place, plan)]
    if as_json:
        files = [
            {"path": str(place.root / change.path), "change": _kind(change)}
            for place, plan in planned
            for change in plan.changes
        ]
        emit_json({"dry_run": dry_run, "files": files, "notes": notes})
        return
    for place, plan in planned:
        for change in plan.changes:
            for line in _difference(place.root / change.path, change):
                print(printable(line))
    if not any(plan.changes for _, plan in planned):
        print("nothing to change")
    for note in notes:
        print(f"# {printable(note)}")
    if dry_run:
        print("# --dry-run: nothing was written")


def _notes(place: _Place, plan: Plan) -> Iterator[str]:
    from swarm.mirror.setup import Runtime, advice

    yield from plan.notes
    if plan.changes:
        config = place.root.parent / "config.toml" if place.runtime is Runtime.CONTAINERD else None
        yield advice(place.runtime, str(place.root), _read_if_possible(config))


def _read_if_possible(path: Path | None) -> bytes | None:
    """What only advice depends on."""
    try:
        return None if path is None else _read(Path(os.path.realpath(path)))
    except ConfigError:
        return None


def _kind(change: Change) -> str:
    if change.before is None:
        return "created"
    return "removed" if change.after is None else "changed"


def _difference(path: Path, change: Change) -> Iterator[str]:
    before, after = ([] if it is None else it.decode(errors="replace").splitlines() for it in (change.before, change.after))
    old, new = ("/dev/null" if it is None else str(path) for it in (change.before, change.after))
    return difflib.unified_diff(before, after, old, new, lineterm="")
