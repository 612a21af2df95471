"""`swarm task`: what the store holds."""

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
def task() -> None:
    """What the store holds, and what is going on with it.

    A task goes by its id, the first digits of it, its digest, or its URL.

    \b
    Examples:
      swarm task ls
      swarm task show 3f9ac2
      swarm task pin sha256:9f86d081884c7d65...
    """


@task.command("ls")
@data_dir_option
@json_option
def list_tasks(data_dir: Path | None, as_json: bool) -> None:
    """List tasks, the latest used first."""
    tasks = sorted(ask(locate_data_dir(data_dir), "tasks").result["tasks"], key=lambda row: -row["last_used"])
    if as_json:
        emit_json(tasks)
        return
    rows = [
        [
            row["task"][:12],
            row["state"] + (" pinned" if row["pinned"] else "") + (" private" if row["private"] else ""),
            human_size(row["bytes"]) if row["bytes"] is not None else "?",
            f"{row['held']}/{row['pieces']}" if row["pieces"] is not None else str(row["held"]),
            ago(row["last_used"]),
            row["url"] or row["digest"] or "",
        ]
        for row in tasks
    ]
    print_table(["TASK", "STATE", "SIZE", "PIECES", "USED", "CONTENT"], rows, right=frozenset({2, 3, 4}))


@task.command("show")
@click.argument("name", metavar="TASK")
@data_dir_option
@json_option
def show(name: str, data_dir: Path | None, as_json: bool) -> None:
    """Show one task: what is held, who gives and takes, and why the origin was read."""
    shown = ask(locate_data_dir(data_dir), "task", {"name": name}).result
    if as_json:
        emit_json(shown)
        return
    print_fields(list(_fields(shown)))
    peers = shown.get("activity", {}).get("peers", [])
    if peers:
        print()
        rows = [[p["node"][:12], str(p["holds"]), human_size(p["received"]), human_size(p["sent"])] for p in peers]
        print_table(["NODE", "HOLDS", "RECEIVED", "SENT"], rows, right=frozenset({1, 2, 3}))


def _fields(shown: dict[str, Any]) -> list[tuple[str, object]]:
    fields: list[tuple[str, object]] = [("task", shown["task"]), ("state", shown["state"])]
    fields += [(name, shown[name]) for name in ("url", "digest", "tag", "application") if shown[name]]
    if shown["bytes"] is not None:
        fields.append(("size", f"{human_size(shown['bytes'])} ({shown['bytes']} bytes)"))
        fields.append(("pieces", f"{shown['held']} of {shown['pieces']}, {human_size(shown['piece_bytes'])} each"))
    fields.append(("on disk", human_size(shown["bytes_on_disk"])))
    fields += [(name, "yes") for name in ("pinned", "private", "in_use") if shown[name]]
    fields += [("created", f"{ago(shown['created'])} ago"), ("last used", f"{ago(shown['last_used'])} ago")]
    last = shown.get("last_fetch")
    if last is not None:
        sources = f"{human_size(last['from_peers'])} from peers, {human_size(last['from_origin'])} from the origin"
        fields.append(("last fetch", f"{human_duration(last['seconds'])}, {sources}"))
    why = (shown.get("activity") or last or {}).get("why_origin") or (last or {}).get("why_origin")
    if why:
        fields.append(("origin read because", ", ".join(f"{reason} ({count})" for reason, count in sorted(why.items()))))
    return fields


@task.command("pin")
@click.argument("name", metavar="TASK")
@data_dir_option
@json_option
def pin(name: str, data_dir: Path | None, as_json: bool) -> None:
    """Keep a task: it is not evicted until unpinned."""
    _change("pin", "pinned", name, data_dir, as_json)


@task.command("unpin")
@click.argument("name", metavar="TASK")
@data_dir_option
@json_option
def unpin(name: str, data_dir: Path | None, as_json: bool) -> None:
    """Let a task be evicted again."""
    _change("unpin", "unpinned", name, data_dir, as_json)


@task.command("rm")
@click.argument("name", metavar="TASK")
@data_dir_option
@json_option
def remove(name: str, data_dir: Path | None, as_json: bool) -> None:
    """Withdraw a task and delete its content; refused while it is in use."""
    _change("rm", "removed", name, data_dir, as_json)


def _change(operation: str, done: str, name: str, data_dir: Path | None, as_json: bool) -> None:
    result = ask(locate_data_dir(data_dir), operation, {"name": name}).result
    if as_json:
        emit_json(result)
    else:
        print(f"{done} {result['task'][:12]}")
