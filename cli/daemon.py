"""`swarm daemon`: run a node until told to stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cli.options import config_option, data_dir_option, join_option, network_options

if TYPE_CHECKING:
    from swarm.config import Settings

SIGNAL_EXIT: Final = 128
"""A process ended by signal N exits with 128 + N, as shells say it."""


@click.command(context_settings={"max_content_width": 110})
@config_option
@data_dir_option
@click.option(
    "--listen", metavar="H:P", help="DHT and peer control [default: [::]:7400 in a closed network, else 127.0.0.1:7400]."
)
@click.option(
    "--advertise", multiple=True, metavar="H", help="Address to announce instead of the one others see; may be repeated."
)
@join_option
@network_options
@click.option("--mirror", metavar="H:P", help="Registry mirror for container runtimes, as 127.0.0.1:7402 [default: off].")
@click.option("--http", metavar="H:P", help="Metrics, health, read-only views; off for nowhere [default: 127.0.0.1:7403].")
@click.option("--seed", is_flag=True, default=None, help="Announce complete content as a seed, which means to keep serving.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least severity logged [default: info]."
)
@click.option(
    "--log-format", type=click.Choice(["auto", "json", "text"]), help="[default: text on a terminal, else JSON lines]."
)
@click.option("--ready-fd", type=click.IntRange(min=0), metavar="N", help="Write one JSON line to this descriptor when ready.")
def daemon(
    config: Path | None,
    data_dir: Path | None,
    listen: str | None,
    advertise: tuple[str, ...],
    join: tuple[str, ...],
    network: Path | None,
    open_network: str | None,
    mirror: str | None,
    http: str | None,
    seed: bool | None,
    log_level: str | None,
    log_format: str | None,
    ready_fd: int | None,
) -> int:
    """Run a node: find holders, exchange pieces, answer commands, until SIGTERM or Ctrl-C.

    The first SIGTERM stops taking work, lets running transfers end (30 s, setting `drain`), withdraws what was
    announced and exits with 0; the second ends at once.  With systemd, use Type=notify.

    \b
    Examples:
      swarm daemon                                        a node for this machine only
      swarm daemon --network /etc/swarm/network --join swarm.example.com
      swarm daemon --open-network lab --listen '[::]:7400' --join 10.0.0.7
    """
    from swarm.config import load

    _import_structlog_alone()
    from swarm.logs import configure

    settings = load(
        file=config,
        flags={
            "data_dir": data_dir,
            "network.listen": listen,
            "network.advertise": list(advertise) or None,
            "network.join": list(join) or None,
            "network.directory": network,
            "network.open": open_network,
            "mirror.listen": mirror,
            "http.listen": http,
            "seed": seed,
            "log.level": log_level,
            "log.format": log_format,
        },
    )
    configure(settings.log.level, settings.log.format)
    os.umask(0o077)  # what a daemon writes is its own
    import trio

    from swarm.daemon import flatten

    with flatten():
        trio.run(_run, settings, ready_fd)
    return 0


def _import_structlog_alone() -> None:
    """structlog imports rich, where it is installed, to colour tracebacks: 3 MiB and 30 ms that a daemon has no use for."""
    if "rich" in sys.modules or "structlog" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # documented: an import of it now fails
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]


async def _run(settings: Settings, ready_fd: int | None) -> None:
    import trio

    from swarm.daemon import Stop, run_node

    stop = Stop()

    def ready(status: dict[str, Any]) -> None:
        notify("READY=1")
        if ready_fd is not None:
            with contextlib.suppress(OSError), os.fdopen(ready_fd, "w") as stream:  # whoever waited may be gone
                stream.write(json.dumps(status) + "\n")

    with _received(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, received, stop)
            await run_node(settings, stop=stop, ready=ready)
            nursery.cancel_scope.cancel()


def _received(*signals: signal.Signals) -> contextlib.AbstractContextManager[Any]:
    import trio

    return trio.open_signal_receiver(*signals)


async def _obey(received: Any, stop: Any) -> None:
    """The first signal stops in order; the second ends the process: what is verified is safe in the store at any moment."""
    import structlog

    log = structlog.get_logger(__name__)
    async for number in received:
        if number == signal.SIGHUP:
            log.info("network files are looked at every few seconds; other settings need a restart", signal="SIGHUP")
            continue
        if stop.asked.is_set():
            log.warning("ending at once", signal=signal.Signals(number).name)
            os._exit(SIGNAL_EXIT + number)
        log.info("stopping", signal=signal.Signals(number).name)
        notify("STOPPING=1")
        stop.ask()


def notify(state: str) -> None:
    """Tell systemd (or whoever set NOTIFY_SOCKET); see sd_notify(3).  Nobody listening is no error."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), address)
