"""`swarm status` and `swarm peers`."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import data_dir_option, json_option
from cli.output import emit_json, print_fields, print_table
from swarm.control.client import ask
from swarm.places import locate_data_dir
from swarm.quantities import human_duration, human_size


@click.command()
@data_dir_option
@json_option
def status(data_dir: Path | None, as_json: bool) -> None:
    """What the daemon says about itself.

    \b
    Examples:
      swarm status
      swarm status --json
    """
    said = ask(locate_data_dir(data_dir), "status").result
    if as_json:
        emit_json(said)
        return
    network = f"{said['network']} ({'open: no protection' if said['open'] else 'closed'})"
    store = said["store"]
    quota = f" of {human_size(store['quota_bytes'])}" if store["quota_bytes"] else ""
    print_fields(
        [
            ("state", said["state"]),
            ("version", said["version"]),
            ("node", said["node"]),
            ("network", network),
            ("running for", human_duration(said["uptime_seconds"])),
            ("listens on", f"{said['control']} (DHT, control), {said['pieces']} (pieces)"),
            ("http", said["http"] or "off"),
            ("mirror", said.get("mirror") or "off"),
            ("announced as", ", ".join(said["addresses"]) or "nothing yet: no node has told us our address"),
            ("peers", said["peers"]),
            ("dht contacts", said["dht_contacts"]),
            ("tasks", f"{store['complete']} complete, {store['partial']} partial"),
            ("store", f"{human_size(store['bytes'])}{quota}, {human_size(store['free_bytes'])} free on {said['data_dir']}"),
            ("received", f"{human_size(said['from_peers'])} from peers, {human_size(said['from_origin'])} from origins"),
            ("sent", human_size(said["sent"])),
            *(("problem", problem) for problem in said["problems"]),
        ]
    )


@click.command()
@data_dir_option
@json_option
def peers(data_dir: Path | None, as_json: bool) -> None:
    """Nodes this one is connected to.

    \b
    Examples:
      swarm peers
    """
    found = ask(locate_data_dir(data_dir), "peers").result["peers"]
    if as_json:
        emit_json(found)
        return
    rows = [[p["node"], p["address"], human_size(p["received"]), human_size(p["sent"])] for p in found]
    print_table(["NODE", "ADDRESS", "RECEIVED", "SENT"], rows, right=frozenset({2, 3}))
