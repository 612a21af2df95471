"""`swarm network`: make a closed network, issue members, revoke them, look at it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.output import emit_json, print_fields, print_table

if TYPE_CHECKING:
    from swarm.certificates import Member
    from swarm.network_admin import Description, Issued

_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_DAYS = click.IntRange(1, 36_500)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def network() -> None:
    """Closed networks: create one, issue and revoke members, change the secret.

    \b
    Examples:
      swarm network create /root/swarm-authority --name "build farm"
      swarm network issue /root/swarm-authority --out node-1
      scp -r node-1 host-1:/etc/swarm/network
      swarm daemon --network /etc/swarm/network      (on host-1)

    The directory made by `create` holds the authority's key (ca.key): whoever has it can issue members.  Keep it off the
    nodes.  See docs/how-to/network.md.
    """


@network.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--name", default="swarm", show_default=True, help="What people call it; not secret.")
@click.option("--days", type=_DAYS, default=3650, show_default=True, help="Life of the authority's certificate.")
@_json_option
def create(directory: Path, name: str, days: int, as_json: bool) -> None:
    """Make a network in DIRECTORY.

    That is an authority, which signs members, and a group secret, which keeps outsiders off the DHT.

    \b
    Examples:
      swarm network create /root/swarm-authority
      swarm network create ./authority --name staging --days 730 --json
    """
    from swarm import network_admin

    authority = network_admin.create(directory, name, days=days, now=time.time())
    if as_json:
        emit_json(
            {
                "network": authority.network_id.hex(),
                "name": authority.name,
                "directory": str(directory),
                "not_after": _iso(authority.not_after),
            }
        )
        return
    print(f"Network {authority.name!r} ({authority.network_id.hex()[:16]}) is in {directory}.")
    print("Keep ca.key there, and off the nodes.  Next: swarm network issue", directory, "--out NODE_DIR")


@network.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--out", type=_DIRECTORY, required=True, help="The node's directory; with --count, the parent of several.")
@click.option("--role", "roles", multiple=True, metavar="ROLE", help="seed or scheduler; may be repeated.")
@click.option("--days", type=_DAYS, default=365, show_default=True, help="Life of the certificate.")
@click.option("--count", type=click.IntRange(1, 10_000), help="Make this many nodes, in OUT/1, OUT/2, ...")
@click.option("--request", type=click.Path(path_type=Path, dir_okay=False), help="A node's signing request (node.csr).")
@_json_option
def issue(
    directory: Path, out: Path, roles: tuple[str, ...], days: int, count: int | None, request: Path | None, as_json: bool
) -> None:
    """Issue members of the network in DIRECTORY.

    A node's directory gets its key, its certificate, and copies of ca.crt, group.secret and ca.crl.  A key that is there
    already is kept: issuing again renews the certificate.

    \b
    Examples:
      swarm network issue ./authority --out node-1
      swarm network issue ./authority --out seed-1 --role seed --days 90
      swarm network issue ./authority --out nodes --count 20
      swarm network issue ./authority --out node-1 --request node.csr
    """
    from swarm import network_admin, private_files
    from swarm.errors import ConfigError

    if count is not None and request is not None:
        raise ConfigError("--count and --request do not go together: a request is for one node")
    text = None
    if request is not None:
        try:
            text = private_files.read_public(request, max_bytes=network_admin.MAX_REQUEST_BYTES)
        except FileNotFoundError as error:
            raise ConfigError(f"there is no {request}") from error
    outs = [out] if count is None else [out / str(i).zfill(len(str(count))) for i in range(1, count + 1)]
    issued = [network_admin.issue(directory, node, roles=roles, days=days, now=time.time(), request=text) for node in outs]
    if as_json:
        emit_json({"issued": [_issued_json(one) for one in issued]})
        return
    for one in issued:
        print(f"{one.member.node_id.hex()}  {one.directory}  until {_iso(one.member.not_after)}")


@network.command()
@click.option("--out", type=_DIRECTORY, required=True, help="The node's directory.")
@_json_option
def request(out: Path, as_json: bool) -> None:
    """Ask for a certificate, on the node.

    Makes the node's key, which then never leaves it, and a signing request to be carried to the authority.

    \b
    Example:
      swarm network request --out /etc/swarm/network                        (on the node)
      swarm network issue ./authority --out answer --request node.csr      (where the authority is)
      Then copy the files in `answer` beside the key.
    """
    from swarm import network_admin

    key, path = network_admin.request(out)
    if as_json:
        emit_json({"node": key.node_id.hex(), "request": str(path)})
        return
    print(f"Node {key.node_id.hex()}: take {path} to the authority.")


@network.command()
@click.argument("directory", type=_DIRECTORY)
@click.argument("members", nargs=-1, metavar="[NODE_ID|CERTIFICATE]...")
@click.option("--days", type=_DAYS, default=365, show_default=True, help="Until the list should be renewed.")
@_json_option
def revoke(directory: Path, members: tuple[str, ...], days: int, as_json: bool) -> None:
    """Revoke members, by node id or certificate file.

    With none named, only renews the list.  Writes ca.crl in DIRECTORY; copy it to every node: running daemons read it
    within seconds and drop who is on it.  Change the group secret too (rotate-secret) where the revoked node should no
    longer reach the DHT.

    \b
    Examples:
      swarm network revoke ./authority 3f0c6a1d9be2477f5a80c3d1e4b69f7720a1c5de
      swarm network revoke ./authority node-1/node.crt --json
    """
    from swarm import network_admin

    revoked, added = network_admin.revoke(directory, members, days=days, now=time.time())
    if as_json:
        emit_json(
            {
                "revoked": [f"{serial:x}" for serial in added],
                "total": len(revoked.serials),
                "number": revoked.number,
                "next_update": _iso(revoked.next_update),
            }
        )
        return
    print(f"{len(added)} certificates revoked, {len(revoked.serials)} in all.  Copy {directory / 'ca.crl'} to every node.")


@network.command("rotate-secret")
@click.argument("directory", type=_DIRECTORY)
@_json_option
def rotate_secret(directory: Path, as_json: bool) -> None:
    """Change the group secret, in two steps.

    Run this and hand group.secret out; when every node has it, do both again.  No node loses touch meanwhile: the first
    run adds a secret that every node then accepts, the second one puts it in use.

    \b
    Example:
      swarm network rotate-secret ./authority
    """
    from swarm import network_admin

    epochs, activated = network_admin.rotate_secret(directory)
    if as_json:
        emit_json({"epochs": list(epochs), "in_use": epochs[0], "done": activated})
        return
    path = directory / "group.secret"
    if activated:
        print(f"Secret {epochs[0]} is in use.  Copy {path} to every node; the one before is accepted until the next change.")
    else:
        print(f"Secret {epochs[-1]} waits.  Copy {path} to every node, then run this again to put it in use.")


@network.command()
@click.argument("directory", type=_DIRECTORY)
@_json_option
def show(directory: Path, as_json: bool) -> None:
    """Show what a network directory holds.

    An authority's or a node's; secrets are never shown.

    \b
    Examples:
      swarm network show /etc/swarm/network
      swarm network show ./authority --json
    """
    from swarm import network_admin

    description = network_admin.describe(directory)
    if as_json:
        emit_json(_description_json(description, time.time()))
        return
    _print_description(description, time.time())


def _description_json(description: Description, now: float) -> dict[str, Any]:
    revoked = description.revoked
    return {
        "network": description.authority.network_id.hex(),
        "name": description.authority.name,
        "not_after": _iso(description.authority.not_after),
        "holds_authority_key": description.holds_authority_key,
        "secret_epochs": list(description.secret),
        "revocation_list": None
        if revoked is None
        else {"number": revoked.number, "revoked": len(revoked.serials), "next_update": _iso(revoked.next_update)},
        "node": None if description.own is None else _member_json(description.own, description, now),
        "problem": description.own_problem or None,
        "issued": [_member_json(member, description, now) for member in description.issued],
    }


def _print_description(description: Description, now: float) -> None:
    authority, own, revoked = description.authority, description.own, description.revoked
    fields: list[tuple[str, object]] = [
        ("network", f"{authority.name} ({authority.network_id.hex()})"),
        ("authority", f"until {_iso(authority.not_after)}{', its key is here' if description.holds_authority_key else ''}"),
        ("group secret", f"epoch {description.secret[0]} in use, accepted: {', '.join(map(str, description.secret))}"),
        ("revocation list", "none" if revoked is None else f"number {revoked.number}, {len(revoked.serials)} revoked"),
    ]
    if own is not None:
        fields += [
            ("node", own.node_id.hex()),
            ("certificate", f"{_state(own, description, now)}, until {_iso(own.not_after)}"),
            ("roles", ", ".join(sorted(own.roles)) or "none"),
        ]
    if description.own_problem:
        fields.append(("problem", description.own_problem))
    print_fields(fields)
    if description.issued:
        print()
        rows = [
            (
                member.node_id.hex(),
                _state(member, description, now),
                _iso(member.not_after) or "",
                ",".join(sorted(member.roles)),
            )
            for member in description.issued
        ]
        print_table(("node", "state", "until", "roles"), rows)


def _state(member: Member, description: Description, now: float) -> str:
    if description.revoked is not None and member.serial in description.revoked.serials:
        return "revoked"
    if now >= member.not_after:
        return "out of date"
    return "valid" if now >= member.not_before else "not yet valid"


def _member_json(member: Member, description: Description, now: float) -> dict[str, Any]:
    return {
        "node": member.node_id.hex(),
        "serial": f"{member.serial:x}",
        "roles": sorted(member.roles),
        "not_before": _iso(member.not_before),
        "not_after": _iso(member.not_after),
        "state": _state(member, description, now),
    }


def _issued_json(issued: Issued) -> dict[str, Any]:
    member = issued.member
    return {
        "node": member.node_id.hex(),
        "serial": f"{member.serial:x}",
        "roles": sorted(member.roles),
        "not_after": _iso(member.not_after),
        "directory": str(issued.directory),
    }


def _iso(wall: float | None) -> str | None:
    return None if wall is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall))
