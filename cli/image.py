"""`swarm image`: container images through the swarm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import data_dir_option, json_option
from cli.output import ago, emit_json, print_fields, print_table
from swarm.control.client import ask
from swarm.places import locate_data_dir
from swarm.quantities import human_duration, human_size


@click.group()
def image() -> None:
    """Container images and other OCI artifacts, through a daemon that runs with --mirror.

    \b
    Examples:
      swarm image pull alpine:3
      swarm image pull registry.example:5000/team/app@sha256:9f86d081884c7d65...
      swarm image ls
    """


@image.command("pull")
@click.argument("name", metavar="REF")
@click.option("--platform", metavar="OS/ARCH", help="Image of an index to pull, or all [default: that of this machine].")
@data_dir_option
@json_option
def pull(name: str, platform: str | None, data_dir: Path | None, as_json: bool) -> None:
    """Fetch a whole image into the swarm, and say where each layer came from.

    Runtimes that pull it afterwards, here or through any member, find it there.
    """
    result = ask(locate_data_dir(data_dir), "image-pull", {"image": name, "platform": platform}).result
    if as_json:
        emit_json(result)
        return
    rows = [
        [
            row["digest"][:19],
            human_size(row["bytes"]),
            *(human_size(row[key]) if row[key] else "-" for key in ("from_peers", "from_origin", "from_local")),
            human_duration(row["seconds"]),
        ]
        for row in result["blobs"]
    ]
    print_table(["BLOB", "SIZE", "PEERS", "REGISTRY", "HERE", "TOOK"], rows, right=frozenset({1, 2, 3, 4, 5}))
    print()
    print_fields(list(_summary(result)))


def _summary(result: dict[str, Any]) -> list[tuple[str, object]]:
    fields: list[tuple[str, object]] = [("image", result["image"]), ("digest", result["digest"])]
    if result["platforms"]:
        fields.append(("for", ", ".join(result["platforms"])))
    return [*fields, ("size", human_size(result["bytes"])), ("took", human_duration(result["seconds"]))]


@image.command("ls")
@data_dir_option
@json_option
def list_images(data_dir: Path | None, as_json: bool) -> None:
    """List images that were asked for by tag, the latest first, and how much of each is here."""
    images = ask(locate_data_dir(data_dir), "images").result["images"]
    if as_json:
        emit_json(images)
        return
    rows = [
        [
            row["image"],
            row["digest"][:19],
            human_size(row["bytes"]) if row["blobs"] else "?",
            f"{row['blobs_here']}/{row['blobs']}" if row["blobs"] else "-",
            ago(row["asked"]),
        ]
        for row in images
    ]
    print_table(["IMAGE", "DIGEST", "SIZE", "BLOBS HERE", "ASKED"], rows, right=frozenset({2, 3, 4}))
