"""What a node says about itself, as JSON: the same objects on the control socket, over HTTP, and in `--json` output."""

from __future__ import annotations

from typing import Any

from swarm.download.request import Fetched, Progress, TaskActivity
from swarm.edges import Entry
from swarm.errors import ConfigError, SwarmError

MIN_PREFIX_DIGITS = 4
"""Fewer digits of a task id name too many tasks to be what somebody meant."""


class NoSuchTask(SwarmError):
    """Nothing in the store goes by this name."""


def progress_view(progress: Progress) -> dict[str, Any]:
    return {
        "task": progress.task_id.hex(),
        "phase": progress.phase,
        "bytes": progress.length,
        "done": progress.done,
        "from_peers": progress.from_peers,
        "from_origin": progress.from_origin,
        "from_local": progress.from_local,
        "peers": progress.peers,
    }


def fetched_view(fetched: Fetched) -> dict[str, Any]:
    return {
        "task": fetched.task_id.hex(),
        "digest": str(fetched.digest) if fetched.digest is not None else None,
        "bytes": fetched.length,
        "seconds": round(fetched.seconds, 3),
        "from_origin": fetched.from_origin,
        "from_peers": fetched.from_peers,
        "from_local": fetched.from_local,
        "peers": fetched.peers,
        "why_origin": dict(fetched.why_origin),
    }


def task_view(entry: Entry, activity: TaskActivity | None = None, last: Fetched | None = None) -> dict[str, Any]:
    """One task of the store, with what it is doing now and how its last fetch went, where there is such."""
    geometry = entry.geometry
    view: dict[str, Any] = {
        "task": entry.task.id.hex(),
        "url": entry.task.url or None,
        "digest": str(entry.digest) if entry.digest is not None else None,
        "state": "complete" if entry.complete else "fetching" if activity is not None else "partial",
        "bytes": geometry.length if geometry is not None else None,
        "piece_bytes": geometry.piece_length if geometry is not None else None,
        "pieces": geometry.piece_count if geometry is not None else None,
        "held": entry.held,
        "bytes_on_disk": entry.bytes_on_disk,
        "pinned": entry.pinned,
        "in_use": entry.in_use,
        "private": entry.private,
        "created": entry.created,
        "last_used": entry.last_used,
        "tag": entry.tag,
        "application": entry.application,
    }
    if activity is not None:
        view["activity"] = activity_view(activity)
    if last is not None:
        view["last_fetch"] = fetched_view(last)
    return view


def activity_view(activity: TaskActivity) -> dict[str, Any]:
    return {
        "task": activity.task_id.hex(),
        "state": activity.state,
        "bytes": activity.length,
        "pieces": activity.piece_count,
        "held": activity.held,
        "from_origin": activity.from_origin,
        "from_peers": activity.from_peers,
        "why_origin": dict(activity.why_origin),
        "peers": [
            {"node": node, "holds": holds, "received": received, "sent": sent} for node, holds, received, sent in activity.peers
        ],
    }


def _names(entry: Entry) -> set[str]:
    names = {entry.task.id.hex(), entry.task.url}
    return names | {str(entry.digest)} if entry.digest is not None else names


def find_entry(entries: list[Entry], name: str) -> Entry:
    """The entry somebody means: a task id or the beginning of one, a digest, or a URL.

    Raises:
        NoSuchTask: None.
        ConfigError: More than one, or too short to say.
    """
    wanted = name.strip()
    exact = [entry for entry in entries if wanted and wanted in _names(entry)]
    if len(exact) == 1:
        return exact[0]
    if exact:
        raise ConfigError(f"{len(exact)} tasks go by {name!r} (versions of one URL); give the task id from `swarm task ls`")
    if any(c not in "0123456789abcdef" for c in wanted.lower()):
        raise NoSuchTask(f"no task {name!r} in this store; `swarm task ls` shows what is there")
    if len(wanted) < MIN_PREFIX_DIGITS:
        raise ConfigError(f"{name!r} is too short; give at least {MIN_PREFIX_DIGITS} digits of the task id")
    found = [entry for entry in entries if entry.task.id.hex().startswith(wanted.lower())]
    if len(found) > 1:
        raise ConfigError(f"{len(found)} tasks begin with {name!r}; give more digits")
    if not found:
        raise NoSuchTask(f"no task {name!r} in this store; `swarm task ls` shows what is there")
    return found[0]
