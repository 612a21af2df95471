"""`swarm fetch`: the daemon downloads and hands over a descriptor, the command writes the file as its own user."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from cli.options import config_option, data_dir_option, join_option, json_option
from cli.output import emit_json
from swarm.control.client import Answer, Arriving, DaemonWentAway, ask
from swarm.errors import ConfigError, DaemonUnreachable, Interrupted, StoreBusy

if TYPE_CHECKING:
    from cli.embedded import EmbeddedNode

TAKE_OVERS: Final = 3
"""How often a command goes on alone after the node it waited for went away."""

OPENING_SECONDS: Final = 10.0
"""How long a node that holds the store's lock may take to open its control socket."""


@click.command(context_settings={"max_content_width": 110})
@click.argument("url", metavar="URL|DIGEST")
@click.option("-o", "--output", required=True, metavar="PATH", help="File to write; - for standard output.")
@click.option("--digest", metavar="D", help="What the content must be: sha256:... or sha512:... .")
@click.option("--immutable", is_flag=True, help="The URL's content never changes: share it even without ETag.")
@click.option("--header", "headers", multiple=True, metavar="'K: V'", help="Header for the origin (only); may be repeated.")
@click.option("--share", is_flag=True, help="Share with other nodes although credentials were given.")
@click.option("--tag", default="", metavar="T", help="Keeps content of one URL apart.")
@click.option("--application", default="", metavar="A", help="Keeps content of one URL apart, by application.")
@click.option(
    "--range", "byte_range", metavar="A-B", help="Only bytes A to B, both included, counted from 0; B may be missing."
)
@click.option("--no-origin", is_flag=True, help="Only from other nodes.")
@click.option("--embedded", is_flag=True, help="Run a node inside this command even if a daemon might be running.")
@config_option
@data_dir_option
@join_option
@click.option("--overwrite", is_flag=True, help="Replace PATH if it exists.")
@click.option("--hard-link", is_flag=True, help="Link to the store's copy where possible: no second copy, read-only.")
@json_option
@click.option("--progress/--no-progress", default=None, help="Show progress [default: on a terminal].")
def fetch(
    url: str,
    output: str,
    digest: str | None,
    headers: tuple[str, ...],
    byte_range: str | None,
    embedded: bool,
    config: Path | None,
    data_dir: Path | None,
    join: tuple[str, ...],
    overwrite: bool,
    hard_link: bool,
    as_json: bool,
    progress: bool | None,
    **plain: Any,
) -> None:
    """Get URL through the swarm and write it to PATH.

    The running daemon does the work; with none running, this command runs a node itself and leaves when done.
    Interrupted, it leaves no half file, and the same command again resumes.

    \b
    Examples:
      swarm fetch https://example.com/model.bin -o model.bin
      swarm fetch https://example.com/model.bin -o model.bin --digest sha256:9f86d081884c7d65...
      swarm fetch https://example.com/private.bin -o private.bin --header 'Authorization: Bearer ...'
      swarm fetch sha256:9f86d081884c7d65... -o model.bin --join 10.0.0.7:7400
    """
    from swarm.export import Export, check_target

    if output == "-" and as_json:
        raise ConfigError("--json and -o - both want standard output: give a file to one of them")
    target = Path(output)
    check_target(target, overwrite=overwrite)
    parameters = {**plain, **_what(url, digest), "headers": [_header(text) for text in headers], "range": _range(byte_range)}
    with (
        _termination_as_interrupt(),
        _display(progress, as_json) as display,
        Export(target, overwrite=overwrite) as export,
    ):
        parameters["progress"] = display is not None
        ways = _Ways(display, None if hard_link or output == "-" else export)
        answer = _ask(parameters, ways, config=config, data_dir=data_dir, join=join, embedded=embedded)
        try:
            stored = answer.result["store_path"]
            export.finish(
                answer.fd,
                name=answer.result["task"],
                expect_length=answer.result["bytes"],
                hard_link_from=Path(stored) if hard_link and stored else None,
            )
        finally:
            answer.close()
    _report(answer.result, target, as_json)


class _Ways(NamedTuple):
    """What is told while a fetch runs."""

    display: Callable[[dict[str, Any]], None] | None
    arriving: Arriving | None


def _what(url: str, digest: str | None) -> dict[str, Any]:
    """A digest alone may stand for a URL: then other nodes are the only source."""
    if url.startswith(("sha256:", "sha512:")):
        if digest not in (None, url):
            raise ConfigError(f"two different digests: {url} and --digest {digest}")
        return {"url": None, "digest": url}
    return {"url": url, "digest": digest}


def _header(text: str) -> list[str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ConfigError("a header is missing its colon; write --header 'Name: value'")  # not shown: it may be a secret
    return [name.strip(), value.strip()]


def _range(text: str | None) -> list[int | None] | None:
    """`A-B` (both included, as in HTTP) to a half-open pair."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,18})-([0-9]{0,18})", text)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise ConfigError(f"--range {text[:80]}: write FIRST-LAST, both counted from 0 and included, or FIRST-")
    first, last = match[1], match[2]
    return [int(first), int(last) + 1 if last else None]


def _ask(
    parameters: dict[str, Any],
    ways: _Ways,
    *,
    config: Path | None,
    data_dir: Path | None,
    join: tuple[str, ...],
    embedded: bool,
) -> Answer:
    """The running node's answer; where none runs, that of one run here."""
    from swarm.places import locate_data_dir

    if config is None and not embedded:
        directory = locate_data_dir(data_dir)
        for _ in range(TAKE_OVERS):
            try:
                return ask(directory, "fetch", parameters, ways.display, ways.arriving)
            except DaemonWentAway:
                continue
            except DaemonUnreachable:
                break
    return _ask_here(parameters, ways, config=config, data_dir=data_dir, join=join, embedded=embedded)


def _ask_here(
    parameters: dict[str, Any],
    ways: _Ways,
    *,
    config: Path | None,
    data_dir: Path | None,
    join: tuple[str, ...],
    embedded: bool,
) -> Answer:
    """Run a node in this process; if another command's node was faster, use that one, and take over when it leaves."""
    from cli.embedded import EmbeddedNode
    from swarm.config import load
    from swarm.control.api import fetch_request

    fetch_request(parameters)  # what cannot be fetched needs no node to say so
    settings = load(file=config, flags={"data_dir": data_dir, "network.join": list(join) or None})
    deadline = time.monotonic() + OPENING_SECONDS
    while True:
        try:
            if not embedded:
                return ask(settings.directory, "fetch", parameters, ways.display, ways.arriving)
        except DaemonWentAway:
            deadline = time.monotonic() + OPENING_SECONDS  # it was there: whoever is next has its own time to open
        except DaemonUnreachable:
            pass
        try:
            with EmbeddedNode(settings) as node:
                return _ask_own(node, settings.directory, parameters, ways)
        except StoreBusy:
            if embedded or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _ask_own(node: EmbeddedNode, directory: Path, parameters: dict[str, Any], ways: _Ways) -> Answer:
    try:
        return ask(directory, "fetch", parameters, ways.display, ways.arriving)
    except DaemonUnreachable:
        node.check()  # what ended our own node says more than that it is gone
        raise


def _report(result: dict[str, Any], target: Path, as_json: bool) -> None:
    names = ("task", "digest", "bytes", "seconds", "from_origin", "from_peers", "from_local")
    if as_json:
        emit_json({**{name: result[name] for name in names}, "path": str(target)})
    elif str(target) != "-" and sys.stderr.isatty():
        from swarm.quantities import human_duration, human_size

        sources = ", ".join(
            f"{human_size(result[key])} from {word}"
            for key, word in (("from_peers", "peers"), ("from_origin", "the origin"), ("from_local", "this node's store"))
            if result[key]
        )
        print(
            f"{target}: {human_size(result['bytes'])} in {human_duration(result['seconds'])} ({sources or 'empty'})",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _display(wanted: bool | None, as_json: bool) -> Iterator[Any]:
    """Called with each progress object, or `None` for a quiet fetch."""
    if wanted is None:
        wanted = sys.stderr.isatty() and not as_json
    if not wanted:
        yield None
        return
    from cli.progress import FetchProgress

    with FetchProgress() as display:
        yield display


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM leaves as cleanly as Ctrl-C; both end as `Interrupted`."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; what was verified is kept, and the same command resumes") from error
    finally:
        signal.signal(signal.SIGTERM, previous)
