"""libtorrent as one program per host, for the comparison that `make bench` makes in the same run.

It is given its best case: every peer's address from the start (no tracker, DHT or discovery to wait for), TCP only
(uTP costs three times as much), clear bytes, v1 torrents (SHA-1 per piece), nothing synced.  A process opens its session, says
``ready``, starts at the first line on its standard input, says ``done`` with its figures, and goes on uploading until
its standard input ends; then it says what it uploaded.

    python -m tests.benchmarks.torrent make FILE PIECE_BYTES TORRENT
    python -m tests.benchmarks.torrent run TORRENT DIRECTORY ADDRESS:PORT [PEER:PORT...]
"""

from __future__ import annotations

import importlib
import json
import resource
import select
import sys
import time
from pathlib import Path
from typing import Any, Final

TIMEOUT: Final = 600.0  # seconds after which a run gives up: no process of a broken run stays

SETTINGS: Final = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_outgoing_utp": False,
    "enable_incoming_utp": False,
    # Two hosts of one benchmark may share an address (loopback).
    "allow_multiple_connections_per_ip": True,
    "connection_speed": 200,
}


def _libtorrent() -> Any:
    """The library of requirements/bench.txt, which nothing but this benchmark needs."""
    return importlib.import_module("libtorrent")


def make(file: Path, piece_bytes: int, torrent: Path) -> None:
    """Write the torrent of one file."""
    lt = _libtorrent()
    made = lt.create_torrent([lt.create_file_entry(file.name, file.stat().st_size)], piece_bytes, lt.create_torrent.v1_only)
    lt.set_piece_hashes(made, str(file.parent))
    torrent.write_bytes(lt.bencode(made.generate()))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _say(kind: str, **figures: float) -> None:
    print(json.dumps({"event": kind, **figures}), flush=True)


def _has_input() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def run(torrent: Path, directory: Path, listen: str, peers: list[str]) -> None:
    """Download (or, where the file lies in `directory` already, seed) until standard input ends."""
    lt = _libtorrent()
    alerts = lt.alert.category_t.status_notification | lt.alert.category_t.storage_notification
    session = lt.session({**SETTINGS, "listen_interfaces": listen, "alert_mask": alerts})
    parameters = lt.load_torrent_file(str(torrent))
    parameters.save_path = str(directory)
    # The seed's file is trusted: hashing it again is not part of what is compared.
    if (directory / parameters.ti.name()).exists():
        parameters.flags |= lt.torrent_flags.seed_mode
    _say("ready")
    sys.stdin.readline()
    began, cpu = time.time(), _cpu()
    handle = session.add_torrent(parameters)
    for peer in peers:
        address, _, port = peer.rpartition(":")
        handle.connect_peer((address, int(port)))
    deadline = time.monotonic() + TIMEOUT
    while not handle.status().is_seeding:
        if time.monotonic() > deadline:
            raise SystemExit("the torrent did not finish in time")
        session.wait_for_alert(50)
        session.pop_alerts()
    # Verified pieces may still be in its write cache; a download is done when they are in the file.
    handle.flush_cache()
    _wait_flushed(session, deadline)
    _say("done", began=began, ended=time.time())
    while not _has_input() and time.monotonic() < deadline:
        session.wait_for_alert(200)
        session.pop_alerts()
    _say("end", cpu=_cpu() - cpu, uploaded=handle.status().total_payload_upload)


def _wait_flushed(session: Any, deadline: float) -> None:
    while time.monotonic() < deadline:
        session.wait_for_alert(50)
        if any(alert.what() == "cache_flushed" for alert in session.pop_alerts()):
            return
    raise SystemExit("the torrent was not written in time")


def main() -> None:
    match sys.argv[1:]:
        case ["make", file, piece_bytes, torrent]:
            make(Path(file), int(piece_bytes), Path(torrent))
        case ["run", torrent, directory, listen, *peers]:
            run(Path(torrent), Path(directory), listen, peers)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
